"""Ground-truth regions: connected components of a mask, kept as runs of pixels.

A run is a horizontal stretch of anomalous pixels. Runs take about 1 % of the memory of the mask, are labelled with one
call for a whole batch of masks, and give the flat indices of the anomalous pixels back without a scan of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Regions:
    """The anomalous pixels of one mask.

    starts, lengths: int32 (R,), flat index of the first pixel of each run (row * width + column) and its length;
    labels: int32 (R,), region of each run, 0..K-1; areas: int64 (K,), pixels of each region; shape: (height, width).
    """

    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    shape: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Number of anomalous pixels."""
        return int(self.lengths.sum(dtype=np.int64))

    def index(self) -> np.ndarray:
        """int64 (pixels,): flat index of every anomalous pixel, run after run."""
        return expand_runs(self.starts, self.lengths)

    def equals(self, mask: np.ndarray) -> bool:
        """Whether these are the pixels of `mask` (bool (H, W)), compared exactly."""
        if mask.shape != self.shape or np.count_nonzero(mask) != self.pixels:
            return False
        return bool(mask.reshape(-1)[self.index()].all())


def expand_runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Flat indices (int64) of the pixels of runs: start, start + 1, ... start + length - 1 for each run in turn."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def find_regions(masks: np.ndarray, connectivity: int = 8) -> list[Regions]:
    """Regions of each mask of a batch.

    masks: bool (B, H, W); connectivity: 8 (pixels touch at edges and corners) or 4 (edges only).
    Returns B `Regions`; a mask without a pixel gives one without runs.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity is 4 or 8, found {connectivity!r}")
    if masks.dtype != np.bool_ or masks.ndim != 3:
        raise ValueError(f"masks must be bool (B, H, W), found {masks.dtype} {masks.shape}")
    B, H, W = masks.shape
    stride = W + 2  # a zero column on both sides keeps the runs of neighbouring rows apart in flat order
    padded = np.zeros((B, H, stride), dtype=bool)
    padded[:, :, 1:-1] = masks
    flat = padded.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, ends = edges[0::2], edges[1::2]
    rows = starts // stride

    # A run touches a run of the row above if they overlap, for 8-connectivity also if they meet at a corner.
    reach = 1 if connectivity == 8 else 0
    first = np.searchsorted(ends, starts - stride + (1 - reach), side="left")
    last = np.searchsorted(starts, ends - stride - (1 - reach), side="right")
    touching = np.where(rows % H == 0, 0, np.maximum(last - first, 0))  # the first row has no row above
    lower = np.repeat(np.arange(len(starts)), touching)
    upper = expand_runs(first, touching)
    graph = coo_array((np.ones(len(lower), dtype=np.int8), (lower, upper)), shape=(len(starts), len(starts)))
    components = connected_components(graph, directed=False)[1] if len(starts) else np.zeros(0, dtype=np.int32)

    lengths = (ends - starts).astype(np.int32)
    images = rows // H
    pixels = ((rows % H) * W + (starts - rows * stride - 1)).astype(np.int32)
    areas = np.bincount(components, weights=lengths).astype(np.int64)
    owners = np.zeros(len(areas), dtype=np.int64)
    owners[components] = images
    order = np.argsort(owners, kind="stable")  # regions image by image, numbered from 0 in each
    firsts = np.searchsorted(owners[order], np.arange(B + 1))
    numbers = np.empty(len(areas), dtype=np.int32)
    numbers[order] = np.arange(len(areas)) - firsts[owners[order]]
    labels, areas = numbers[components], areas[order]
    bounds = np.searchsorted(images, np.arange(B + 1))
    result = []
    for b in range(B):
        run, region = slice(bounds[b], bounds[b + 1]), slice(firsts[b], firsts[b + 1])
        found = (pixels[run].copy(), lengths[run].copy(), labels[run].copy(), areas[region].copy())
        result.append(Regions(*found, shape=(H, W)))
    return result


class RegionCache:
    """Regions by sample id, so that masks are labelled once per data set and not once per evaluation.

    Share one cache between several `AnomalyMetrics` of the same test set (epochs, level variants). A cached entry is
    compared with the mask given and labelled again if they differ, so a cache can never change a number.
    """

    def __init__(self, connectivity: int = 8) -> None:
        if connectivity not in (4, 8):
            raise ValueError(f"connectivity is 4 or 8, found {connectivity!r}")
        self.connectivity = connectivity
        self._regions: dict[int, Regions] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def get(self, ids: Sequence[int] | np.ndarray | None, masks: np.ndarray) -> list[Regions]:
        """Regions of the masks (bool (B, H, W)) of the samples `ids`. Without ids nothing is cached."""
        if ids is None:
            return find_regions(masks, self.connectivity)
        result: list[Any] = [self._regions.get(int(i)) for i in ids]
        known = [found is not None and found.equals(mask) for found, mask in zip(result, masks, strict=True)]
        missing = [b for b, same in enumerate(known) if not same]
        if missing:
            for b, regions in zip(missing, find_regions(masks[missing], self.connectivity), strict=True):
                result[b] = self._regions[int(ids[b])] = regions
        return result
