"""Where the maps of one category wait for the evaluation: in memory, in a file, or on the accelerator."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .counting import PAGE_BITS, RankTable, Workspace
from .regions import Regions, expand_runs

COUNTED_TOGETHER = 1 << 18  # pixels of a window that are copied at a time
LOWEST, HIGHEST = -(1 << 31), 1 << 31  # below and above every key


class MemoryMaps:
    """Maps as int32 keys in memory: 4 bytes per pixel, each pixel once.

    `prepare` reorders a row: first its normal pixels, by page, then its anomalous pixels, run after run.
    """

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._addresses: list[int] = []  # of the first key of each row, set by `prepare`: a copy of this lies elsewhere
        self._normal: list[int] = []  # normal pixels of each row, -1 before `prepare`
        self.highest: list[int] = []

    def append(self, keys: np.ndarray) -> None:
        """Keep keys (int32 (B, H * W), not copied if they are contiguous) as the next B rows."""
        self._store(np.ascontiguousarray(keys))
        self._normal.extend([-1] * len(keys))
        self._addresses.extend([0] * len(keys))
        self.highest.extend(keys.max(axis=1).tolist())

    def _store(self, keys: np.ndarray) -> None:
        self._rows.extend(keys)

    def _read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._rows[row][start:stop]

    def _write(self, row: int, keys: np.ndarray) -> None:
        """Keep what was changed in the keys that `_read` gave: here they are the row itself."""

    def _locate(self, row: int) -> None:
        self._addresses[row] = self._rows[row].ctypes.data

    def prepare(self, rows: np.ndarray, regions: Sequence[Regions], space: Workspace) -> None:
        """Reorder the rows, given the anomalous pixels of each. Before every evaluation."""
        for row, found in zip(rows, regions, strict=True):
            if self._normal[row] < 0:
                keys = self._read(row)
                normal = space.arrange(keys, found)
                self._write(row, keys)
                self._normal[row] = normal
            self._locate(row)

    def anomalous(self, rows: np.ndarray, regions: Sequence[Regions]) -> np.ndarray:
        """Keys (int32) of the anomalous pixels of prepared rows, row after row, run after run."""
        parts = [self._read(row, self._normal[row]) for row, found in zip(rows, regions, strict=True) if found.pixels]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def bounds(self, rows: np.ndarray, edges: Sequence[int]) -> np.ndarray:
        """int64 (rows, edges): where in each prepared row the keys >= edge begin.

        edges: ascending, multiples of the page size; only the last one may be `HIGHEST`.
        """
        result = np.empty((len(rows), len(edges)), dtype=np.int64)
        targets = np.array([edge for edge in edges if edge < HIGHEST], dtype=np.int32)
        for i, row in enumerate(rows):
            normal = self._read(row, 0, self._normal[row])
            result[i] = len(normal)
            result[i, : len(targets)] = np.searchsorted(normal, targets)  # the order within a page does not matter
        return result

    def count(
        self, rows: np.ndarray, regions: Sequence[Regions], bounds: np.ndarray, table: RankTable, space: Workspace
    ) -> np.ndarray:
        """(2 * table.size + 1,), in memory of `space`: normal pixels of the window with this slot or a higher one.

        bounds: (rows, 2), the part of each prepared row that lies in the window.
        """
        if space.compiled is None:
            return table.count(self._pieces(rows, bounds), space)
        return table.tally(self._located(rows, bounds), space)

    def _pieces(self, rows: np.ndarray, bounds: np.ndarray) -> Iterator[np.ndarray]:
        """Copies of the keys of a window, many rows at a time."""
        sizes = np.cumsum(bounds[:, 1] - bounds[:, 0])
        for piece in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(sizes // COUNTED_TOGETHER)) + 1):
            if len(piece):
                yield np.concatenate([self._read(rows[i], *bounds[i]) for i in piece])

    def _located(self, rows: np.ndarray, bounds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Addresses (int64) of the keys of a window and how many there are at each, valid until the next ones."""
        first = np.array([self._addresses[row] for row in rows], dtype=np.int64)
        yield first + 4 * bounds[:, 0], bounds[:, 1] - bounds[:, 0]

    def false_above(self, rows: np.ndarray, regions: Sequence[Regions], thresholds: Sequence[int]) -> np.ndarray:
        """int64 (rows, thresholds): normal pixels of each prepared row with key >= threshold."""
        result = np.zeros((len(rows), len(thresholds)), dtype=np.int64)
        pages = [max(t >> PAGE_BITS << PAGE_BITS, LOWEST) for t in thresholds]
        after = [min(p + (1 << PAGE_BITS), HIGHEST - 1) for p in pages]
        for i, row in enumerate(rows):
            normal = self._read(row, 0, self._normal[row])
            start, stop = np.searchsorted(normal, np.array([pages, after], dtype=np.int32))
            for j, t in enumerate(thresholds):
                if self.highest[row] >= t:
                    within = np.count_nonzero(normal[start[j] : stop[j]] >= t)
                    result[i, j] = len(normal) - stop[j] + within
        return result


