"""What thresholds would have done on a test set: good images called defects, and defects that are missed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from rich.markup import escape
from rich.table import Table

from lightning_modules.decisions.categories import Categories
from lightning_modules.decisions.decider import POOLED, Decider
from lightning_modules.decisions.pixels import NormalPixels
from lightning_modules.metrics.thresholds import RULES, Threshold

THRESHOLDS, DECISIONS = "thresholds.csv", "decisions.csv"
"""In a record: the tables of `thresholds` and `outcomes`."""
COLUMNS = (
    "category", "level", "rule", "alpha", "threshold", "rate", "basis", "normal_images",
    "good", "false_alarms", "defects", "misses",
)  # fmt: skip


def deciders(
    normal: pd.DataFrame, pixels: Mapping[str, NormalPixels], alpha: float | None
) -> tuple[dict[str, Decider], dict[str, str]]:
    """A decider for every rule, and for each that these normal images cannot have a sentence on why.

    Args:
        normal: As `Decider` takes it.
        pixels: Per category, as `Decider` takes them.
        alpha: Of the rule `conformal`, which is left out without.
    """
    found, refused = {}, {}
    for rule in RULES:
        if rule == "conformal" and alpha is None:
            continue
        try:
            names = Categories(dict.fromkeys(normal["category"]))
            found[rule] = Decider(normal, rule, alpha if rule == "conformal" else None, "", names, pixels)
        except ValueError as error:
            refused[rule] = str(error)
    return found, refused


def thresholds(rules: Mapping[str, Decider]) -> pd.DataFrame:
    """One row per category ("" for all together), level (image or pixel) and rule.

    Columns `category`, `level`, `rule`, `alpha`, `threshold`, `rate` (false alarms per normal image that the rule promises at
    most, empty without a promise), `basis`, `normal_images`.
    """
    rows = []
    for rule, decider in rules.items():
        for category in _scopes(decider):
            for level, found in (
                ("image", decider.threshold(category)),
                ("pixel", decider.pixel_threshold(category)),
            ):
                if found is not None:
                    rows.append(_start(category, level, rule, decider, found))
    return pd.DataFrame(rows, columns=list(COLUMNS[:8]))


def outcomes(rules: Mapping[str, Decider], image_scores: pd.DataFrame) -> pd.DataFrame:
    """What each threshold would have done, one row per category, level and rule, with `COLUMNS`.

    The category "" is all test images under one threshold for all. At level pixel an image is called a defect if any pixel
    of its map is above the threshold. Empty where a test image has no map.

    Args:
        rules: From `deciders`.
        image_scores: One row per test image: `category`, `label` (0 or 1), `image_score`, and `map_max` where there is a map.
    """
    rows = []
    for rule, decider in rules.items():
        for category in _scopes(decider):
            mine = image_scores if category == POOLED else image_scores[image_scores["category"] == category]
            for level, column, found in (
                ("image", "image_score", decider.threshold(category)),
                ("pixel", "map_max", decider.pixel_threshold(category)),
            ):
                if found is None or column not in mine or mine[column].isna().any():
                    continue
                called, defect = mine[column].to_numpy() > found.value, mine["label"].to_numpy() == 1
                counts = (~defect).sum(), (called & ~defect).sum(), defect.sum(), (~called & defect).sum()
                rows.append(_start(category, level, rule, decider, found) + tuple(int(n) for n in counts))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _scopes(decider: Decider) -> list[str]:
    """The categories, and all together where there are several."""
    return [*decider.names, POOLED] if len(decider.names) > 1 else decider.names


def _rate(rate: float, basis: str) -> str:
    if math.isnan(rate) or basis not in ("held-out", "cross validation"):
        return "-"
    return f"{rate:.3g}" if basis == "held-out" else f"~ {rate:.3g}"


def _start(category: str, level: str, rule: str, decider: Decider, found: Threshold) -> tuple:
    alpha = math.nan if decider.alpha is None else decider.alpha
    return category, level, rule, alpha, found.value, found.rate, decider.basis(category), found.n


def unlike(decided: pd.DataFrame, rule: str) -> list[str]:
    """A sentence for each category whose good test images raise far more false alarms than was promised.

    If they were like the held-out ones, the alarms among m of them above the k-th highest of n scores would follow a
    beta-binomial distribution; so many or more would then have a chance of less than one in a thousand.
    """
    from scipy.stats import betabinom

    sentences = []
    chosen = decided[(decided["rule"] == rule) & (decided["level"] == "image") & (decided["basis"] == "held-out")]
    for row in chosen[chosen["category"] != POOLED].dropna(subset="rate").to_dict("records"):
        k = round(row["rate"] * (row["normal_images"] + 1))
        chance = betabinom.sf(row["false_alarms"] - 1, row["good"], k, row["normal_images"] + 1 - k)
        if chance < 0.001:
            sentences.append(
                f"{row['category']}: {row['false_alarms']} false alarms of {row['good']} good test images against a promised "
                f"rate of {row['rate']:.3g}: they are not like the held-out images, for which alone the promise is"
            )
    return sentences


def render(decided: pd.DataFrame, rule: str) -> Table:
    """Rich table of `outcomes` for one rule: what its image thresholds would have done, per category."""
    chosen = decided[(decided["rule"] == rule) & (decided["level"] == "image")]
    notes = {
        "training (optimistic)": "thresholds of training images are optimistic: unseen good images score higher",
        "cross validation": "~ about so many, as far as the folds' models score like this one; it is no promise",
    }
    found = [text for basis, text in notes.items() if (chosen["basis"] == basis).any()]
    table = Table(caption="\n".join(found) or None)
    for name in ("category", "normal\nimages", "basis", "threshold", "promised\nrate", "false\nalarms", "misses"):
        table.add_column(name, justify="left" if name in ("category", "basis") else "right")
    for row in chosen.to_dict("records"):
        pooled = row["category"] == POOLED
        if pooled:
            table.add_section()
        table.add_row(
            "one for all" if pooled else escape(row["category"]),
            str(row["normal_images"]),
            row["basis"],
            f"{row['threshold']:.4g}",
            _rate(row["rate"], row["basis"]),
            f"{row['false_alarms']} of {row['good']}",
            f"{row['misses']} of {row['defects']}",
        )
    return table
