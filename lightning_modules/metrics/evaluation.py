"""All pixel metrics of several categories, each for itself and pooled, from their stored maps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .counting import (
    SLICE,
    RankTable,
    Workspace,
    first_of_each,
    key_order,
)
from .ranking import Ranking
from .store import Category, DeviceMaps
from .sync import Group

CHUNK_PIXELS = 1 << 20  # pixels grouped at a time, over all threads: 4 bytes each, and 16 for those in the window
WINDOW_BYTES = 26 << 20  # size of a window: what its rank table and its counts take
KEY_BYTES = 64  # per distinct anomalous score in a window
DEVICE_WINDOW_BYTES = 256 << 20  # on an accelerator a window costs a sort of all maps
PAGE_BYTES = 12 << 10  # per 65,536 keys that a window spans
LOWEST, HIGHEST = -(1 << 31), 1 << 31
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # distinct keys ascending, how often each occurs, region weights


def default_threads() -> int:
    """Threads to use: the cores this process may run on, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


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
    empty. at_sum, at_f1, at_all: overlaps at the
    precision + recall threshold, the F1 threshold and when everything is predicted.
    """

    images: int
    labelled: int
    anomalous: int
    ranking: Ranking
    at_sum: Overlap = field(default_factory=Overlap)
    at_f1: Overlap = field(default_factory=Overlap)
    at_all: Overlap = field(default_factory=Overlap)


def windows(histogram: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of keys, descending, that cover the key axis down to the lowest anomalous score.

    histogram: int64 (65536,), anomalous pixels by the high 16 bits of their key (shifted to be non-negative), that is
    by page. A range takes at most `budget` bytes, or is a single page.
    """
    result: list[tuple[int, int]] = []
    high, top, keys, low = HIGHEST, None, 0, HIGHEST
    for page in np.flatnonzero(histogram)[::-1].tolist():
        distinct = min(int(histogram[page]), 1 << 16)
        if top is not None and (keys + distinct) * KEY_BYTES + (top - page + 1) * PAGE_BYTES > budget:
            result.append((low, high))
            high, top, keys = low, None, 0
        top = page if top is None else top
        low, keys = (page << 16) + LOWEST, keys + distinct
    if top is not None:
        result.append((low, high))
    return result


