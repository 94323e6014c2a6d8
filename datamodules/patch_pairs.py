"""Pairs of patches of one image, for networks that learn where patches lie to each other (Patch SVDD).

Yi and Yoon, "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation", ACCV 2020,
https://arxiv.org/abs/2006.16067, and its released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

Clip = Literal["kept", "redraw"]
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""(row, column) in which the second patch of a pair lies, by label."""
NOISE = 0.02
"""Standard deviation of the noise on a patch of a position pair, for pixels in [0, 1]: once per channel, once per number."""
_STREAM = 0x70617463


class Corners(NamedTuple):
    """(row, column) of the upper left corners of two patches."""

    first: tuple[int, int]
    second: tuple[int, int]


def clipped(corner: Sequence[int], side: int, shape: tuple[int, int]) -> tuple[int, int]:
    """The corner moved so far that a patch of `side` pixels lies in an image of `shape`."""
    row, column = (int(min(max(c, 0), length - side)) for c, length in zip(corner, shape, strict=True))
    return row, column


def position_corners(
    first: Sequence[int], label: int, shifts: Sequence[int], side: int, shape: tuple[int, int]
) -> Corners:
    """Of a pair whose second patch lies in direction `label`, three quarters of the side away and `shifts` pixels more.

    first: (row, column). shifts: 0 to side // 4 - 1, for row and column.
    """
    moved = [
        corner + direction * (3 * side // 4 + shift)
        for corner, direction, shift in zip(first, DIRECTIONS[label], shifts, strict=True)
    ]
    return Corners(clipped(first, side, shape), clipped(moved, side, shape))


def near_corners(first: Sequence[int], shifts: Sequence[int], side: int, shape: tuple[int, int]) -> Corners:
    """Of a pair whose second patch is moved by `shifts` (row, column)."""
    moved = [corner + shift for corner, shift in zip(first, shifts, strict=True)]
    return Corners(clipped(first, side, shape), clipped(moved, side, shape))


class PatchPairs:
    """Training views of Patch SVDD: for each side two position patches and two near patches of one image.

    A sample gets `position_K` and `near_K`, float32 (2, 3, K, K) normalised, `label_K`, 0 to 7, and `corners_K`, int64
    (2, 2, 2): of the position and of the near pair, first and second patch, row and column. The image itself is left out.

    sides: K of the patches. shape: (height, width) of the images.
    clip: a second position patch that would leave the image is moved back into it (`kept`, released: 39 % of 64-pixel
        pairs at 256 pixels, some of which no longer lie in the named direction), or all of the pair is drawn again (`redraw`).
    """

    def __init__(self, shape: tuple[int, int], sides: Sequence[int] = (64, 32), clip: Clip = "kept") -> None:
        if clip not in get_args(Clip):
            raise ValueError(f'position_clip is "{clip}"; choose one of {", ".join(get_args(Clip))}.')
        self.shape, self.sides, self.clip = (*shape,), tuple(sides), clip

    def __call__(self, image: np.ndarray, seed: int, normalise: Callable[[np.ndarray], torch.Tensor]) -> dict[str, Any]:
        rng = np.random.default_rng([seed, _STREAM])
        found: dict[str, Any] = {"image": torch.empty(0), "mask": torch.empty(0, dtype=torch.bool)}
        for side in self.sides:
            position, label = self.position(rng, side)
            near = self.near(rng, side)
            noisy = [self._cut(image, corner, side) / np.float32(255) for corner in position]
            noisy = [
                patch + NOISE * rng.standard_normal((1, 1, 3)) + NOISE * rng.standard_normal(patch.shape)
                for patch in noisy
            ]
            found |= {
                f"position_{side}": torch.stack([normalise(patch) for patch in noisy]),
                f"near_{side}": torch.stack([normalise(self._cut(image, corner, side)) for corner in near]),
                f"label_{side}": label,
                f"corners_{side}": torch.tensor([position, near]),
            }
        return found

    @staticmethod
    def _cut(image: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
        return image[corner[0] : corner[0] + side, corner[1] : corner[1] + side]

    def _first(self, rng: np.random.Generator, side: int) -> list[int]:
        return [int(rng.integers(length - side + 1)) for length in self.shape]

    def position(self, rng: np.random.Generator, side: int) -> tuple[Corners, int]:
        """Corners and label of a position pair."""
        while True:
            first, label = self._first(rng, side), int(rng.integers(8))
            shifts = rng.integers(side // 4, size=2).tolist()
            corners = position_corners(first, label, shifts, side, self.shape)
            moved = [f + d * (3 * side // 4 + s) for f, d, s in zip(first, DIRECTIONS[label], shifts, strict=True)]
            if self.clip == "kept" or tuple(moved) == corners.second:
                return corners, label

    def near(self, rng: np.random.Generator, side: int) -> Corners:
        """Corners of a pair one or two pixels apart."""
        most = side // 32
        shifts = [0, 0]
        while not any(shifts):
            shifts = rng.integers(-most, most + 1, size=2).tolist()
        return near_corners(self._first(rng, side), shifts, side, self.shape)
