"""Where the maps of one category wait for the evaluation: in memory, in a file, or on the accelerator."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .counting import RankTable, Workspace
from .regions import Regions, expand_runs

Thresholds = Sequence[int]
Chunks = Sequence[np.ndarray]  # rows in pieces


class MemoryMaps:
    """Maps as int32 keys in memory: 4 bytes per pixel, each pixel once."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self.highest: list[int] = []

    def append(self, keys: np.ndarray) -> None:
        """Keep keys (int32 (B, H * W), not copied) as the next B rows."""
        self._store(keys)
        self.highest.extend(keys.max(axis=1).tolist())

    def _store(self, keys: np.ndarray) -> None:
        self._rows.extend(keys)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Keys (int32 (H * W,)) of each of the rows."""
        return [self._rows[row] for row in rows]

    def pick(self, rows: np.ndarray, regions: Sequence[Regions]) -> np.ndarray:
        """Keys (int32) of the pixels of the regions of each row, row after row."""
        parts = [k[r.index()] for k, r in zip(self.read(rows), regions, strict=True) if len(r.starts)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def predicted(self, rows: np.ndarray, thresholds: Thresholds) -> np.ndarray:
        """int64 (rows, thresholds): pixels of each row with key >= threshold."""
        result = np.zeros((len(rows), len(thresholds)), dtype=np.int64)
        for i, (row, keys) in enumerate(zip(rows, self.read(rows), strict=True)):
            for j, threshold in enumerate(thresholds):
                if self.highest[row] >= threshold:
                    result[i, j] = np.count_nonzero(keys >= threshold)
        return result

    def count(self, chunks: Chunks, low: int, high: int, table: RankTable, space: Workspace) -> np.ndarray:
        """int32 (2 * table.size + 1,): pixels with key in [low, high) that have this slot of the table or a higher."""
        slots = space.slots(2 * table.size + 1)
        for rows in chunks:
            offsets = np.concatenate(self.read(rows)).view(np.uint32)
            np.subtract(offsets, np.uint32(low & 0xFFFFFFFF), out=offsets)  # wraps around below `low`
            if high - low < 1 << 32:
                offsets = offsets[offsets < np.uint32(high - low)]
            table.count(offsets, slots, space)
        running = slots[::-1]
        np.cumsum(running, dtype=np.int32, out=running)
        return slots


class FileMaps(MemoryMaps):
    """Maps as int32 keys in a temporary file, which disappears with this object."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (lives as long as the maps)
        self._places: list[tuple[int, int]] = []  # row -> (first byte, pixels)
        self._end = 0

    def _store(self, keys: np.ndarray) -> None:
        self._file.seek(self._end)
        for row in keys:
            data = memoryview(row).cast("B")
            while len(data):
                data = data[self._file.write(data) :]
            self._places.append((self._end, len(row)))
            self._end += row.nbytes

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Keys (int32 (H * W,)) of each of the rows, from the file."""
        result = []
        for row in rows:
            start, pixels = self._places[row]
            keys = np.empty(pixels, dtype=np.int32)
            data = memoryview(keys).cast("B")
            self._file.seek(start)
            while len(data):
                got = self._file.readinto(data)
                if not got:
                    raise OSError(f"the temporary file of maps ended at byte {start} of {self._end}: was it truncated?")
                data = data[got:]
            result.append(keys)
        return result


class DeviceMaps(MemoryMaps):
    """Maps as int32 keys on an accelerator, where they are sorted and counted; only anomalous keys and counts leave."""

    def append(self, keys: torch.Tensor) -> None:
        """Keep keys (int32 (B, H * W), not copied) as the next B rows."""
        device = self._rows[0].device if self._rows else None
        self._rows.extend(torch.as_tensor(keys, device=device))

    def pick(self, rows: np.ndarray, regions: Sequence[Regions]) -> np.ndarray:
        """Keys (int32, on the CPU) of the pixels of the regions of each row, row after row."""
        chosen = [(self._rows[row], r) for row, r in zip(rows, regions, strict=True) if len(r.starts)]
        if not chosen:
            return np.zeros(0, dtype=np.int32)
        sizes = np.cumsum([0] + [keys.numel() for keys, _ in chosen])
        starts = np.concatenate([r.starts + offset for (_, r), offset in zip(chosen, sizes, strict=False)])
        index = expand_runs(starts, np.concatenate([r.lengths for _, r in chosen]))
        joined = torch.cat([keys for keys, _ in chosen])
        return joined[torch.from_numpy(index).to(joined.device)].cpu().numpy()

    def predicted(self, rows: np.ndarray, thresholds: Thresholds) -> np.ndarray:
        """int64 (rows, thresholds): pixels of each row with key >= threshold."""
        counts = [torch.stack([(self._rows[row] >= t).sum() for t in thresholds]) for row in rows]
        return torch.stack(counts).cpu().numpy()

    def count(self, chunks: Chunks, low: int, high: int, table: RankTable, space: Workspace) -> np.ndarray:
        """int64 (2 * table.size + 1,), as `MemoryMaps.count`, by sorting on the device."""
        ordered = torch.sort(torch.cat([self._rows[row] for rows in chunks for row in rows])).values
        bounds = torch.tensor([low, min(high, (1 << 31) - 1)], dtype=torch.int32, device=ordered.device)
        first, last = torch.searchsorted(ordered, bounds).tolist()
        ordered = ordered[first : last if high < 1 << 31 else None]
        members = torch.from_numpy(table.members()).to(ordered.device)
        running = torch.empty(2 * table.size + 1, dtype=torch.int64, device=ordered.device)
        running[0] = len(ordered)
        running[1::2] = len(ordered) - torch.searchsorted(ordered, members)
        running[2::2] = len(ordered) - torch.searchsorted(ordered, members, right=True)
        return running.cpu().numpy()


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

    def anomalous(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (int32) and region weights (float64, 1 / area of the pixel's region) of the anomalous pixels."""
        regions = [self.regions[row] for row in rows]
        weights = [np.repeat((1.0 / r.areas)[r.labels], r.lengths) for r in regions if len(r.starts)]
        return self.maps.pick(rows, regions), np.concatenate(weights) if weights else np.zeros(0)