class FileMaps(MemoryMaps):
    """Maps as int32 keys in a temporary file, which disappears with this object."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (lives as long as the maps)
        self._lock = threading.Lock()
        self._places: list[tuple[int, int]] = []  # row -> (first byte, pixels)
        self._end = 0

    def _store(self, keys: np.ndarray) -> None:
        for row in keys:
            self._places.append((self._end, len(row)))
            self._end += row.nbytes
            self._write(len(self._places) - 1, row)

    def _locate(self, row: int) -> None:
        """Nothing: a row has no address before it is read."""

    def _located(self, rows: np.ndarray, bounds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for keys in self._pieces(rows, bounds):
            yield np.array([keys.ctypes.data], dtype=np.int64), np.array([len(keys)], dtype=np.int64)

    def _write(self, row: int, keys: np.ndarray) -> None:
        data = memoryview(keys).cast("B")
        with self._lock:
            self._file.seek(self._places[row][0])
            while len(data):
                data = data[self._file.write(data) :]

    def _read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        place, pixels = self._places[row]
        keys = np.empty((pixels if stop is None else stop) - start, dtype=np.int32)
        data = memoryview(keys).cast("B")
        with self._lock:
            self._file.seek(place + 4 * start)
            while len(data):
                got = self._file.readinto(data)
                if not got:
                    raise OSError(
                        f"the temporary file of maps ends before byte {place + 4 * pixels}: was it truncated?"
                    )
                data = data[got:]
        return keys


class DeviceMaps(MemoryMaps):
    """Maps as int32 keys on an accelerator, where they are sorted and counted; only anomalous keys and counts leave."""

    def append(self, keys: torch.Tensor) -> None:
        """Keep keys (int32 (B, H * W), not copied) as the next B rows."""
        device = self._rows[0].device if self._rows else None
        self._rows.extend(torch.as_tensor(keys, device=device))

    def prepare(self, rows: np.ndarray, regions: Sequence[Regions], space: Workspace) -> None:
        """Nothing: the rows stay as they are."""

    def anomalous(self, rows: np.ndarray, regions: Sequence[Regions]) -> np.ndarray:
        """Keys (int32, on the CPU) of the anomalous pixels, row after row, run after run."""
        return self._anomalous(rows, regions).cpu().numpy()

    def _anomalous(self, rows: np.ndarray, regions: Sequence[Regions]) -> torch.Tensor:
        joined = torch.cat([self._rows[row] for row in rows])
        offsets = np.cumsum([0] + [self._rows[row].numel() for row in rows])
        starts = np.concatenate([r.starts + offset for r, offset in zip(regions, offsets, strict=False)])
        index = expand_runs(starts, np.concatenate([r.lengths for r in regions]))
        return joined[torch.from_numpy(index).to(joined.device)]

    def bounds(self, rows: np.ndarray, edges: Sequence[int]) -> np.ndarray:
        """int64 (rows, edges): the edges themselves in place of positions."""
        return np.tile(np.array(edges, dtype=np.int64), (len(rows), 1))

    def count(
        self, rows: np.ndarray, regions: Sequence[Regions], bounds: np.ndarray, table: RankTable, space: Workspace
    ) -> np.ndarray:
        """int64 (2 * table.size + 1,), as `MemoryMaps.count`, by sorting on the device. bounds: (rows, 2), keys."""
        if not len(rows):
            return np.zeros(2 * table.size + 1, dtype=np.int64)
        every = torch.sort(torch.cat([self._rows[row] for row in rows])).values
        anomalous = torch.sort(self._anomalous(rows, regions)).values
        return (_running(every, bounds[0], table) - _running(anomalous, bounds[0], table)).cpu().numpy()

    def false_above(self, rows: np.ndarray, regions: Sequence[Regions], thresholds: Sequence[int]) -> np.ndarray:
        """int64 (rows, thresholds): normal pixels of each row with key >= threshold."""
        counts = torch.stack([torch.stack([(self._rows[row] >= t).sum() for t in thresholds]) for row in rows])
        ends = np.cumsum([found.pixels for found in regions])
        anomalous = self.anomalous(rows, regions)
        for j, t in enumerate(thresholds):
            hits = np.concatenate(([0], np.cumsum(anomalous >= t)))
            inside = hits[ends] - hits[np.concatenate(([0], ends[:-1]))]
            counts[:, j] -= torch.from_numpy(inside).to(counts.device)
        return counts.cpu().numpy()


def _running(ordered: torch.Tensor, bounds: np.ndarray, table: RankTable) -> torch.Tensor:
    """int64 (2 * table.size + 1,): how many of the ascending keys within the bounds have this slot or a higher one."""
    limits = np.minimum(bounds, HIGHEST - 1).astype(np.int32)  # no key is that high
    first, last = torch.searchsorted(ordered, torch.from_numpy(limits).to(ordered.device)).tolist()
    ordered = ordered[first:last]
    members = torch.from_numpy(table.members()).to(ordered.device)
    running = torch.empty(2 * table.size + 1, dtype=torch.int64, device=ordered.device)
    running[0] = len(ordered)
    running[1::2] = len(ordered) - torch.searchsorted(ordered, members)
    running[2::2] = len(ordered) - torch.searchsorted(ordered, members, right=True)
    return running


@dataclass
class Category:
    """What is kept of one category: one entry per image, and a map row for each image that has a mask."""

    name: str
    dataset: str
    maps: MemoryMaps
    ids: list[int] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # map row of each image, -1 without a mask
    regions: list[Regions] = field(default_factory=list)  # per map row
    dropped: set[int] = field(default_factory=set)  # images (positions) that another process counts

    def scored_rows(self) -> np.ndarray:
        """Map rows to count, int64."""
        kept = [row for i, row in enumerate(self.rows) if row >= 0 and i not in self.dropped]
        return np.array(kept, dtype=np.int64)

    def chunks(self, pixels: int) -> list[np.ndarray]:
        """The scored rows in pieces of at most `pixels` pixels (at least one row each)."""
        rows = self.scored_rows()
        if not len(rows):
            return []
        sizes = np.array([self.size(row) for row in rows])
        number = (np.cumsum(sizes) - sizes) // max(pixels - int(sizes.max()), 1)
        return np.split(rows, np.flatnonzero(np.diff(number)) + 1)

    def size(self, row: int) -> int:
        """Pixels of a map row."""
        height, width = self.regions[row].shape
        return height * width

    def of(self, rows: np.ndarray) -> list[Regions]:
        """Regions of map rows."""
        return [self.regions[row] for row in rows]

    def prepare(self, rows: np.ndarray, space: Workspace) -> None:
        """Put the rows in the order in which they are counted."""
        self.maps.prepare(rows, self.of(rows), space)

    def anomalous(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (int32) and region weights (float64, 1 / area of the pixel's region) of the anomalous pixels."""
        regions = [found for found in self.of(rows) if len(found.starts)]
        if not regions:
            return np.zeros(0, dtype=np.int32), np.zeros(0)
        weights = [np.repeat((1.0 / found.areas)[found.labels], found.lengths) for found in regions]
        return self.maps.anomalous(rows, self.of(rows)), np.concatenate(weights)
