"""Decisions by a run's record: thresholds and p-values per category, from scores of normal images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from datamodules.sample_table import FEWEST_HELD_OUT as FEWEST
from datamodules.training_set import FOLD
from lightning_modules.decisions import normal as normal_scores
from lightning_modules.decisions import pixels
from lightning_modules.decisions.categories import Categories, Choice
from lightning_modules.metrics.thresholds import (
    RateError,
    Threshold,
    check_rule,
    images_needed,
    lowest_rate,
    p_values,
    threshold,
)

GOOD, DEFECT, CANNOT_TELL = "good", "defect", "cannot tell"
POOLED = ""
"""In place of a category: all of them together."""
HELD_OUT, CROSS, OPTIMISTIC = "held-out", "cross validation", "training (optimistic)"


@dataclass(frozen=True)
class Decision:
    """What is said of one image.

    Attributes:
        verdict: `good`, `defect` or `cannot tell`.
        category: Whose normal images decided; "" if it is not known.
        by: How the category was found, see `lightning_modules.decisions.categories.Choice`.
        score: The image's score; NaN if it has none.
        p_value: Share of normal images that score at least as high, itself counted: at least 1 / (n + 1). NaN without any.
        threshold: Of image scores; None where there is none.
        pixel_threshold: Of the map; None where none is recorded. A pixel above it is anomalous.
        basis: `held-out`; `cross validation`: each scored by a model of the other folds, so that rates are about right but
            nothing is promised; or `training (optimistic)`: unseen normal images score higher than those. "" without any.
        reason: Why nothing can be told, in words; else "".
    """

    verdict: str
    category: str
    by: str
    score: float
    p_value: float
    threshold: Threshold | None
    pixel_threshold: Threshold | None
    basis: str
    reason: str = ""


class Decider:
    """Decides by a rule, per category.

    Args:
        normal: One row per normal image: `category`, `split` (val, fold or train), `image_score`, and `map_max` where
            it is known.
        rule: One of `lightning_modules.metrics.thresholds.RULES`; None is `conformal` with an alpha, else `max`.
        alpha: Wanted rate of false alarms per normal image.
        given: The category that all images have; "" to find it out.
        categories: How it is found out; None knows no more than the names.
        normal_pixels: Per category, as `lightning_modules.decisions.pixels` reads them.

    Raises:
        ValueError: the options contradict each other, or a category's normal images cannot promise alpha.
    """

    def __init__(
        self,
        normal: pd.DataFrame,
        rule: str | None = None,
        alpha: float | None = None,
        given: str = "",
        categories: Categories | None = None,
        normal_pixels: Mapping[str, pixels.NormalPixels] | None = None,
    ) -> None:
        self.rule, self.alpha = check_rule(rule, alpha), alpha
        self.categories = categories or Categories(dict.fromkeys(normal["category"]))
        self.given = self.categories.named(given) if given else ""
        self._pixels = dict(normal_pixels or {})
        self._normal = {name: _usable(rows) for name, rows in normal.groupby("category", sort=False)}
        self._normal[POOLED] = _usable(normal)
        self._found: dict[tuple[str, str], Threshold | None] = {}
        for name in [self.given] if self.given else self.names:
            self.threshold(name)  # a rate that cannot be promised is refused before anything is scored

    @classmethod
    def of(
        cls, record: str | Path, rule: str | None = None, alpha: float | None = None, category: str = ""
    ) -> Decider | None:
        """By what a run's record keeps; None if it keeps no scores of normal images.

        Args:
            record: The record's folder.
            rule, alpha: As above.
            category: The category of all images, as the record names it; "" to find it out.

        Raises:
            ValueError: as above, or an unknown category.
        """
        folder = Path(record)
        normal = normal_scores.read(folder)
        if normal is None or normal.empty:
            return None
        names = dict.fromkeys(normal["category"])
        return cls(normal, rule, alpha, category, Categories.read(folder, names), pixels.read(folder))

    @property
    def names(self) -> list[str]:
        """The categories that have normal images."""
        return [name for name in self._normal if name != POOLED]

    def basis(self, category: str) -> str:
        """`held-out`, `cross validation` or `training (optimistic)`; "" for a category without normal images."""
        rows = self._normal.get(category)
        if rows is None:
            return ""
        splits = set(rows["split"])
        return HELD_OUT if splits == {"val"} else CROSS if splits == {FOLD} else OPTIMISTIC

    def remembered(self, category: str) -> bool:
        """Whether the threshold would rest on training images that all score alike, as in a memory that holds them."""
        rows = self._normal.get(category)
        return (
            rows is not None
            and self.basis(category) == OPTIMISTIC
            and len(rows) > 1
            and rows["image_score"].nunique() == 1
        )

    def count(self, category: str) -> int:
        """Normal images that the category's threshold rests on."""
        return len(self._normal.get(category, ()))

    def threshold(self, category: str) -> Threshold | None:
        """Of image scores; `POOLED` for all categories together. None for a category without normal images.

        Raises:
            RateError: the category's normal images cannot promise alpha.
        """
        return self._threshold(category, "image_score")

    def pixel_threshold(self, category: str) -> Threshold | None:
        """Of map pixels; its rate is the share of normal images with any pixel above it. None where it is not recorded, or
        where the rule cannot make one of these maps.
        """
        return self._threshold(category, "map_max")

    def colour_scale(self, category: str) -> tuple[float, float] | None:
        """Ends of the colour scale of the category's heat maps; None where they are not recorded."""
        found = self._pixels.get(category)
        return None if found is None else (found.low, found.high)

    def _threshold(self, category: str, column: str) -> Threshold | None:
        if (category, column) not in self._found:
            self._found[category, column] = self._make(category, column)
        return self._found[category, column]

    def _make(self, category: str, column: str) -> Threshold | None:
        rows = self._normal.get(category)
        if rows is None or column not in rows or rows[column].isna().any():
            return None
        statistics = None
        if column == "map_max" and self.rule in ("mean_3sd", "p95_factor"):
            if category not in self._pixels:
                return None
            statistics = self._pixels[category].statistics
        try:
            if self.alpha is not None and self.basis(category) == OPTIMISTIC:
                held = int((rows["split"] == "val").sum())
                raise RateError(
                    f"a rate of false alarms of {self.alpha:g} needs {images_needed(self.alpha)} held-out normal images; here "
                    f"are {held}, and scores of training images promise nothing."
                )
            return threshold(rows[column].to_numpy(), self.rule, self.alpha, statistics)
        except RateError as error:
            how = "Take more images" if self.basis(category) == CROSS else "Hold out more (--data.init_args.holdout)"
            more = f"{how}, or ask for a higher rate (ALPHA=)."
            raise RateError(f"{category or 'all categories together'}: {error} {more}") from error
        except ValueError as error:
            if column == "map_max" or category == POOLED:
                return None
            raise ValueError(f"{category}: {error}") from error

    def choose(self, path: str | PurePath | None = None, descriptor: np.ndarray | None = None) -> Choice:
        """The category of an image, and how it was found; see `Categories.choose`."""
        return self.categories.choose(path, descriptor, self.given)

    def decide(self, score: float, choice: Choice | str, map_max: float | None = None) -> Decision:
        """What is said of an image.

        Args:
            score: Its score; NaN if it could not be scored.
            choice: Its category.
            map_max: The highest pixel of its map; not needed for the decision, which is the image score's.
        """
        choice = choice if isinstance(choice, Choice) else Choice(choice, "CATEGORY")
        category, basis = choice.category, self.basis(choice.category)
        if not category or not basis:
            why = choice.by if not category else f"the record keeps no normal image of {category}"
            return Decision(CANNOT_TELL, category, choice.by if category else "", score, math.nan, None, None, "", why)
        found, n = self.threshold(category), self.count(category)
        p = float(p_values(np.array([score]), self._normal[category]["image_score"].to_numpy())[0])
        reason = ""
        if math.isnan(score):
            reason = "it has no score"
        elif self.remembered(category):
            reason = (
                f"the method remembers its training images, all of which score {found.value:.3g}: none was held out"
            )
        elif n < FEWEST and self.alpha is None:
            reason = f"{n} normal images of {category} are too few: one in {n + 1} good ones would be called a defect"
        verdict = CANNOT_TELL if reason else DEFECT if score > found.value else GOOD
        return Decision(verdict, category, choice.by, score, p, found, self.pixel_threshold(category), basis, reason)

    def sentences(self, categories: Iterable[str] | None = None) -> list[str]:
        """A line for each category: its threshold, on what it rests and what it promises."""
        lines = []
        for name in self.names if categories is None else categories:
            found = self.threshold(name)
            if found is None:
                lines.append(f"{name}: no normal image is kept, so there is no threshold")
                continue
            kind = self.basis(name)
            images = f"{kind} normal images" if kind != CROSS else "normal images, by cross validation"
            line = f"{name}: defect above {found.value:.4g} ({found.rule} of {found.n} {images})"
            if math.isnan(found.rate):
                line += "; this rule promises no rate of false alarms"
            elif kind == HELD_OUT:
                line += f"; false alarms at most {found.rate:.3g}"
                line += (
                    f" (the lowest that they can promise: {lowest_rate(found.n):.3g})" if found.rule != "max" else ""
                )
            elif kind == CROSS:
                line += f"; false alarms about {found.rate:.3g} (no promise: of models of the other folds)"
            else:
                line += "; unseen good images score higher than these, so false alarms will be more than "
                line += f"{found.rate:.3g}"
            lines.append(line)
        return lines


def _usable(rows: pd.DataFrame) -> pd.DataFrame:
    """The held-out images if there are at least `FEWEST`, else all, and the basis is optimistic."""
    held = rows[rows["split"] == "val"]
    return held if len(held) >= FEWEST else rows
