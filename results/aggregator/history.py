"""What a run recorded on its way: a quantity per epoch, and whether the loss was still falling when training ended."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pandas as pd

from results.aggregator.records import StoredRecord

#: Names in history.csv.
LOSS, HELD_OUT = "train/loss", "val/loss"
DETECTION, LOCALISATION = "curve/image_auroc", "curve/pixel_auroc"
FALLING = 0.02
"""A loss that lost more than this share of itself over the last tenth of the epochs is still falling."""
LEAST_EPOCHS = 10
"""With fewer epochs a tenth of them says nothing."""


@dataclass(frozen=True)
class Curve:
    """One quantity over epochs of one run; `epochs` ascending, `values` as recorded (scores are fractions)."""

    epochs: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def peak(self) -> tuple[float, int]:
        """The highest value and the first epoch that reaches it."""
        value = max(self.values)
        return value, self.epochs[self.values.index(value)]

    @property
    def final(self) -> float:
        """The last value."""
        return self.values[-1]


def read_curve(stored: StoredRecord, name: str) -> Curve | None:
    """A quantity of a run per epoch; several logged steps of one epoch are averaged. None if it was not recorded."""
    rows = stored.history[stored.history["metric"] == name]
    rows = rows.assign(epoch=pd.to_numeric(rows["epoch"]), value=pd.to_numeric(rows["value"])).dropna(subset=["value"])
    if rows.empty:
        return None
    means = rows.groupby("epoch")["value"].mean().sort_index()
    return Curve(tuple(int(epoch) for epoch in means.index), tuple(float(value) for value in means))


def fall(stored: StoredRecord) -> float | None:
    """Share of itself that the training loss lost over the last tenth of the epochs, in [-inf, 1]; negative if it rose.

    The medians of the last tenth and of the tenth before it are compared, so that one epoch's noise does not decide. None
    for a run of fewer than `LEAST_EPOCHS` epochs, without a loss, or with one that is not positive.
    """
    loss = read_curve(stored, LOSS)
    if loss is None or len(loss.values) < LEAST_EPOCHS:
        return None
    tenth = max(1, len(loss.values) // 10)
    before = statistics.median(loss.values[-2 * tenth : -tenth])
    last = statistics.median(loss.values[-tenth:])
    return (before - last) / before if before > 0 else None
