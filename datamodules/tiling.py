"""Photographs that are larger than a network's input: where they are cut into tiles, and how maps become one map again.

Tiles overlap and are spread evenly, so that all of a photograph is covered and none reaches beyond it. Where tiles overlap,
the weight of each falls linearly towards its edge, and the weights of a pixel add up to one: the stitched map has no seam, a
constant map stays constant, and what one tile alone covers is that tile's own value. With an overlap of 0, tiles that fill a
side exactly blend nothing; others overlap by what is left over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.errors import DataError

LARGEST_OVERLAP = 0.5
"""A pixel then lies in about two tiles per direction at most."""


class Box(NamedTuple):
    """A part of a photograph, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """That part of an array (H, W, ...), not copied."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class TileConfig:
    """How photographs are cut into tiles. Give `grid` or `size`.

    Args:
        grid: (rows, columns) of tiles in every photograph, whatever its size.
        size: Side of a tile, or its (height, width), in pixels of the photograph; a larger photograph has more tiles. A
            photograph that is smaller is one tile in that direction.
        overlap: Share of a tile's side that at least lies in the next tile as well, from 0 to 0.5.
    """

    grid: tuple[int, int] | None = None
    size: int | tuple[int, int] | None = None
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if (self.grid is None) == (self.size is None):
            raise ValueError(
                f"tiles.grid is {self.grid} and tiles.size is {self.size}: give one of them, the rows and columns of a "
                "photograph, or the side of a tile in its pixels."
            )
        size = None if self.size is None else self.pixels()
        for name, pair in (("grid", self.grid), ("size", size)):
            if pair is not None and (len(pair) != 2 or min(pair) < 1):
                raise ValueError(f"tiles.{name} is {pair}; give whole numbers of at least 1.")
        if not 0 <= self.overlap <= LARGEST_OVERLAP:
            raise ValueError(f"tiles.overlap is {self.overlap}; give a share from 0 to {LARGEST_OVERLAP}.")
        object.__setattr__(self, "grid", None if self.grid is None else tuple(self.grid))
        object.__setattr__(self, "size", None if size is None else tuple(size))

    def pixels(self) -> tuple[int, int]:
        """Height and width of `size`."""
        assert self.size is not None
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __str__(self) -> str:
        """For people and records: `tiles of 512x512, overlap 0.25`."""
        rows, columns = self.grid or self.pixels()
        cut = f"{rows} x {columns} tiles" if self.grid else f"tiles of {rows}x{columns}"
        return f"{cut}, overlap {self.overlap:g}"


class Cut(NamedTuple):
    """One direction of a photograph in parts.

    Attributes:
        starts: Where each part begins, ascending.
        extent: Pixels of each part.
        length: Pixels of the photograph.
    """

    starts: tuple[int, ...]
    extent: int
    length: int

    def weights(self) -> list[Tensor]:
        """Of each part at each of its pixels, float32 (extent,); those of a pixel of the photograph add up to one."""
        own, ends = torch.arange(self.extent, dtype=torch.float64) + 0.5, [s + self.extent for s in self.starts]
        ramps = []
        for number, start in enumerate(self.starts):
            ramp = torch.ones(self.extent, dtype=torch.float64)
            if number and (shared := ends[number - 1] - start) > 0:
                ramp = torch.minimum(ramp, own / shared)
            if number + 1 < len(self.starts) and (shared := ends[number] - self.starts[number + 1]) > 0:
                ramp = torch.minimum(ramp, own.flip(0) / shared)
            ramps.append(ramp)
        total = torch.zeros(self.length, dtype=torch.float64)
        for start, ramp in zip(self.starts, ramps, strict=True):
            total[start : start + self.extent] += ramp
        return [
            (ramp / total[start : start + self.extent]).float() for start, ramp in zip(self.starts, ramps, strict=True)
        ]


def cut(length: int, overlap: float, count: int | None = None, extent: int | None = None) -> Cut:
    """Cuts a side of a photograph into `count` parts, or into parts of `extent` pixels.

    Args:
        length: Pixels of the side.
        overlap: Share of a part that at least lies in the next one as well.
        count, extent: One of them.

    Raises:
        DataError: more parts than pixels.
    """
    if count is not None:
        if count > length:
            raise DataError(f"{count} tiles do not fit into {length} pixels: give fewer with tiles.grid.")
        extent = math.ceil(length / (1 + (count - 1) * (1 - overlap)) - 1e-9)
    else:
        extent = min(extent, length)
        step = max(1, math.floor(extent * (1 - overlap) + 1e-9))
        count = 1 + -(-(length - extent) // step)
    last = length - extent
    return Cut(tuple(round(number * last / max(1, count - 1)) for number in range(count)), extent, length)


@dataclass(frozen=True)
class Tiling:
    """The tiles of one photograph, row by row.

    Args:
        size: Its (height, width).
        config: How it is cut.

    Raises:
        DataError: it has fewer pixels than `grid` asks for tiles.
    """

    size: tuple[int, int]
    config: TileConfig

    @cached_property
    def cuts(self) -> tuple[Cut, Cut]:
        """Rows and columns of tiles."""
        grid = self.config.grid or (None, None)
        size = (None, None) if self.config.grid else self.config.pixels()
        down, across = (
            cut(length, self.config.overlap, count, extent)
            for length, count, extent in zip(self.size, grid, size, strict=True)
        )
        return down, across

    @cached_property
    def boxes(self) -> list[Box]:
        """Where the tiles lie."""
        down, across = self.cuts
        return [Box(top, left, down.extent, across.extent) for top in down.starts for left in across.starts]

    @cached_property
    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the rows and of the columns of tiles; a tile's weight at a pixel is their product."""
        return self.cuts[0].weights(), self.cuts[1].weights()


class Canvas:
    """A photograph's map, put together from maps of its tiles.

    Args:
        tiling: The photograph's.
        device: Where the map lies.

    Attributes:
        map: float32, of the photograph's (height, width); finished once every tile was added once.
    """

    def __init__(self, tiling: Tiling, device: torch.device | str = "cpu") -> None:
        self.tiling, self.map = tiling, torch.zeros(tiling.size, device=device)

    def add(self, number: int, values: Tensor) -> None:
        """Adds a tile's map (h, w) by its weights; a map of another size than the tile is resized to it, bilinearly."""
        box, (down, across) = self.tiling.boxes[number], self.tiling.weights
        row, column = divmod(number, len(across))
        values = values.float()
        if values.shape != (box.height, box.width):
            size = (box.height, box.width)
            values = F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        weight = down[row][:, None].to(values.device) * across[column].to(values.device)
        self.map[box.top : box.top + box.height, box.left : box.left + box.width] += weight * values
