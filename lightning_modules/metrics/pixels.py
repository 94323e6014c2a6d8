"""All pixel metrics of several categories, each for itself and pooled, from their sorted maps.

The metrics need, at every distinct score of an anomalous pixel, how many normal pixels score at least and more than that
(see `ranking`). The maps are sorted one by one when they arrive. Here the axis of scores is worked through from above in
stretches of a few million pixels: what the maps of a category hold of a stretch is joined and sorted, the anomalous
scores are looked up in it, and what all categories hold, sorted again, gives the pooled counts. Counts add up over
processes; of the scores only those of anomalous pixels are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import numpy as np

from .keys import HIGHEST, LOWEST
from .ranking import Ranking
from .store import Category, pack, unpack
from .sync import Group

STRETCH = 1 << 21  # pixels; more where there would be more than STRETCHES of them
STRETCHES = 64
BELOW, NORMAL, ABOVE = 0, 1, 2  # what is sorted in a stretch: places just below and above a score, and normal pixels
SPAN = 1 << 30  # keys of a stretch at most, as two bits are for the kind
SAMPLES = 64  # keys of each map from which the edges of the stretches are chosen


@dataclass
class Overlap:
    """Sums over images of Dice and IoU at one threshold."""

    dice: float = 0.0
    iou: float = 0.0
    dice_anomalous: float = 0.0
    iou_anomalous: float = 0.0


@dataclass
class PixelResult:
    """Pixel ranking of one group of images (a category or several pooled) and its overlaps at thresholds.

    images: those with a mask; labelled: those of them that are labelled anomalous; anomalous: those whose mask is not
    empty. at_sum, at_f1, at_all: overlaps at the precision + recall threshold, at the F1 threshold and when everything
    is predicted.
    """

    images: int
    labelled: int
    anomalous: int
    ranking: Ranking
    at_sum: Overlap = field(default_factory=Overlap)
    at_f1: Overlap = field(default_factory=Overlap)
    at_all: Overlap = field(default_factory=Overlap)


@dataclass
class Scores:
    """Distinct anomalous scores. keys: int32 (U,) ascending; hits: int64 (U,), pixels; weights: (U,), sums of 1 / area."""

    keys: np.ndarray
    hits: np.ndarray
    weights: np.ndarray

    @staticmethod
    def of(packed: np.ndarray) -> Scores:
        """Of packed keys and areas (int64 (A,)), which are sorted in place."""
        packed.sort()
        keys, areas = unpack(packed)
        first = np.flatnonzero(np.diff(keys, prepend=int(LOWEST)))  # where a new key begins: none is LOWEST
        if not len(first):
            return Scores(np.zeros(0, dtype=np.int32), first, np.zeros(0))
        hits = np.diff(first, append=len(keys))
        return Scores(keys[first].astype(np.int32), hits, np.add.reduceat(1.0 / areas, first))


class CutMaps:
    """The maps of one category, cut at the edges (int32 (E,), ascending) of the stretches."""

    def __init__(self, category: Category, edges: np.ndarray) -> None:
        self.edges = edges
        counted = set(category.counted())
        self.rows = [row for number, row in enumerate(category.maps.read()) if number in counted]
        self._first = self._cut([row.normal for row in self.rows], "left")
        self._after = self._cut([row.normal for row in self.rows], "right")
        self._anomalous = self._cut([row.anomalous for row in self.rows], "left")

    def _cut(self, parts: list[np.ndarray], side: Literal["left", "right"]) -> np.ndarray:
        cuts = [np.searchsorted(part, self.edges, side) for part in parts]
        return np.array(cuts, dtype=np.int32).reshape(len(parts), len(self.edges))

    def inside(self) -> np.ndarray:
        """int64 (E - 1,): normal pixels of each stretch."""
        return np.diff(self._first.sum(axis=0, dtype=np.int64))

    def ties(self, k: int) -> int:
        """Normal pixels at the lower edge of stretch `k`: not among `normal`, as there may be very many of them."""
        return int((self._after[:, k] - self._first[:, k]).sum(dtype=np.int64))

    def normal(self, k: int) -> np.ndarray:
        """uint32 (n,): marks of the other normal pixels of stretch `k`, in no order."""
        starts, ends = self._after[:, k].tolist(), self._first[:, k + 1].tolist()
        parts = [row.normal[a:b] for row, a, b in zip(self.rows, starts, ends, strict=True)]
        return mark(np.concatenate(parts), self.edges[k], NORMAL) if parts else np.zeros(0, dtype=np.uint32)

    def anomalous(self, k: int) -> np.ndarray:
        """int64 (n,): packed keys and areas of the anomalous pixels of stretch `k`, in no order."""
        starts, ends = self._anomalous[:, k].tolist(), self._anomalous[:, k + 1].tolist()
        found = [(r.anomalous[a:b], r.areas[a:b]) for r, a, b in zip(self.rows, starts, ends, strict=True) if a < b]
        return pack(*map(np.concatenate, zip(*found, strict=True))) if found else np.zeros(0, dtype=np.int64)

    def overlaps(self, thresholds: Sequence[int]) -> np.ndarray:
        """float64 (thresholds, 4): sums over the images of Dice and IoU, and of both over those with a mask.

        The prediction is key >= threshold. An image whose mask is empty has Dice and IoU 1 if nothing is predicted,
        else 0.
        """
        keys = np.array(thresholds, dtype=np.int32)
        shape = (len(self.rows), len(keys))
        both = np.array([len(r.anomalous) - np.searchsorted(r.anomalous, keys) for r in self.rows]).reshape(shape)
        false = np.array([len(r.normal) - np.searchsorted(r.normal, keys) for r in self.rows]).reshape(shape)
        sizes = np.array([len(r.anomalous) for r in self.rows], dtype=np.int64).reshape(-1, 1)
        empty, predicted = sizes == 0, both + false
        dice = 2 * both / np.where(empty, 1, predicted + sizes)
        iou = both / np.where(empty, 1, predicted + sizes - both)
        normal = (empty & (predicted == 0)).sum(axis=0)
        dice, iou = dice.sum(axis=0), iou.sum(axis=0)
        return np.stack((dice + normal, iou + normal, dice, iou), axis=1)


def evaluate_pixels(
    categories: Sequence[Category],
    limits: tuple[float, ...],
    group: Group,
    pooled: bool,
    overlaps: bool,
    threads: int,
) -> tuple[list[PixelResult], PixelResult]:
    """Results per category, and of all categories pooled (whose ranking stays empty unless `pooled`).

    limits: FPR limits; group: the processes that share the data; overlaps: also the overlaps; threads: workers.
    """
    totals = group.sum(np.array([c.totals() for c in categories], dtype=np.int64).reshape(-1, 6))
    results = [_result(limits, *row) for row in totals.tolist()]
    whole = _result(limits, *totals.sum(axis=0).tolist())
    rankings = [result.ranking for result in (*results, whole)]
    edges = _edges(categories, group, int(totals[:, 3].sum()))
    with ThreadPoolExecutor(threads) as pool:
        cuts = list(pool.map(lambda c: CutMaps(c, edges), categories))
        inside = group.sum(np.array([cut.inside() for cut in cuts]).reshape(len(cuts), len(edges) - 1))
        above = inside[:, ::-1].cumsum(axis=1)[:, ::-1] - inside  # normal pixels above each stretch
        for k in range(len(edges) - 2, -1, -1):
            scores = _scores([cut.anomalous(k) for cut in cuts], group, pooled)
            if not any(len(s.keys) for s in scores):
                continue
            normal = list(pool.map(lambda cut, k=k: [cut.normal(k)], cuts))
            ties = [cut.ties(k) for cut in cuts]
            if pooled:
                normal.append([part for parts in normal for part in parts])
                ties.append(sum(ties))
            counts = list(pool.map(_count, scores, normal, ties, repeat(edges[k])))
            sums = group.sum_all([count.reshape(-1) for count in counts])
            higher = [*above[:, k].tolist(), int(above[:, k].sum())]
            for ranking, own, over, count in zip(rankings, scores, higher, sums, strict=False):
                at, higher_than = count.reshape(2, -1)[:, ::-1] + over
                ranking.add(own.keys[::-1], own.hits[::-1], at, higher_than, own.weights[::-1])
        if overlaps:
            _overlaps(cuts, results, whole, group, pooled)
    return results, whole


def _result(
    limits: tuple[float, ...], images: int, labelled: int, anomalous: int, pixels: int, positives: int, regions: int
) -> PixelResult:
    return PixelResult(images, labelled, anomalous, Ranking(positives, pixels - positives, regions, limits))


def _edges(categories: Sequence[Category], group: Group, pixels: int) -> np.ndarray:
    """int32 (E,): edges of stretches that hold about the same number of pixels of all processes.

    At most the pixels at the lower edge itself are more than that.
    """
    parts = [part for c in categories for row in c.maps.read() for part in (row.normal, row.anomalous)]
    own = [part[:: max(1, len(part) // SAMPLES)] for part in parts] or [np.zeros(0, dtype=np.int32)]
    samples = np.sort(np.concatenate(group.gather(np.concatenate(own))))
    stretches = min(STRETCHES, max(1, pixels // STRETCH))
    chosen = samples[:: max(1, -(-len(samples) // stretches))]
    return np.unique(np.concatenate((np.array([LOWEST, -SPAN, 0, SPAN, HIGHEST]), chosen)).astype(np.int32))


def _scores(own: list[np.ndarray], group: Group, pooled: bool) -> list[Scores]:
    """The anomalous scores of all processes, per category, from those of this one (packed, in any order).

    If `pooled`, those of all categories together are the last.
    """
    lengths = group.gather(np.array([len(part) for part in own], dtype=np.int64))
    received = group.gather(np.concatenate([np.zeros(0, dtype=np.int64), *own]))
    parts = [np.split(part, np.cumsum(n)[:-1]) for part, n in zip(received, lengths, strict=True)]
    packed = [np.concatenate(same) for same in zip(*parts, strict=True)]
    if pooled:
        packed.append(np.concatenate(received))
    return [Scores.of(part) for part in packed]


def mark(keys: np.ndarray, edge: np.int32, kind: int) -> np.ndarray:
    """uint32 (n,): numbers that sort by key, then by kind (`BELOW`, `NORMAL`, `ABOVE`). edge: of the stretch."""
    marks = keys.view(np.uint32) - edge.view(np.uint32)
    marks <<= 2
    marks |= kind
    return marks


def _count(scores: Scores, normal: list[np.ndarray], ties: int, edge: np.int32) -> np.ndarray:
    """int64 (2, U): normal pixels of a stretch at or above each score, and above it.

    normal: marks of all but those at the lower edge, which are `ties` more. They are sorted together with a mark below
    and one above each score: how many normal pixels lie below a mark is its place less the marks before it.
    """
    marks = np.concatenate((*normal, mark(scores.keys, edge, BELOW), mark(scores.keys, edge, ABOVE)))
    marks.sort()
    marks &= NORMAL
    places = np.flatnonzero(marks == 0)
    counts = sum(map(len, normal)) - (places - np.arange(len(places))).reshape(-1, 2).T
    counts[0, scores.keys == edge] += ties
    return counts


def _overlaps(cuts: list[CutMaps], results: list[PixelResult], whole: PixelResult, group: Group, pooled: bool) -> None:
    """Fill in the overlaps of the results at the thresholds of their rankings."""
    shared = [whole.ranking.best_sum.key, whole.ranking.best_f1.key] if pooled else []
    thresholds: list[list[Any]] = [[LOWEST, r.ranking.best_sum.key, r.ranking.best_f1.key, *shared] for r in results]
    found = [cut.overlaps(keys) for cut, keys in zip(cuts, thresholds, strict=True)]
    sums = group.sum(np.array(found).reshape(len(results), 3 + len(shared), 4))
    for result, own in zip(results, sums, strict=True):
        result.at_all, result.at_sum, result.at_f1 = (Overlap(*own[i]) for i in range(3))
    if pooled:
        total = sums.sum(axis=0)
        whole.at_all, whole.at_sum, whole.at_f1 = (Overlap(*total[i]) for i in (0, 3, 4))
