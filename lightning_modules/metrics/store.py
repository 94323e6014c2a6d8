"""Where the maps of one category wait for the evaluation: in memory, in a file or on the accelerator."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .counting import float_to_key
from .regions import Regions, expand_runs


class MemoryMaps:
    """Maps as int32 keys, 4 bytes per pixel, one array per `append`."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._block: list[int] = []  # row -> block
        self._row: list[int] = []  # row -> row of the block

    def append(self, maps: np.ndarray) -> None:
        """Keep maps (float32 (B, H, W)) as the next B rows."""
        self._block.extend([len(self._blocks)] * len(maps))
        self._row.extend(range(len(maps)))
        self._blocks.append(float_to_key(maps.reshape(len(maps), -1)))

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Keys (int32 (H * W,)) of each of the rows."""
        return [self._blocks[self._block[r]][self._row[r]] for r in rows]


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
    highest: list[int] = field(default_factory=list)  # highest key per map row
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
        sizes = np.array([self.size(r) for r in rows])
        number = (np.cumsum(sizes) - sizes) // max(pixels - int(sizes.max()), 1)
        return np.split(rows, np.flatnonzero(np.diff(number)) + 1)

    def size(self, row: int) -> int:
        """Pixels of a map row."""
        height, width = self.regions[row].shape
        return height * width

    def anomalous(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (int32) and region weights (float64, 1 / area of the pixel's region) of the anomalous pixels."""
        keys, weights = [], []
        for row, values in zip(rows, self.maps.read(rows), strict=True):
            regions = self.regions[row]
            if len(regions.starts):
                keys.append(values[regions.index()])
                weights.append(np.repeat((1.0 / regions.areas)[regions.labels], regions.lengths))
        if not keys:
            return np.zeros(0, dtype=np.int32), np.zeros(0)
        return np.concatenate(keys), np.concatenate(weights)
