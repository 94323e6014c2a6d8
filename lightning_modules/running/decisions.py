"""The decisions of a run that has been tested: its thresholds, what they would have done, and what its record keeps of both."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from datamodules.problems import number_of
from datamodules.sample_table import FEWEST_HELD_OUT, SampleTable, category_keys
from datamodules.training_set import FOLD
from lightning_modules.callbacks.normal_scores import NormalScores
from lightning_modules.decisions import categories, normal, outcomes, pixels
from lightning_modules.metrics.thresholds import check_rule, images_needed, lowest_rate
from lightning_modules.running import folds
from lightning_modules.running.settings import RunConfig


@dataclass(frozen=True)
class Judged:
    """What the record keeps of a run's decisions.

    Attributes:
        attachments: File name in the record -> its text.
        notes: Sentences for the record.
        scales: Category -> ends of the colour scale of its heat maps; empty for a method without a map.
    """

    attachments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)


def judge(scored: NormalScores, image_scores: pd.DataFrame, run: RunConfig, tested: bool, fold: bool = False) -> Judged:
    """Makes the thresholds, says what the run's own rule would have done, and returns what the record keeps.

    Args:
        scored: The normal images, scored.
        image_scores: One row per test image, with `category`, `label`, `image_score` and `map_max`.
        run: Its `rule` and `alpha`.
        tested: Whether these are test images; else nothing is said of what thresholds would have done.
        fold: Whether the run is one fold of a cross-validation, whose own thresholds nobody needs.
    """
    table, statistics = (scored.table, scored.pixels) if run.folds is None else folds.kept(run)
    found = {name: pixels.scaled(one, _highest(image_scores, name)) for name, one in statistics.items()}
    if fold:
        return Judged({normal.FILE: table.to_csv(index=False), pixels.FILE: pixels.table(found).to_csv(index=False)})
    rules, refused = outcomes.deciders(table, found, run.alpha)
    files = {
        normal.FILE: table.to_csv(index=False),
        outcomes.THRESHOLDS: outcomes.thresholds(rules).to_csv(index=False),
    }
    if found:
        files[pixels.FILE] = pixels.table(found).to_csv(index=False)
    if scored.features is not None:
        files[categories.FILE] = scored.features.to_csv(index=False, float_format="%.5g")
    notes = _recognised(scored.recognised) if tested else []
    own = check_rule(run.rule, run.alpha)
    if own in refused:
        rank_zero_info(f"Note: no threshold: {refused[own]}")
    if tested:
        decided = outcomes.outcomes(rules, image_scores)
        files[outcomes.DECISIONS] = decided.to_csv(index=False)
        if own in rules:
            Console().print(outcomes.render(decided, own))
            alike = [name for name in rules[own].names if rules[own].remembered(name)]
            for name in alike:
                rank_zero_info(
                    f"Note: {name}: the method remembers its training images, so their scores make no threshold and predict will "
                    "say cannot tell. Hold normal images out (--data.init_args.holdout=0.2)."
                )
            for sentence in outcomes.unlike(decided, own):
                rank_zero_info(f"Note: {sentence}")
                notes.append(f"decisions: {sentence}")
    elif own in rules:
        for sentence in rules[own].sentences():
            rank_zero_info(sentence)
    return Judged(files, notes, {name: (one.low, one.high) for name, one in found.items()})


def check(table: SampleTable, run: RunConfig) -> None:
    """Refuses a rate of false alarms that the normal images of a category cannot promise, before anything is trained.

    They are the held-out ones, or, with folds, all that are trained on.

    Raises:
        SystemExit: names the category with the fewest images, the lowest rate that they can promise, and how many it takes.
    """
    if run.alpha is None:
        return
    keys = pd.Series(category_keys(table), index=table.index)
    crossed = run.folds is not None or (table["split"] == FOLD).any()
    held = table["split"].isin(["train", FOLD] if crossed else ["val"]).groupby(keys, sort=False).sum()
    category, n = held.idxmin(), int(held.min())
    if n < FEWEST_HELD_OUT or lowest_rate(n) > run.alpha:
        what, how = ("", "Take more") if crossed else ("held-out ", "Hold out more (--data.init_args.holdout)")
        lowest = f": the lowest rate that they can promise is 1/{n + 1} = {lowest_rate(n):.3g}" * (n >= FEWEST_HELD_OUT)
        raise SystemExit(
            f"error: alpha {run.alpha:g} needs {images_needed(run.alpha)} {what}normal images of each category, and {category} "
            f"has {n}{lowest}. {how}, or leave ALPHA out: the default rule needs no rate."
        )


def _highest(image_scores: pd.DataFrame, category: str) -> float:
    """The highest map pixel of a category's test images; of all for ""."""
    mine = image_scores if category == "" else image_scores[image_scores["category"] == category]
    return float(mine["map_max"].max()) if len(mine) else float("-inf")


def _recognised(counted: pd.DataFrame) -> list[str]:
    """How many test images are taken for their own category where nobody names it."""
    if counted.empty:
        return []
    right, images = int(counted["recognised"].sum()), int(counted["images"].sum())
    worst = counted.loc[(counted["recognised"] / counted["images"]).idxmin()]
    text = f"category by the nearest normal features: right for {right} of {number_of(images, 'test image')}"
    if right < images:
        text += f" ({worst['category']}: {worst['recognised']} of {worst['images']})"
    return [text]
