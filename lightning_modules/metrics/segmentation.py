"""SegF1 of MVTec AD 2 (Heckler-Kram et al., arXiv 2503.21622): how well a map is segmented by a threshold fixed beforehand.

The benchmark counts pixels over all images of a category. A mean over images is another, usually higher number, and both are
called SegF1 in papers; they must not stand in one column. The threshold comes from normal images, never from the test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .keys import float_to_key
from .store import Category
from .sync import Group

SEGMENTATION_DEFINITIONS: dict[str, str] = {
    "seg_f1": (
        "2TP / (2TP + FP + FN), counted over all pixels of all test images of the category that have a mask (MVTec AD 2's "
        "SegF1); a pixel is predicted if its score > t, t = mean + 3 standard deviations of all pixels of the normal "
        "images' maps (its baseline)"
    ),
    "seg_f1_images": (
        "mean over images of 2|P&G| / (|P| + |G|), P = pixels with score > t, G = mask; an image whose mask is empty counts 1 "
        "if P is empty, else 0; t as in seg_f1"
    ),
    "seg_f1_threshold": "t, the threshold of seg_f1 and seg_f1_images (a score, not a fraction; not averaged)",
}
SEGMENTATION_METRICS = tuple(SEGMENTATION_DEFINITIONS)


class SegmentationF1(NamedTuple):
    """pooled: over all pixels of a category. images: mean over its images. n: images. Both NaN without an anomalous pixel."""

    pooled: float
    images: float
    n: int


def segmentation_f1(
    categories: Sequence[Category], thresholds: Mapping[str, float], group: Group
) -> list[SegmentationF1]:
    """Of each category, at its own threshold; a pixel is predicted if its score is above it.

    thresholds: by name of the category; every category has one. group: the processes that share the images.
    """
    sums = []
    for category in categories:
        limit = float_to_key(_at_most(thresholds[category.name]))[0]
        counted = set(category.counted())
        rows = [row for number, row in enumerate(category.maps.read()) if number in counted]
        found = [(len(row.anomalous), _above(row.anomalous, limit), _above(row.normal, limit)) for row in rows]
        size, hit, false = np.array(found, dtype=np.int64).reshape(-1, 3).T
        both, empty = size + hit + false, size == 0
        f1 = np.where(empty, both == 0, 2 * hit / np.maximum(both, 1))
        sums.append((len(found), size.sum(), hit.sum(), false.sum(), f1.sum()))
    total = group.sum(np.array(sums, dtype=np.float64).reshape(-1, 5))  # counts are exact up to 2^53
    return [_f1(*row) for row in total.tolist()]


def _f1(n: float, size: float, hit: float, false: float, f1: float) -> SegmentationF1:
    if not size:
        return SegmentationF1(math.nan, math.nan, int(n))
    return SegmentationF1(2 * hit / (size + hit + false), f1 / n, int(n))


def _above(keys: np.ndarray, limit: np.int32) -> int:
    """How many of ascending keys are above the limit."""
    return len(keys) - int(np.searchsorted(keys, limit, side="right"))


def _at_most(threshold: float) -> np.ndarray:
    """float32 (1,): the highest one that is not above the threshold, so that float32 scores compare with it exactly."""
    value = np.array([threshold], dtype=np.float32)
    return value if float(value[0]) <= threshold else np.nextafter(value, np.float32(-np.inf))
