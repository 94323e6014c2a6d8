"""What is kept of the images of one category until their metrics are computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from .keys import HIGHEST
from .regions import Regions


class MapRow(NamedTuple):
    """One map, sorted. int32: normal keys (N,) ascending; anomalous keys (A,) ascending; areas (A,) of their regions."""

    normal: np.ndarray
    anomalous: np.ndarray
    areas: np.ndarray


def sort_map(keys: np.ndarray, found: Regions) -> np.ndarray:
    """int32 (pixels + A,): the parts of a `MapRow`, one after the other, from the keys (pixels,) of a map in C order."""
    index = found.index()
    end, normal = len(keys), len(keys) - len(index)
    row = np.empty(end + len(index), dtype=np.int32)
    row[:end] = keys
    row[index] = HIGHEST
    row[:end].sort()
    if len(index):
        areas = np.repeat(found.areas[found.labels], found.lengths)
        packed = np.sort(pack(keys[index], areas))
        row[normal:end], row[end:] = unpack(packed)
    return row


def pack(keys: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """int64 (A,): anomalous keys with the areas of their regions, to be sorted by key, then by area."""
    return (keys.astype(np.int64) << 32) | areas


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and areas, int64 (A,)."""
    return packed >> 32, packed & 0xFFFFFFFF


class Maps:
    """Sorted maps: 4 bytes per pixel and 4 more per anomalous one, in memory or in a temporary file of `directory`.

    The file disappears with this object. pixels, regions: anomalous pixels and regions of each map.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._rows: list[np.ndarray] = []
        self._file = tempfile.TemporaryFile(dir=directory) if directory is not None else None  # noqa: SIM115
        self._lengths: list[int] = []
        self.pixels: list[int] = []
        self.regions: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def __getstate__(self) -> dict[str, object]:
        if self._file is not None:
            raise TypeError("maps in a temporary file cannot be copied or pickled: keep them in memory for that")
        return self.__dict__

    def append(self, keys: np.ndarray, found: Regions) -> None:
        """Keep one map: keys (int32 (H * W,), not changed) and the anomalous pixels."""
        row = sort_map(keys, found)
        if self._file is None:
            self._rows.append(row)
        else:
            self._file.write(row.data)
        self._lengths.append(len(row))
        self.pixels.append(found.pixels)
        self.regions.append(len(found.areas))

    def size(self, number: int) -> int:
        """Pixels of a map."""
        return self._lengths[number] - self.pixels[number]

    def read(self) -> Iterator[MapRow]:
        """Every map. Those of a file are mapped into memory: only what is used is read."""
        rows = self._rows if self._file is None else np.split(self._mapped(), np.cumsum(self._lengths)[:-1])
        for row, anomalous in zip(rows, self.pixels, strict=True):
            end = len(row) - anomalous
            yield MapRow(row[: end - anomalous], row[end - anomalous : end], row[end:])

    def _mapped(self) -> np.ndarray:
        if self._file is None or not self._lengths:
            return np.zeros(0, dtype=np.int32)
        self._file.flush()
        expected, found = 4 * sum(self._lengths), os.fstat(self._file.fileno()).st_size
        if found < expected:
            raise OSError(f"the temporary file of maps has {found} bytes instead of {expected}: was it truncated?")
        return np.asarray(np.memmap(cast(Any, self._file), dtype=np.int32, mode="r"))


@dataclass
class Category:
    """What is kept of one category: one entry per image, and a map for each image that has a mask."""

    name: str
    dataset: str
    maps: Maps
    ids: list[int] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # map of each image, -1 without a mask
    dropped: set[int] = field(default_factory=set)  # images (positions) that another process counts

    def counted(self) -> list[int]:
        """The maps to count."""
        return [row for i, row in enumerate(self.rows) if row >= 0 and i not in self.dropped]

    def totals(self) -> tuple[int, ...]:
        """Of the maps to count: how many, of images labelled anomalous, with a mask; pixels, anomalous ones, regions."""
        rows, labels = self.counted(), dict(zip(self.rows, self.labels, strict=True))
        pixels = [self.maps.pixels[row] for row in rows]
        sizes, regions = (sum(of(row) for row in rows) for of in (self.maps.size, self.maps.regions.__getitem__))
        return len(rows), sum(labels[r] for r in rows), sum(p > 0 for p in pixels), sizes, sum(pixels), regions
