"""Confetti: smooth dark and coloured squares in a normal image, FCDD's synthetic anomalies; and FCDD's training images.

Liznerski et al., "Explainable Deep One-Class Classification", ICLR 2021, https://arxiv.org/abs/2007.01760, released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from PIL import Image

from datamodules.anomalies.cutpaste import Jitter, jittered

RotationCentre = Literal["mended", "released"]
Mask = Literal["everywhere", "changed"]

BLUR_TAPS, BLUR_SIGMA = 25, 5.0
SMALLEST_CHANGE = 0.025
"""Mean change of an image in grey levels below which the noise may change its sign (black images)."""
ROTATION = 45.0
"""A blob is turned by up to so many degrees, to either side."""
JITTERS = ((0.04, 0.04, 0.04, 0.04), (0.005, 0.0005, 0.0005, 0.0005))
"""Strengths of brightness, contrast, saturation and hue; one of the two is taken for each image."""
NOISE = 0.1
"""Standard deviation of the noise on half of the images, in standard deviations of the image."""
_STREAM = 0x636F6E66


class Layer(NamedTuple):
    """Blobs of one image in scan order: centres (row, column), sides in pixels, angles in degrees, and a colour (3,), negative
    grey levels, for each side that occurs."""

    centres: Sequence[tuple[int, int]]
    sides: Sequence[int]
    angles: Sequence[float]
    colours: dict[int, Sequence[int]]


@dataclass(frozen=True)
class ConfettiConfig:
    """Squares as FCDD draws them.

    Args:
        coloured: Probability of a pixel to be the centre of a coloured or of a dark square. Each image gets at least one of
            each.
        dark: See `coloured`.
        sides: Smallest and largest side in pixels.
        rotation_center: `mended`: a square turns about its centre. `released`: about its centre with row and column
            exchanged, which shows at the image's border.
        mask: Where the anomaly is: `everywhere` in the image (released), or only where pixels `changed`.
    """

    coloured: float = 1.8e-5
    dark: float = 1.2e-5
    sides: tuple[int, int] = (8, 54)
    rotation_center: RotationCentre = "mended"
    mask: Mask = "everywhere"

    def __post_init__(self) -> None:
        for name, allowed in (("rotation_center", RotationCentre), ("mask", Mask)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f'confetti.{name} is "{getattr(self, name)}"; choose one of {", ".join(get_args(allowed))}.'
                )
        if not (0 < self.coloured <= 1 and 0 < self.dark <= 1):
            raise ValueError(f"confetti.coloured and dark lie in (0, 1], found {self.coloured} and {self.dark}.")
        if len(self.sides) != 2 or not 1 <= self.sides[0] <= self.sides[1]:
            raise ValueError(f"confetti.sides is the smallest and the largest side, found {list(self.sides)}.")


def draw_layer(
    rng: np.random.Generator, shape: tuple[int, int], probability: float, sides: tuple[int, int], coloured: bool
) -> Layer:
    """At least one blob; squares of one side share their colour, as released."""
    centres = np.zeros((0, 2), int)
    while not len(centres):
        centres = np.argwhere(rng.random(shape) < probability)
    drawn = rng.integers(sides[0], sides[1] + 1, len(centres)).tolist()
    angles = rng.uniform(-ROTATION, ROTATION, len(centres)).tolist()
    colours = {side: rng.integers(-256, 0, 3).tolist() if coloured else [-255] * 3 for side in sorted(set(drawn))}
    return Layer([(int(row), int(column)) for row, column in centres], drawn, angles, colours)


def paint(layer: Layer, shape: tuple[int, int], rotation_center: RotationCentre = "mended") -> np.ndarray:
    """int16 (H, W, 3): squares, larger ones over smaller ones; then each one's surroundings are turned, one after another."""
    H, W = shape
    noise = np.zeros((H, W, 3), np.int16)
    for side in sorted(layer.colours):
        for (row, column), own in zip(layer.centres, layer.sides, strict=True):
            if own == side:
                before = side // 2 - (side % 2 == 0)
                rows = slice(max(row - before, 0), row + side // 2 + 1)
                noise[rows, max(column - before, 0) : column + side // 2 + 1] = layer.colours[side]
    for (row, column), side, angle in zip(layer.centres, layer.sides, layer.angles, strict=True):
        before, after = math.floor(0.75 * side), math.ceil(0.75 * side)
        top, left = max(row - before, 0), max(column - before, 0)
        window = noise[top : min(row + after, H - 1), left : min(column + after, W - 1)]
        centre = (row - top, column - left)
        noise[top : top + window.shape[0], left : left + window.shape[1]] = _turned(
            window, angle, centre if rotation_center == "mended" else centre[::-1]
        )
    return noise


def _turned(window: np.ndarray, degrees: float, centre: tuple[int, int]) -> np.ndarray:
    """The window turned about (row, column), by the nearest pixel; 0 where it had none."""
    h, w = window.shape[:2]
    rows, columns = np.mgrid[:h, :w].astype(np.float64)
    rows, columns = rows - centre[0], columns - centre[1]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = centre[1] + cosine * columns - sine * rows, centre[0] + sine * columns + cosine * rows
    x, y = (np.where(v >= 0, np.floor(v + 0.5), np.ceil(v - 0.5)).astype(int) for v in (x, y))  # half away from zero
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    turned = np.zeros_like(window)
    turned[inside] = window[y[inside], x[inside]]
    return turned


def smoothed(noise: np.ndarray) -> np.ndarray:
    """Blurred noise (H, W, 3), whole grey levels, cut towards zero."""
    blurred = cv2.GaussianBlur(
        noise.astype(np.float64), (BLUR_TAPS, BLUR_TAPS), BLUR_SIGMA, borderType=cv2.BORDER_REFLECT_101
    )
    return np.trunc(blurred).astype(np.int16)


def added(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """uint8 image (H, W, 3) plus noise; with the opposite sign where it would hardly change the image, and that would more."""
    plus, minus = (
        np.clip(image.astype(np.int16) + sign * noise.astype(np.int16), 0, 255).astype(np.uint8) for sign in (1, -1)
    )
    change, opposite = (abs(float(np.mean(other.astype(float) - image))) for other in (plus, minus))
    return minus if change < SMALLEST_CHANGE and opposite > change else plus


def confetti(rng: np.random.Generator, image: np.ndarray, config: ConfettiConfig) -> np.ndarray:
    """uint8 (H, W, 3) with an anomaly."""
    shape = image.shape[:2]
    layers = (
        draw_layer(rng, shape, config.coloured, config.sides, coloured=True),
        draw_layer(rng, shape, config.dark, config.sides, coloured=False),
    )
    coloured, dark = (paint(layer, shape, config.rotation_center) for layer in layers)
    return added(image, smoothed(coloured + dark))


def nearest_places(length: int, wanted: int) -> np.ndarray:
    """Indices of the pixels that a side of `length` keeps when it becomes `wanted`, by the nearest without antialiasing."""
    return np.floor(np.arange(wanted) * (length / wanted)).astype(int)


class ConfettiImages:
    """Training views of FCDD: `image`, half of them with confetti; `synthetic`, 1 for those; `mask`, where the anomaly is.

    config: of the confetti. size: (height, width) that the network gets: a random crop of this size or, as often, the whole
    image resized by the nearest pixel. defects: (image, mask) of real anomalies that stand in place of the confetti.
    """

    def __init__(
        self,
        config: ConfettiConfig,
        size: tuple[int, int],
        defects: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:
        self.config, self.size, self.defects = config, (*size,), list(defects)

    def __call__(self, image: np.ndarray, seed: int, normalise: Callable[[np.ndarray], torch.Tensor]) -> dict[str, Any]:
        rng = np.random.default_rng([seed, _STREAM])
        synthetic = bool(rng.random() < 0.5)
        mask = np.zeros(image.shape[:2], bool)
        if synthetic and self.defects:
            image, mask = self.defects[rng.integers(len(self.defects))]
        elif synthetic:
            plain, image = image, confetti(rng, image, self.config)
            mask = (image != plain).any(2) if self.config.mask == "changed" else ~mask
        if rng.random() < 0.5:
            top, left = (int(rng.integers(mask.shape[axis] - self.size[axis] + 1)) for axis in (0, 1))
            places = np.ix_(top + np.arange(self.size[0]), left + np.arange(self.size[1]))
        else:
            places = np.ix_(*(nearest_places(mask.shape[axis], self.size[axis]) for axis in (0, 1)))
        image, mask = np.ascontiguousarray(image[places]), mask[places]
        pixels = np.asarray(jittered(Image.fromarray(image), self._jitter(rng))) / np.float32(255)
        if rng.random() < 0.5:
            noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(NOISE * pixels.std(ddof=1))
            pixels = (pixels + noise).clip(0, 1)
        return {"image": normalise(pixels), "mask": torch.from_numpy(mask[None].copy()), "synthetic": int(synthetic)}

    @staticmethod
    def _jitter(rng: np.random.Generator) -> Jitter:
        strengths = JITTERS[rng.integers(2)]
        factors = [rng.uniform(1 - s, 1 + s) for s in strengths[:3]] + [rng.uniform(-strengths[3], strengths[3])]
        return Jitter(rng.permutation(4).tolist(), [float(factor) for factor in factors])

    def describe(self) -> str:
        """In words, for a run's record."""
        config = self.config
        return (
            f"confetti with sides {config.sides[0]} to {config.sides[1]}, one colour per side, rotation centre "
            f"{config.rotation_center}, mask {config.mask}"
        )
