"""Saturated per-region overlap (sPRO) of MVTec LOCO AD, exact.

Definition: Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and
Localization", IJCV 2022, section 5, and the dataset's official evaluation code:

* a region is one annotated defect = one mask file, whatever its connected components;
* at a threshold, sPRO of a region = min(detected pixels of the region / saturation area, 1); the saturation area comes
  from the category's `defects_config.json`: `int(threshold * area)` if relative, else `min(threshold, area)`;
* the false positive rate counts, over all images given, the pixels that lie in no region of their image;
* AU-sPRO = area under (FPR, mean sPRO over all regions) up to an FPR limit (the paper's headline: 0.05), divided by
  the limit; logical and structural anomalies are scored apart, each together with all good images, and averaged.

The official code samples thresholds; here every distinct score counts (a limit it approaches), ties included. Maps are
compared with masks at the masks' own resolution, as the official code demands.

Only the `saturation area` highest scores of a region ever change its sPRO, each by 1 / saturation area. So the curve
needs those scores, and for each of them the number of normal pixels at or above and above it. Two passes over the maps
give both; normal pixels that only matter beyond the FPR limit are skipped in the second. Processes that have some of the
images each exchange those scores and the counts, never maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .keys import LOWEST, float_to_key
from .sync import Group

PAGE = 16  # low bits of a key that the first pass leaves out
LIMITS = (0.05, 0.3)


def saturation_area(region_area: int, threshold: float, relative: bool) -> int:
    """Number of detected pixels at which a region counts as found completely, >= 1, as the official code has it.

    region_area: pixels. threshold: a share of the area in (0, 1] if `relative`, else pixels at the masks' resolution.
    A relative threshold below one pixel, by which the official code would divide, counts as one pixel.
    """
    return max(1, int(threshold * region_area) if relative else min(int(threshold), region_area))


@dataclass(frozen=True)
class Region:
    """One annotated defect. pixels: bool (H, W). saturation_area: pixels, >= 1."""

    pixels: np.ndarray
    saturation_area: int


Sample = tuple[np.ndarray, Sequence[Region]]
"""Anomaly map float32 (H, W) and the regions of that image at the same size (none for a good image)."""


@dataclass(frozen=True)
class SPROCurve:
    """Mean sPRO over the FPR, as the corner points of a piecewise linear curve.

    fpr, spro: float64 (K,), ascending, starting at (0, 0); exact up to `limit`. regions, images: how many went in.
    """

    fpr: np.ndarray
    spro: np.ndarray
    limit: float
    regions: int
    images: int

    def area(self, limit: float) -> float:
        """AU-sPRO in [0, 1]: area up to FPR `limit` divided by `limit`; linear interpolation at the limit."""
        if not 0 < limit <= self.limit:
            raise ValueError(f"the FPR limit must lie in (0, {self.limit}], found {limit}")
        inside = self.fpr <= limit
        fpr, spro = self.fpr[inside], self.spro[inside]
        end = spro[-1]
        if not inside.all():
            k = int(inside.sum())
            end = end + (self.spro[k] - end) * (limit - fpr[-1]) / (self.fpr[k] - fpr[-1])
        fpr, spro = np.append(fpr, limit), np.append(spro, end)
        return float(np.sum(np.diff(fpr) * (spro[1:] + spro[:-1])) / 2 / limit)


def spro_curve(
    samples: Callable[[], Iterable[Sample]], limit: float = max(LIMITS), group: Group | None = None
) -> SPROCurve:
    """The exact curve of mean sPRO over FPR, up to FPR `limit` (beyond it the curve is not computed).

    samples: called twice, each time giving all images; so maps can be read or up-sampled one at a time. group: the
    processes that call this together, each with its own images (or none); all get the same curve. None: this one alone.
    Raises ValueError when there is no region, no normal pixel, a size that does not fit or a score that is not finite.
    """
    group = group or Group(alone=True)
    scores, weights = [np.zeros(0, dtype=np.float32)], [np.zeros(0)]
    histogram = np.zeros(1 << 16, dtype=np.int64)
    images = found = 0
    for images, (anomaly_map, regions) in enumerate(samples(), start=1):
        anomaly_map, normal = _checked(anomaly_map, regions, images)
        found += len(regions)
        for region in regions:
            inside = anomaly_map[region.pixels]
            highest = np.partition(inside, inside.size - region.saturation_area)[-region.saturation_area :]
            scores.append(highest)
            weights.append(np.full(highest.size, 1.0 / region.saturation_area))
        histogram += np.bincount((float_to_key(normal) >> PAGE) + (1 << 15), minlength=histogram.size)
    histogram = group.sum(histogram)
    total = int(histogram.sum())
    images, found = group.sum(np.array([images, found], dtype=np.int64)).tolist()
    if not found:
        raise ValueError("no region in any image: sPRO is the mean over regions and is not defined")
    if total == 0:
        raise ValueError("no normal pixel in any image: the false positive rate is not defined")

    # Lowest key that can matter: at its bin's lower edge the FPR has reached the limit.
    at_or_above = histogram[::-1].cumsum()[::-1]
    edge = (int(np.flatnonzero(at_or_above >= limit * total)[-1]) - (1 << 15)) << PAGE if limit < 1 else LOWEST
    all_scores, all_weights = (np.concatenate(group.gather(np.concatenate(part))) for part in (scores, weights))
    order = np.lexsort((all_weights, all_scores))  # sums in one order, whichever process had which image
    order = order[float_to_key(all_scores[order]) >= edge]
    u, inverse = np.unique(all_scores[order], return_inverse=True)
    weight = np.bincount(inverse.ravel(), weights=all_weights[order] / found, minlength=u.size)

    above, at_least = np.zeros(u.size + 1, dtype=np.int64), np.zeros(u.size + 1, dtype=np.int64)
    for number, (anomaly_map, regions) in enumerate(samples(), start=1):
        _, normal = _checked(anomaly_map, regions, number)
        relevant = np.sort(normal[float_to_key(normal) >= edge])
        at_least += np.bincount(np.searchsorted(u, relevant, side="right"), minlength=u.size + 1)
        above += np.bincount(np.searchsorted(u, relevant, side="left"), minlength=u.size + 1)
    above, at_least = group.sum_all([above, at_least])
    # Bin i holds the normal scores that i of the ascending u do not exceed; u[j] is reached by bins j + 1 and up.
    at_least, above = at_least[::-1].cumsum()[:-1], above[::-1].cumsum()[:-1]  # now for u descending
    cumulative = np.minimum(weight[::-1].cumsum(), 1.0)
    fpr = np.concatenate([[0.0], np.stack([above, at_least], axis=1).ravel() / total])
    spro = np.concatenate([[0.0], np.stack([np.append(0.0, cumulative)[: u.size], cumulative], axis=1).ravel()])
    return SPROCurve(fpr, spro, float(limit), found, images)


def au_spro(samples: Callable[[], Iterable[Sample]], limit: float = 0.05) -> float:
    """AU-sPRO up to one FPR limit; see `spro_curve`."""
    return spro_curve(samples, limit).area(limit)


def _checked(anomaly_map: np.ndarray, regions: Sequence[Region], number: int) -> tuple[np.ndarray, np.ndarray]:
    """(the map as float32, its normal pixels (N,)) of image `number`, counted from 1."""
    anomaly_map = np.asarray(anomaly_map, dtype=np.float32)
    if anomaly_map.ndim != 2:
        raise ValueError(f"image {number}: the anomaly map has shape {anomaly_map.shape}, expected (H, W)")
    if not np.isfinite(anomaly_map).all():
        raise ValueError(f"image {number}: the anomaly map holds NaN or infinity")
    if not regions:
        return anomaly_map, anomaly_map.ravel()
    for region in regions:
        if region.pixels.shape != anomaly_map.shape:
            raise ValueError(f"image {number}: a region is {region.pixels.shape}, the anomaly map {anomaly_map.shape}")
        if not 1 <= region.saturation_area <= region.pixels.sum():
            raise ValueError(
                f"image {number}: a region of {int(region.pixels.sum())} pixels has saturation area "
                f"{region.saturation_area}; it must lie between 1 and the region's area"
            )
    return anomaly_map, anomaly_map[~np.logical_or.reduce([region.pixels for region in regions])]
