"""All pixel metrics of several categories, each for itself and pooled, from their stored maps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .counting import PAGE_BITS, RankTable, Workspace, first_of_each, kernels, key_order
from .ranking import Ranking
from .store import HIGHEST, LOWEST, Category, DeviceMaps
from .sync import Group

CHUNK_PIXELS = 1 << 19  # pixels per task where the order of the work is free
WINDOW = (1 << 16, 64)  # distinct anomalous scores and pages: at most 1.5 MB, about the cache of a core
STRETCH_KEYS = 5 << 17  # distinct anomalous scores in the windows of a stretch: about 40 bytes each
DEVICE_WINDOW = (1 << 22, 1 << 12)  # on an accelerator a window costs a sort of all maps
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # distinct keys ascending, how often each occurs, region weights
Window = tuple[int, int, int]  # keys [low, high), and at most how many distinct anomalous ones


def default_threads(compiled: bool) -> int:
    """Threads to use: with the compiled loops the cores this process may run on, at most 4, otherwise one.

    The loops of numpy are many short calls, which threads delay more than they share.
    """
    if not compiled:
        return 1
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


def windows(histogram: np.ndarray, most_keys: int, most_pages: int) -> list[Window]:
    """Windows, descending, that cover the key axis down to the page of the lowest anomalous score.

    histogram: int64 (65536,), anomalous pixels by the page of their key (page 0 = the lowest). A window holds at most
    `most_keys` distinct anomalous scores on at most `most_pages` pages, or is a single page.
    """
    result: list[Window] = []
    high, top, keys, low = HIGHEST, None, 0, HIGHEST
    for page in np.flatnonzero(histogram)[::-1].tolist():
        distinct = min(int(histogram[page]), 1 << PAGE_BITS)
        if top is not None and (keys + distinct > most_keys or top - page + 1 > most_pages):
            result.append((low, high, keys))
            high, top, keys = low, None, 0
        top = page if top is None else top
        low, keys = (page << PAGE_BITS) + LOWEST, keys + distinct
    if top is not None:
        result.append((low, high, keys))
    return result


def stretches(all_windows: Sequence[Window], most_keys: int) -> list[list[Window]]:
    """Consecutive windows with at most `most_keys` distinct anomalous scores together (or a single window)."""
    result: list[list[Window]] = []
    for window in all_windows:
        if result and sum(keys for _, _, keys in result[-1]) + window[2] <= most_keys:
            result[-1].append(window)
        else:
            result.append([window])
    return result


@dataclass
class Counted:
    """What a window holds: for each category (2, U) normal pixels at or above and above each key, and how many in all."""

    categories: list[np.ndarray]
    inside: np.ndarray
    pooled: np.ndarray  # (2 * U + 1,) for the keys of all categories together, by slot
    table: RankTable


class PixelEvaluation:
    """Counts the pixels of `categories` (all of them with at least one map in some process).

    limits: FPR limits; group: the processes that share the data; threads: worker threads (None = `default_threads`).
    """

    def __init__(
        self, categories: Sequence[Category], limits: tuple[float, ...], group: Group, threads: int | None
    ) -> None:
        self.categories = list(categories)
        self.group = group
        on_host = sum(c.size(row) for c in categories if not isinstance(c.maps, DeviceMaps) for row in c.scored_rows())
        self.compiled = kernels(on_host)
        self.threads = threads or default_threads(self.compiled is not None)
        self.limits = limits
        self._local = threading.local()

    def run(self, pooled: bool, overlaps: bool) -> tuple[list[PixelResult], PixelResult]:
        """Results per category, and of all categories pooled (whose ranking stays empty unless `pooled`)."""
        totals = self.group.sum(np.array([self._totals(c) for c in self.categories], dtype=np.int64).reshape(-1, 6))
        self.results = [self._result(*row) for row in totals.tolist()]
        self.pooled = self._result(*totals.sum(axis=0).tolist())
        self.wants_pooled = pooled
        self.counts = np.int64 if totals[:, 3].sum() >= 1 << 31 else np.int32
        on_device = np.array([any(isinstance(c.maps, DeviceMaps) for c in self.categories)], dtype=np.int64)
        size = DEVICE_WINDOW if self.group.sum(on_device).any() else WINDOW
        with ThreadPoolExecutor(self.threads) as pool:
            self.map: Callable = pool.map
            counted = np.zeros(len(self.categories), dtype=np.int64)
            for stretch in stretches(windows(self._histogram(), *size), STRETCH_KEYS):
                counted += self._stretch(stretch, counted)
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
            self._local.space = Workspace(self.counts, self.compiled)
        return self._local.space

    def _chunks(self) -> list[tuple[int, np.ndarray]]:
        """(category number, rows) pieces of all maps."""
        return [(number, rows) for number, c in enumerate(self.categories) for rows in c.chunks(CHUNK_PIXELS)]

    def _histogram(self) -> np.ndarray:
        """Anomalous pixels by page. Prepares the maps for counting."""
        histogram, lock = np.zeros(1 << 16, dtype=np.int64), threading.Lock()

        def prepare(task: tuple[int, np.ndarray]) -> None:
            category, rows = self.categories[task[0]], task[1]
            category.prepare(rows, self._space())
            pages = (category.anomalous(rows)[0] >> PAGE_BITS) + (1 << 15)
            found, times = np.unique(pages, return_counts=True)
            with lock:
                histogram[found] += times

        list(self.map(prepare, self._chunks()))
        return self.group.sum(histogram)

    def _collect(self, category: Category, low: int, high: int) -> Found:
        """Distinct anomalous keys in [low, high) of this process, how often each occurs and their region weights."""
        found: Found = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0))
        waiting = [found]
        for rows in category.chunks(CHUNK_PIXELS):
            keys, weights = category.anomalous(rows)
            inside = (keys >= low) & (keys < high)
            keys = keys[inside]
            waiting.append((keys, np.ones(len(keys), dtype=np.int32), weights[inside]))
            if sum(len(keys) for keys, _, _ in waiting) > 2 * len(waiting[0][0]) + CHUNK_PIXELS:
                waiting = [merge(waiting)]
        return merge(waiting)

    def _stretch(self, stretch: list[Window], counted: np.ndarray) -> np.ndarray:
        """Feeds the scores of some windows to the rankings.

        counted: normal pixels of each category above the stretch. Returns the normal pixels of each category in it.
        """
        edges = [*(low for low, _, _ in stretch[::-1]), stretch[0][1]]
        found = list(self.map(lambda c: self._collect(c, edges[0], edges[-1]), self.categories))
        found = self._merge_processes(found)
        cuts = [np.searchsorted(keys, edges) for keys, _, _ in found]
        rows = [c.scored_rows() for c in self.categories]
        bounds = list(self.map(lambda i: self.categories[i].maps.bounds(rows[i], edges), range(len(found))))

        def part(number: int, k: int) -> Found:
            chosen = slice(cuts[number][k], cuts[number][k + 1])
            return tuple(column[chosen] for column in found[number])

        def count(k: int) -> Counted:
            space = self._space()
            keys = [part(number, k)[0] for number in range(len(found))]
            table = RankTable(keys, edges[k])
            pooled = np.zeros(2 * table.size + 1 if self.wants_pooled else 0, dtype=self.counts)
            inside, categories = np.zeros(len(found), dtype=np.int64), []
            for number, category in enumerate(self.categories):
                position = 2 * table.positions(keys[number], space).astype(np.int64)
                window = bounds[number][:, k : k + 2]
                slots = category.maps.count(rows[number], category.of(rows[number]), window, table, space)
                if self.wants_pooled:
                    np.add(pooled, slots, out=pooled)
                inside[number] = slots[0]
                categories.append(np.stack((slots[position + 1], slots[position + 2])).astype(self.counts))
            return Counted(categories, inside, pooled, table)

        order = range(len(stretch) - 1, -1, -1)
        windows_counted = []
        for k, window in zip(order, self._sum_processes(self.map(count, order)), strict=True):
            if self.wants_pooled:
                above = int(counted.sum()) + sum(int(w.inside.sum()) for w in windows_counted)
                self._rank_pooled([part(number, k) for number in range(len(found))], window, above)
            window.pooled = window.table = None
            windows_counted.append(window)

        def rank(number: int) -> None:
            above, false = int(counted[number]), []
            for window in windows_counted:
                false.append(window.categories[number][:, ::-1].astype(np.int64) + above)
                above += int(window.inside[number])
            false_at, false_above = np.concatenate(false, axis=1)
            keys, hits, weights = (column[::-1] for column in found[number])
            self.results[number].ranking.add(keys, hits, false_at, false_above, weights)

        list(self.map(rank, range(len(found))))
        return sum(window.inside for window in windows_counted)

    def _rank_pooled(self, parts: list[Found], window: Counted, above: int) -> None:
        table = window.table
        keys, hits, weights = np.empty(table.size, np.int32), np.zeros(table.size, np.int32), np.zeros(table.size)
        for own_keys, own_hits, own_weights in parts:
            position = table.positions(own_keys, self._space())
            keys[position] = own_keys
            hits[position] += own_hits
            weights[position] += own_weights
        false_at, false_above = window.pooled[1::2], window.pooled[2::2]
        columns = (column[::-1] for column in (keys, hits, false_at, false_above, weights))
        self.pooled.ranking.add(*columns, counted=above)

    def _sum_processes(self, windows_counted: Iterable[Counted]) -> Iterable[Counted]:
        """The counts of all processes, in one message for the windows of a stretch."""
        if self.group.size == 1:
            return windows_counted
        windows_counted = list(windows_counted)
        arrays = [[*w.categories, w.pooled, w.inside.astype(self.counts)] for w in windows_counted]
        sums = iter(self.group.sum_all([array.reshape(-1) for window in arrays for array in window]))
        for window in windows_counted:
            window.categories = [next(sums).reshape(2, -1) for _ in window.categories]
            window.pooled, window.inside = next(sums), next(sums).astype(np.int64)
        return windows_counted

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

    def _overlaps(self) -> None:
        pooled = self.pooled.ranking
        flat = np.zeros((len(self.categories), 5 if self.wants_pooled else 3, 4))

        def measure(task: tuple[int, np.ndarray]) -> np.ndarray:
            number, rows = task
            own = self.results[number].ranking
            thresholds = [LOWEST, own.best_sum.key, own.best_f1.key]
            if self.wants_pooled:
                thresholds += [pooled.best_sum.key, pooled.best_f1.key]
            return overlaps(self.categories[number], rows, thresholds)

        chunks = self._chunks()
        for (number, _), sums in zip(chunks, self.map(measure, chunks), strict=True):
            flat[number] += sums  # in the order of the images, whichever thread was first: the same bits every time
        flat = self.group.sum(flat)
        for number, result in enumerate(self.results):
            result.at_all, result.at_sum, result.at_f1 = (Overlap(*flat[number, k]) for k in range(3))
        if self.wants_pooled:
            whole = flat.sum(axis=0)
            self.pooled.at_all, self.pooled.at_sum, self.pooled.at_f1 = (Overlap(*whole[k]) for k in (0, 3, 4))


def overlaps(category: Category, rows: np.ndarray, thresholds: Sequence[int]) -> np.ndarray:
    """float64 (thresholds, 4): sums over the images `rows` of Dice and IoU, and of both over those with a mask.

    The prediction is key >= threshold. An image whose mask is empty has Dice and IoU 1 if nothing is predicted, else 0.
    """
    regions = category.of(rows)
    keys = category.maps.anomalous(rows, regions)
    sizes = np.array([found.pixels for found in regions], dtype=np.int64)
    ends = np.cumsum(sizes)
    false = category.maps.false_above(rows, regions, thresholds)
    sums = np.zeros((len(thresholds), 4))
    for t, threshold in enumerate(thresholds):
        hits = np.concatenate(([0], np.cumsum(keys >= threshold)))
        both = hits[ends] - hits[ends - sizes]
        predicted = both + false[:, t]
        empty, nothing = sizes == 0, predicted == 0
        dice = 2 * both / np.where(empty, 1, predicted + sizes)
        iou = both / np.where(empty, 1, predicted + sizes - both)
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
