"""All pixel metrics of several categories, each for itself and pooled, from their stored maps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from .counting import (
    SLICE,
    RankTable,
    SubsetTable,
    Workspace,
    counts_from_slots,
    first_of_each,
    key_order,
)
from .ranking import Ranking
from .store import Category
from .sync import Group

CHUNK_PIXELS = 1 << 20  # pixels grouped at a time, over all threads: 16 bytes each
WINDOW_KEYS = 3 << 18  # distinct anomalous scores handled at a time: about 30 bytes each
WINDOW_PAGES = 1024  # pages of the rank table: 12 kB each
LOWEST, HIGHEST = -(1 << 31), 1 << 31


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

    def add(self, other: Overlap) -> None:
        self.dice += other.dice
        self.iou += other.iou
        self.dice_anomalous += other.dice_anomalous
        self.iou_anomalous += other.iou_anomalous


@dataclass
class PixelResult:
    """Pixel ranking of one group of images (a category or several pooled) and its overlaps at thresholds.

    images: those with a mask; anomalous: those with a mask that is not empty. at_sum, at_f1, at_all: overlaps at the
    precision + recall threshold, the F1 threshold and when everything is predicted.
    """

    images: int
    anomalous: int
    ranking: Ranking
    at_sum: Overlap = field(default_factory=Overlap)
    at_f1: Overlap = field(default_factory=Overlap)
    at_all: Overlap = field(default_factory=Overlap)


def windows(histogram: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [low, high) of keys, descending, that cover the key axis down to the lowest anomalous score.

    histogram: int64 (65536,), anomalous pixels by the high 16 bits of their key (shifted to be non-negative). Each range
    holds at most `WINDOW_KEYS` distinct anomalous scores and `WINDOW_PAGES` pages with one, or is a single page.
    """
    pages = np.flatnonzero(histogram)[::-1]
    result: list[tuple[int, int]] = []
    high, keys, used, low = HIGHEST, 0, 0, HIGHEST
    for page in pages.tolist():
        distinct = min(int(histogram[page]), 1 << 16)
        if used and (keys + distinct > WINDOW_KEYS or used == WINDOW_PAGES):
            result.append((low, high))
            high, keys, used = low, 0, 0
        low = (page << 16) + LOWEST
        keys, used = keys + distinct, used + 1
    if used:
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
        totals = self.group.sum(np.array([self._totals(c) for c in self.categories], dtype=np.int64).reshape(-1, 5))
        self.results = [self._result(*row) for row in totals.tolist()]
        self.pooled = self._result(*totals.sum(axis=0).tolist())
        self.wants_pooled = pooled
        with ThreadPoolExecutor(self.threads) as pool:
            self.map: Callable = pool.map
            histogram = self.group.sum(sum(self.map(self._histogram, self.categories), np.zeros(1 << 16, np.int64)))
            counted = np.zeros(len(self.categories), dtype=np.int64)
            for low, high in windows(histogram):
                counted += self._window(low, high, counted)
            if overlaps:
                self._overlaps()
        return self.results, self.pooled

    def _result(self, images: int, anomalous: int, pixels: int, positives: int, regions: int) -> PixelResult:
        return PixelResult(images, anomalous, Ranking(positives, pixels - positives, regions, self.limits))

    @staticmethod
    def _totals(category: Category) -> tuple[int, int, int, int, int]:
        rows = category.scored_rows()
        found = [category.regions[r] for r in rows]
        return (
            len(rows),
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
        keys = category.anomalous(category.scored_rows())[0]
        return np.bincount((keys >> 16) + (1 << 15), minlength=1 << 16)

    def _collect(self, category: Category, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct anomalous keys in [low, high) of this process, how often each occurs and their region weights."""
        keys, weights = category.anomalous(category.scored_rows())
        inside = (keys >= low) & (keys < high)
        keys, weights = keys[inside], weights[inside]
        order = key_order(keys)
        keys = keys[order]
        first = first_of_each(keys)
        if not len(first):
            return keys, np.zeros(0, dtype=np.int64), np.zeros(0)
        return keys[first], np.diff(np.append(first, len(keys))), np.add.reduceat(weights[order], first)

    def _window(self, low: int, high: int, counted: np.ndarray) -> np.ndarray:
        """Feeds the scores in [low, high) to the rankings. counted: pixels of each category at or above `high`."""
        found = list(self.map(lambda c: self._collect(c, low, high), self.categories))
        found = self.group.merge_counts(found)
        table = RankTable([keys for keys, _, _ in found])
        space = self._space()
        positions = [table.positions(keys, space) for keys, _, _ in found]
        dtype = np.int64 if sum(r.ranking.positives + r.ranking.negatives for r in self.results) > 1 << 30 else np.int32
        pooled_slots = np.zeros(2 * table.size + 1 if self.wants_pooled else 0, dtype=dtype)
        slots = [np.zeros(2 * len(keys) + 1, dtype=dtype) for keys, _, _ in found]
        subsets = [SubsetTable(p, table.size) for p in positions]
        pooled_lock, locks = threading.Lock(), [threading.Lock() for _ in found]

        def count(task: tuple[int, np.ndarray]) -> None:
            number, rows = task
            space = self._space()
            ones = space.ones32 if dtype == np.int32 else space.ones
            grouped = table.group(self._gather(self.categories[number], rows, low, high))
            for start in range(0, len(grouped), SLICE):
                slot = table.slots(grouped[start : start + SLICE], space)
                if self.wants_pooled:
                    with pooled_lock:
                        torch.from_numpy(pooled_slots).index_add_(0, torch.from_numpy(slot), ones[: len(slot)])
                slot = subsets[number].slots(slot, space)
                with locks[number]:
                    torch.from_numpy(slots[number]).index_add_(0, torch.from_numpy(slot), ones[: len(slot)])

        tasks = [(i, rows) for i, c in enumerate(self.categories) for rows in c.chunks(self.chunk_pixels)]
        list(self.map(count, tasks))
        slots = self.group.sum_all(slots)
        pooled_slots = self.group.sum(pooled_slots)
        inside = np.array([s.sum(dtype=np.int64) for s in slots])

        def rank(number: int) -> None:
            keys, hits, weights = found[number]
            ge, gt = counts_from_slots(slots[number], int(counted[number]))
            self.results[number].ranking.add(keys[::-1], hits[::-1], ge[::-1], gt[::-1], weights[::-1])

        list(self.map(rank, range(len(found))))
        if self.wants_pooled:
            keys = np.empty(table.size, dtype=np.int32)
            hits = np.zeros(table.size, dtype=np.int64)
            weights = np.zeros(table.size)
            for position, (own_keys, own_hits, own_weights) in zip(positions, found, strict=True):
                keys[position] = own_keys
                hits[position] += own_hits
                weights[position] += own_weights
            ge, gt = counts_from_slots(pooled_slots, int(counted.sum()))
            self.pooled.ranking.add(keys[::-1], hits[::-1], ge[::-1], gt[::-1], weights[::-1])
        return inside

    @staticmethod
    def _gather(category: Category, rows: np.ndarray, low: int, high: int) -> np.ndarray:
        """A copy of the keys of the rows that lie in [low, high)."""
        parts = category.maps.read(rows)
        if low > LOWEST:
            parts = [p[p >= low] for p in parts]
        if high < HIGHEST:
            parts = [p[p < high] for p in parts]
        return np.concatenate(parts)

    def _overlaps(self) -> None:
        def measure(number: int) -> list[Overlap]:
            category, own = self.categories[number], self.results[number].ranking
            pooled = self.pooled.ranking
            sums = [Overlap() for _ in range(5)]
            for row in category.scored_rows():
                (keys,) = category.maps.read([row])
                regions = category.regions[row]
                inside = keys[regions.index()]
                thresholds = (own.best_sum.key, own.best_f1.key, pooled.best_sum.key, pooled.best_f1.key, LOWEST)
                for total, threshold in zip(sums, thresholds, strict=True):
                    total.add(overlap(keys, inside, threshold, category.highest[row]))
            return sums

        measured = list(self.map(measure, range(len(self.categories))))
        flat = np.array([[[o.dice, o.iou, o.dice_anomalous, o.iou_anomalous] for o in sums] for sums in measured])
        flat = self.group.sum(flat)
        for number, result in enumerate(self.results):
            result.at_sum, result.at_f1, result.at_all = (Overlap(*flat[number, k]) for k in (0, 1, 4))
        pooled = flat.sum(axis=0)
        self.pooled.at_sum, self.pooled.at_f1, self.pooled.at_all = (Overlap(*pooled[k]) for k in (2, 3, 4))


def overlap(keys: np.ndarray, inside: np.ndarray, threshold: int, highest: int) -> Overlap:
    """Dice and IoU of one image whose prediction is `keys >= threshold`; inside: the keys of its anomalous pixels."""
    predicted = int(np.count_nonzero(keys >= threshold)) if highest >= threshold else 0
    if not len(inside):
        empty = float(predicted == 0)
        return Overlap(empty, empty)
    both = int(np.count_nonzero(inside >= threshold)) if predicted else 0
    dice, iou = 2 * both / (predicted + len(inside)), both / (predicted + len(inside) - both)
    return Overlap(dice, iou, dice, iou)