class PixelEvaluation:
    """Counts the pixels of `categories` (all of them with at least one map in some process).

    limits: FPR limits; group: the processes that share the data; threads: worker threads.
    """

    def __init__(self, categories: Sequence[Category], limits: tuple[float, ...], group: Group, threads: int) -> None:
        self.categories = list(categories)
        self.group = group
        self.threads = threads
        self.limits = limits
        self.chunk_pixels = max(SLICE, CHUNK_PIXELS // threads)
        self._local = threading.local()

    def run(self, pooled: bool, overlaps: bool) -> tuple[list[PixelResult], PixelResult]:
        """Results per category, and of all categories pooled (whose ranking stays empty unless `pooled`)."""
        totals = self.group.sum(np.array([self._totals(c) for c in self.categories], dtype=np.int64).reshape(-1, 6))
        self.results = [self._result(*row) for row in totals.tolist()]
        self.pooled = self._result(*totals.sum(axis=0).tolist())
        self.wants_pooled = pooled
        with ThreadPoolExecutor(self.threads) as pool:
            self.map: Callable = pool.map
            histogram = self.group.sum(sum(self.map(self._histogram, self.categories), np.zeros(1 << 16, np.int64)))
            counted = np.zeros(len(self.categories), dtype=np.int64)
            on_device = np.array([any(isinstance(c.maps, DeviceMaps) for c in self.categories)], dtype=np.int64)
            budget = DEVICE_WINDOW_BYTES if self.group.sum(on_device).any() else WINDOW_BYTES
            for low, high in windows(histogram, budget):
                counted += self._window(low, high, counted)
            if overlaps:
                self._overlaps()
        return self.results, self.pooled

    def _result(
        self, images: int, labelled: int, anomalous: int, pixels: int, positives: int, regions: int
    ) -> PixelResult:
        return PixelResult(images, labelled, anomalous, Ranking(positives, pixels - positives, regions, self.limits))

    @staticmethod
    def _totals(category: Category) -> tuple[int, ...]:
        rows = category.scored_rows()
        labels = {row: label for row, label in zip(category.rows, category.labels, strict=True)}
        found = [category.regions[r] for r in rows]
        return (
            len(rows),
            sum(labels[row] for row in rows),
            sum(bool(len(r.starts)) for r in found),
            sum(category.size(r) for r in rows),
            sum(r.pixels for r in found),
            sum(len(r.areas) for r in found),
        )

    def _space(self) -> Workspace:
        if not hasattr(self._local, "space"):
            self._local.space = Workspace()
        return self._local.space

    def _histogram(self, category: Category) -> np.ndarray:
        histogram = np.zeros(1 << 16, dtype=np.int64)
        for rows in category.chunks(self.chunk_pixels):
            keys = category.anomalous(rows)[0]
            histogram += np.bincount((keys >> 16) + (1 << 15), minlength=1 << 16)
        return histogram

    def _collect(self, category: Category, low: int, high: int) -> Found:
        """Distinct anomalous keys in [low, high) of this process, how often each occurs and their region weights."""
        found: Found = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0))
        waiting = [found]
        for rows in category.chunks(self.chunk_pixels):
            keys, weights = category.anomalous(rows)
            inside = (keys >= low) & (keys < high)
            keys = keys[inside]
            waiting.append((keys, np.ones(len(keys), dtype=np.int32), weights[inside]))
            if sum(len(keys) for keys, _, _ in waiting) > 2 * len(waiting[0][0]) + self.chunk_pixels:
                waiting = [merge(waiting)]
        return merge(waiting)

    def _window(self, low: int, high: int, counted: np.ndarray) -> np.ndarray:
        """Feeds the scores in [low, high) to the rankings. counted: pixels of each category at or above `high`."""
        found = list(self.map(lambda c: self._collect(c, low, high), self.categories))
        found = self._merge_processes(found)
        table = RankTable([keys for keys, _, _ in found], low)
        positions = [table.positions(keys, self._space()) for keys, _, _ in found]
        total = np.zeros(2 * table.size + 1 if self.wants_pooled else 0, dtype=np.int64 if self._many() else np.int32)
        counts = [np.zeros((2, len(keys)), dtype=total.dtype) for keys, _, _ in found]  # at or above, above
        inside = np.zeros(len(found), dtype=np.int64)
        lock = threading.Lock()

        def count(task: tuple[int, list[np.ndarray]]) -> None:
            number, chunks = task
            slots = self.categories[number].maps.count(chunks, low, high, table, self._space())
            position = 2 * positions[number].astype(np.int64)
            with lock:
                counts[number][0] += slots[position + 1]
                counts[number][1] += slots[position + 2]
                inside[number] += slots[0]
                if self.wants_pooled:
                    np.add(total, slots, out=total)

        list(self.map(count, self._tasks()))
        counts = [c.reshape(2, -1) for c in self.group.sum_all([c.reshape(-1) for c in counts])]
        total = self.group.sum(total)
        inside = self.group.sum(inside)

        def rank(number: int) -> None:
            keys, hits, weights = found[number]
            ge, gt = counts[number][:, ::-1]
            self.results[number].ranking.add(
                keys[::-1], hits[::-1], ge, gt, weights[::-1], counted=int(counted[number])
            )

        list(self.map(rank, range(len(found))))
        if self.wants_pooled:
            del counts
            keys = np.empty(table.size, dtype=np.int32)
            hits = np.zeros(table.size, dtype=np.int32)
            weights = np.zeros(table.size)
            for position, (own_keys, own_hits, own_weights) in zip(positions, found, strict=True):
                keys[position] = own_keys
                hits[position] += own_hits
                weights[position] += own_weights
            above = int(counted.sum())
            self.pooled.ranking.add(
                keys[::-1], hits[::-1], total[1::2][::-1], total[2::2][::-1], weights[::-1], counted=above
            )
        return inside

    def _merge_processes(self, found: list[Found]) -> list[Found]:
        """The union over the processes of what each found, per category; the same on all of them."""
        if self.group.size == 1:
            return found
        lengths = self.group.gather(np.array([len(keys) for keys, _, _ in found], dtype=np.int64))
        columns = [self.group.gather(np.concatenate(column)) for column in zip(*found, strict=True)]
        pieces = [
            [np.split(part, np.cumsum(n)[:-1]) for part, n in zip(column, lengths, strict=True)] for column in columns
        ]
        ranks = range(self.group.size)
        return [merge([tuple(column[r][i] for column in pieces) for r in ranks]) for i in range(len(found))]

    def _many(self) -> bool:
        return sum(r.ranking.positives + r.ranking.negatives for r in self.results) >= 1 << 31

    def _tasks(self) -> list[tuple[int, list[np.ndarray]]]:
        """(category number, chunks of rows), largest first: whole categories, or parts of them if they are few."""
        pieces = -(-2 * self.threads // max(len(self.categories), 1)) if len(self.categories) < 2 * self.threads else 1
        tasks = []
        for number, category in enumerate(self.categories):
            chunks = category.chunks(self.chunk_pixels)
            size = min(max(1, -(-len(chunks) // pieces)), (1 << 30) // self.chunk_pixels)  # counts stay below 2^31
            tasks.extend((number, chunks[i : i + size]) for i in range(0, len(chunks), size))
        return sorted(tasks, key=lambda task: -sum(len(rows) for rows in task[1]))

    def _overlaps(self) -> None:
        pooled = self.pooled.ranking

        def measure(number: int) -> np.ndarray:
            category, own = self.categories[number], self.results[number].ranking
            thresholds = [LOWEST, own.best_sum.key, own.best_f1.key]
            if self.wants_pooled:
                thresholds += [pooled.best_sum.key, pooled.best_f1.key]
            parts = (overlaps(category, rows, thresholds) for rows in category.chunks(self.chunk_pixels))
            return sum(parts, np.zeros((len(thresholds), 4)))

        measured = list(self.map(measure, range(len(self.categories))))
        flat = self.group.sum(np.array(measured).reshape(-1, 5 if self.wants_pooled else 3, 4))
        for number, result in enumerate(self.results):
            result.at_all, result.at_sum, result.at_f1 = (Overlap(*flat[number, k]) for k in range(3))
        if self.wants_pooled:
            whole = flat.sum(axis=0)
            self.pooled.at_all, self.pooled.at_sum, self.pooled.at_f1 = (Overlap(*whole[k]) for k in (0, 3, 4))


def overlaps(category: Category, rows: np.ndarray, thresholds: Sequence[int]) -> np.ndarray:
    """float64 (thresholds, 4): sums over the images `rows` of Dice and IoU, and of both over those with a mask.

    The prediction is key >= threshold. An image whose mask is empty has Dice and IoU 1 if nothing is predicted, else 0.
    """
    regions = [category.regions[row] for row in rows]
    keys = category.maps.pick(rows, regions)
    sizes = np.array([r.pixels for r in regions], dtype=np.int64)
    ends = np.cumsum(sizes)
    predicted = category.maps.predicted(rows, thresholds)
    sums = np.zeros((len(thresholds), 4))
    for t, threshold in enumerate(thresholds):
        hits = np.concatenate(([0], np.cumsum(keys >= threshold)))
        both = hits[ends] - hits[ends - sizes]
        empty, nothing = sizes == 0, predicted[:, t] == 0
        either = np.where(empty, 1, predicted[:, t] + sizes - both)
        dice, iou = 2 * both / np.where(empty, 1, predicted[:, t] + sizes), both / either
        normal = float((empty & nothing).sum())
        sums[t] = dice.sum() + normal, iou.sum() + normal, dice.sum(), iou.sum()
    return sums


def merge(found: Sequence[Found]) -> Found:
    """Union of (keys, counts, weights): distinct keys ascending; counts and weights of equal keys are added."""
    keys, hits, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    order = key_order(keys)
    keys = keys[order]
    first = first_of_each(keys)
    if not len(first):
        return keys, hits, weights
    return keys[first], np.add.reduceat(hits[order], first, dtype=np.int32), np.add.reduceat(weights[order], first)
