"""Images that a program hands over -> what a network gets, by a run's own rules, as if they were read from files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.dataset import UNKNOWN, Row, normalise, normalised_levels
from datamodules.errors import DataError
from datamodules.images import MAX_MEGAPIXELS, centre, check_resize, pil_pixels, read_image, resize_image
from datamodules.prediction import depth_of
from datamodules.tiled import TiledPhotograph
from datamodules.tiling import TileConfig

OneImage: TypeAlias = Tensor | Image.Image | str | os.PathLike
Images: TypeAlias = OneImage | Sequence[OneImage]
"""A batch (B, 3, H, W), or one image or a list of images: a tensor (3, H, W), a PIL image, or the path of a file."""


@dataclass(frozen=True)
class Preparation:
    """A run's rules for images.

    Args:
        size: (height, width) that the network takes.
        resize: Name of the resize, see `datamodules.images.RESIZES`.
        mean, std: Of the normalisation, for pixels in [0, 1].
        bit_depth: Significant bits of 16-bit images; None infers them from those of a call, as `predict` does.
        max_megapixels: Larger image files are refused.
        crop_from: (height, width) to resize to before the centre of `size` is kept; None resizes to `size`.
        tiles: How photographs are cut; None: each is one image.
    """

    size: tuple[int, int]
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bit_depth: int | None = None
    max_megapixels: float = MAX_MEGAPIXELS
    crop_from: tuple[int, int] | None = None
    tiles: TileConfig | None = None

    def __post_init__(self) -> None:
        check_resize(self.resize)

    def batches(self, images: Images, batch_size: int) -> Iterator[Tensor]:
        """The images, resized and normalised: float32 (up to batch_size, 3, *size).

        Raises:
            DataError: no image, a file that cannot be read, or a tensor of another shape, type or range; says which.
        """
        levels = normalised_levels(self.mean, self.std)
        for part in self.resized(images, batch_size):
            yield torch.stack([normalise(pixels.numpy(), levels) for pixels in part])

    def photographs(self, images: Images, at_once: int) -> Iterator[TiledPhotograph]:
        """The images one by one, each cut into `tiles`, which are scored `at_once` at a time.

        Raises:
            DataError: as `batches`.
        """
        levels = normalised_levels(self.mean, self.std)
        for pixels in self._whole(images):
            yield TiledPhotograph(pixels, self.tiles, self.size, self.resize, levels, at_once)

    def resized(self, images: Images, batch_size: int) -> Iterator[Tensor]:
        """The images at the size of the run: uint8 (up to batch_size, *size, 3), RGB.

        Raises:
            DataError: as `batches`.
        """
        whole = self._whole(images)
        while part := list(itertools.islice(whole, batch_size)):
            resized = (resize_image(pixels, self.crop_from or self.size, self.resize) for pixels in part)
            yield torch.from_numpy(np.stack([centre(image, self.size) for image in resized]))

    def _whole(self, images: Images) -> Iterator[np.ndarray]:
        """Each image at its own size, uint8 (H, W, 3), RGB."""
        if isinstance(images, Tensor) and images.ndim == 4:
            images = list(images)
        images = [images] if isinstance(images, OneImage) else list(images)
        if not images:
            raise DataError("No image is given.")
        paths = [os.fspath(image) for image in images if isinstance(image, str | os.PathLike)]
        rows = [Row(number, "", "", UNKNOWN, "unknown", path, ()) for number, path in enumerate(paths)]
        depth = self.bit_depth or depth_of(rows, None, self.max_megapixels).get("")
        for number, image in enumerate(images):
            yield self._pixels(image, f"image {number}", depth)

    def _pixels(self, image: OneImage, name: str, depth: int | None) -> np.ndarray:
        """uint8 (H, W, 3), RGB, in the image's own size."""
        if isinstance(image, Tensor):
            return _tensor_pixels(image, name)
        if isinstance(image, Image.Image):
            return pil_pixels(image, name, depth)
        if isinstance(image, str | os.PathLike):
            return read_image(os.fspath(image), depth, self.max_megapixels)
        raise DataError(
            f"{name} is a {type(image).__name__}; give a tensor (3, H, W), a PIL image or the path of a file "
            "(an array: torch.from_numpy(array).permute(2, 0, 1))."
        )


def _tensor_pixels(image: Tensor, name: str) -> np.ndarray:
    """uint8 (3, H, W), or floats in [0, 1], which are rounded to the 256 levels of a file -> uint8 (H, W, 3)."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(f"{name} is a tensor of shape {tuple(image.shape)}; give (3, H, W), or a batch (B, 3, H, W).")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise DataError(
                f"{name} has values from {low:g} to {high:g}; floats are in [0, 1], not normalised: the run's own "
                "normalisation is applied. Values up to 255 belong into uint8."
            )
        image = (image.float() * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise DataError(f"{name} is {image.dtype}; give uint8 (0 to 255) or floats in [0, 1].")
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
