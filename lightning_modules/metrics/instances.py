"""Instance average precision: how well whole defects are found, whatever their size.

DeSTSeg (CVPR 2023, https://arxiv.org/abs/2211.11317, section 4.2 and released code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

EIGHT = np.ones((3, 3), bool)


class InstancePrecision(NamedTuple):
    """iap: mean of the pixel precisions at which one defect more is found; iap_at: precision at the wanted recall."""

    iap: float
    iap_at: float


def instance_average_precision(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], recall: float = 0.9, share: float = 0.5
) -> InstancePrecision:
    """IAP and IAP@recall of one category.

    maps, masks: one (H, W) per test image, scores and bool. A defect is an 8-connected region; it is found at a threshold
    if at least about `share` of its pixels reach it: its score is element floor(share * n) of its n pixel scores in
    descending order. At each defect's score: recall = share of defects found, precision = anomalous pixels among all that
    reach it, made non-decreasing with the threshold. Raises ValueError without a defect.
    """
    regions, positive, every = [], [], []
    for map_, mask in zip(maps, masks, strict=True):
        mask = np.asarray(mask, bool)
        labels, count = ndimage.label(mask, EIGHT)
        for number in range(1, count + 1):
            values = np.sort(map_[labels == number])[::-1]
            regions.append(values[min(int(share * len(values)), len(values) - 1)])
        positive.append(map_[mask])
        every.append(map_.ravel())
    if not regions:
        raise ValueError("No defect in any mask: instance average precision is not defined.")
    thresholds = np.sort(np.asarray(regions))
    positives, pixels = np.sort(np.concatenate(positive)), np.sort(np.concatenate(every))

    def reached(values: np.ndarray) -> np.ndarray:
        return len(values) - np.searchsorted(values, thresholds, side="left")

    precision = np.maximum.accumulate(reached(positives) / reached(pixels))
    recalls = reached(thresholds) / len(thresholds)
    return InstancePrecision(float(precision.mean()), float(precision[recalls >= recall].max()))
