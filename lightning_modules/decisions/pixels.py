"""What a record keeps of the pixels of normal maps, per category: for pixel thresholds and colour scales.

The colour scale of a category goes from the 99th percentile of its normal images' pixels to the highest pixel of its test
images, and to no less than twice as far as the highest normal pixel: a good image stays dark but for a hundredth of its pixels,
and even those reach the middle of the scale at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.metrics.thresholds import PixelStatistics

FILE = "normal_pixels.csv"
"""In a record: `category` ("" for all, where there are several), `low` and `high` of its colours, and `PixelStatistics`."""
COLUMNS = ("category", "low", "high", *(field.name for field in fields(PixelStatistics)))


@dataclass(frozen=True)
class NormalPixels:
    """Of one category: `statistics` of the pixels of its normal maps, and the ends of its colour scale."""

    statistics: PixelStatistics
    low: float
    high: float


def scaled(statistics: PixelStatistics, highest: float) -> NormalPixels:
    """With the colour scale for test maps whose highest pixel is `highest`."""
    low = statistics.p99
    high = max(highest, 2 * statistics.highest - low)
    return NormalPixels(statistics, low, high if high > low else low + 1e-6)


def table(found: Mapping[str, NormalPixels]) -> pd.DataFrame:
    """The content of `FILE`."""
    rows = [
        {"category": name, "low": one.low, "high": one.high, **asdict(one.statistics)} for name, one in found.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read(record: Path) -> dict[str, NormalPixels]:
    """Per category, of a run's record; nothing of one that keeps none."""
    if not (record / FILE).is_file():
        return {}
    rows = pd.read_csv(record / FILE, dtype={"category": str}, keep_default_na=False)
    found = {}
    for row in rows.to_dict("records"):
        values: dict[str, Any] = {field.name: float(row[field.name]) for field in fields(PixelStatistics)}
        statistics = PixelStatistics(**{**values, "count": int(values["count"])})
        found[row["category"]] = NormalPixels(statistics, float(row["low"]), float(row["high"]))
    return found
