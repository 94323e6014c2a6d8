"""How much of the images is anomalous, in percent, from masks: column AR of UniAS's supplement, Tables 1 and 2.

The paper (WACV 2025) prints one number per category and gives no formula, so several definitions are offered by name. Ours, where
one is needed, is `OURS`. All are over test images; an anomalous image without a mask is left out, and so is one whose mask
marks nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

DEFINITIONS = {
    "anomalous_pixels": "marked pixels of all pixels of the anomalous images",
    "image_mean": "mean over anomalous images of each one's share of marked pixels",
    "image_median": "median over anomalous images of each one's share of marked pixels",
    "image_largest": "largest share of marked pixels in an anomalous image",
    "box_mean": "mean over anomalous images of the share of the box around all marked pixels",
    "test_pixels": "marked pixels of all pixels of the test set, good images included",
    "to_normal_pixels": "marked pixels per 100 pixels that are not marked, in anomalous images",
}
"""Name -> what is divided by what."""
OURS = "anomalous_pixels"


class Marked(NamedTuple):
    """What one test image's mask marks: pixels of the image, those marked, and those of the box around all marked ones."""

    pixels: int
    marked: int = 0
    box: int = 0


def look(mask: np.ndarray) -> Marked:
    """Of a mask, bool (H, W)."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return Marked(mask.size)
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return Marked(mask.size, int(np.count_nonzero(mask)), int(box))


def ratios(images: Iterable[Marked]) -> dict[str, float]:
    """Definition -> percent; NaN for all of them if nothing is marked. The order of the images does not matter."""
    images = list(images)
    anomalous = [image for image in images if image.marked]
    if not anomalous:
        return dict.fromkeys(DEFINITIONS, math.nan)
    marked, pixels = (sum(image[part] for image in anomalous) for part in (1, 0))
    shares = [image.marked / image.pixels for image in anomalous]
    found = (
        marked / pixels,
        statistics.fmean(shares),
        statistics.median(shares),
        max(shares),
        statistics.fmean(image.box / image.pixels for image in anomalous),
        marked / sum(image.pixels for image in images),
        marked / (pixels - marked) if pixels > marked else math.inf,
    )
    return {name: 100 * value for name, value in zip(DEFINITIONS, found, strict=True)}
