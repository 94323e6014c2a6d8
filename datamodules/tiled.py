"""Photographs that are scored in tiles: whole in a sample, cut when the network asks for the next few."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.dataset import Row, TableDataset, normalise
from datamodules.errors import DataError
from datamodules.images import resize_image, shown_size
from datamodules.tiling import TileConfig, Tiling


class TiledPhotograph:
    """A photograph whose tiles are cut, resized and normalised when they are asked for, a few at a time.

    Args:
        pixels: uint8 (H, W, 3), RGB, at its own size.
        config: How it is cut.
        size: (height, width) of the network's input.
        resize: Name of the resize, see `datamodules.images.RESIZES`.
        normalised: float32 (3, 256), see `datamodules.dataset.normalised_levels`.
        at_once: Tiles of a chunk.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        config: TileConfig,
        size: tuple[int, int],
        resize: str,
        normalised: np.ndarray,
        at_once: int = 32,
    ) -> None:
        self.pixels, self.size, self.resize, self.normalised, self.at_once = pixels, size, resize, normalised, at_once
        self.tiling = Tiling(pixels.shape[:2], config)
        self.boxes = self.tiling.boxes

    def chunks(self) -> Iterator[tuple[range, Tensor]]:
        """Numbers of up to `at_once` tiles with their images, float32 (B, 3, *size), until all were given."""
        boxes = self.boxes
        for first in range(0, len(boxes), self.at_once):
            numbers = range(first, min(first + self.at_once, len(boxes)))
            tiles = (np.ascontiguousarray(boxes[number].of(self.pixels)) for number in numbers)
            resized = (resize_image(tile, self.size, self.resize) for tile in tiles)
            yield numbers, torch.stack([normalise(tile, self.normalised) for tile in resized])


class PhotographDataset(TableDataset):
    """Samples of whole photographs: `image` is all of one at the network's size, `mask` has its own, and `tiles` cuts it.

    Args:
        rows, source, mean, std: As for `TableDataset`; the source also has `photograph(row)`.
        config: How photographs are cut.
        at_once: Tiles that are scored at a time.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        source: Any,
        mean: Sequence[float],
        std: Sequence[float],
        config: TileConfig,
        at_once: int,
    ) -> None:
        super().__init__(rows, source, mean, std)
        self.config, self.at_once = config, at_once

    def _load(self, row: Row) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        photograph, mask = self.source.photograph(row)
        with _named(row):
            return self._sample(photograph, np.zeros(photograph.shape[:2], bool) if mask is None else mask)

    def _black(self) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        height, width = self.source.size
        if self.config.grid is not None:
            height, width = max(height, self.config.grid[0]), max(width, self.config.grid[1])
        return self._sample(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool))

    def _sample(
        self, photograph: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, TiledPhotograph]]:
        size, resize = self.source.size, self.source.resize
        tiles = TiledPhotograph(photograph, self.config, size, resize, self.normalised, self.at_once)
        return resize_image(photograph, size, resize), mask, {"tiles": tiles}


def tile_rows(rows: Sequence[Row], sizes: Sequence[tuple[int, int]], config: TileConfig) -> list[Row]:
    """A row per tile of photographs of known (height, width); ids count the tiles."""
    found: list[Row] = []
    for row, size in zip(rows, sizes, strict=True):
        with _named(row):
            found += [row._replace(id=len(found) + k, tile=box) for k, box in enumerate(Tiling(size, config).boxes)]
    return found


def check_photographs(rows: Sequence[Row], config: TileConfig) -> None:
    """Checks by file headers that photographs can be cut and that masks have their size, before anything is trained.

    Raises:
        DataError: fewer pixels than tiles, a mask of another size, or a file that is no image.
    """
    for row in rows:
        size = shown_size(row.image_path)
        with _named(row):
            _ = Tiling(size, config).cuts
        for path in row.mask_paths:
            height, width = shown_size(path)
            if (height, width) != size:
                raise DataError(
                    f"{path}: mask is {width} x {height} (width x height), its image {row.image_path} is "
                    f"{size[1]} x {size[0]}. They must have equal size: export the mask again from the image as it is shown."
                )


@contextlib.contextmanager
def _named(row: Row) -> Iterator[None]:
    """Puts the file before what is wrong with its tiles."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.image_path}: {error}") from error
