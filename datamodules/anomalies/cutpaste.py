"""CutPaste: a part of a normal image is cut out and pasted elsewhere into it.

Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021,
https://arxiv.org/abs/2104.04015. There is no official code; this follows the paper, and the reimplementation
Runinho/pytorch-cutpaste where the paper is silent, down to its roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance

Kind = Literal["normal", "scar", "union", "3way"]
ScarAxes = Literal["mended", "released"]

AREA = (0.02, 0.15)
"""Share of the image that a normal patch covers."""
ASPECT = 0.3
"""Its width over its height, log-uniform from this to its inverse."""
SCAR_WIDTH, SCAR_HEIGHT = (2.0, 16.0), (10.0, 25.0)
"""Of a scar before it is turned, in pixels."""
SCAR_ANGLE = 45.0
"""A scar is turned by up to so many degrees, to either side."""
_STREAM = 0x637574


class Jitter(NamedTuple):
    """order: of the operations 0 brightness, 1 contrast, 2 saturation, 3 hue. factors: theirs, in this numbering."""

    order: Sequence[int]
    factors: Sequence[float]


def draw_jitter(rng: np.random.Generator, strength: float) -> Jitter:
    """Factors from 1 - strength to 1 + strength, and a shift of the hue of up to `strength`, in a random order."""
    order = rng.permutation(4)
    factors = [*rng.uniform(1 - strength, 1 + strength, 3), rng.uniform(-strength, strength)]
    return Jitter([int(number) for number in order], [float(factor) for factor in factors])


def jittered(image: Image.Image, jitter: Jitter | None) -> Image.Image:
    """An RGB image with other colours, as torchvision's ColorJitter changes PIL images; None changes nothing."""
    if jitter is None:
        return image
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in jitter.order:
        factor = jitter.factors[number]
        if number < 3:
            image = enhancers[number](image).enhance(factor)
        else:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue) + np.int32(factor * 255).astype(np.uint8)  # wraps around
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return image


def patch_size(share: float, aspect: float, shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a patch with a share of an image's area, and a width of `aspect` times its height."""
    area = share * shape[0] * shape[1]
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def paste_patch(
    image: np.ndarray,
    share: float,
    aspect: float,
    source: Sequence[float] | np.ndarray,
    target: Sequence[float] | np.ndarray,
    jitter: Jitter | None = None,
) -> np.ndarray:
    """uint8 (H, W, 3) with a patch from `source` pasted at `target`.

    share, aspect: see `patch_size`. source, target: (row, column) of the upper left corners, rounded down.
    """
    height, width = patch_size(share, aspect, image.shape[:2])
    top, left = (int(value) for value in source)
    picture = Image.fromarray(image)
    patch = jittered(picture.crop((left, top, left + width, top + height)), jitter)
    picture.paste(patch, (int(target[1]), int(target[0])))
    return np.asarray(picture)


def turned_scar(
    image: np.ndarray,
    size: Sequence[float],
    source: Sequence[float] | np.ndarray,
    angle: float,
    jitter: Jitter | None = None,
) -> Image.Image:
    """RGBA picture of a part of the image, turned counter-clockwise by `angle` degrees; transparent outside the part.

    size: (width, height) in pixels, real numbers. source: (row, column) of the upper left corner, rounded down.
    """
    (width, height), (top, left) = size, (int(value) for value in source)
    patch = Image.fromarray(image).crop((left, top, left + width, top + height))
    return jittered(patch, jitter).convert("RGBA").rotate(angle, expand=True)


def paste_scar(image: np.ndarray, scar: Image.Image, target: Sequence[float] | np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with a scar at `target`, (row, column) rounded down; what sticks out is cut off."""
    picture = Image.fromarray(image)
    picture.paste(scar, (int(target[1]), int(target[0])), mask=scar.split()[-1])
    return np.asarray(picture)


@dataclass(frozen=True)
class CutPasteConfig:
    """What is pasted into training images.

    Args:
        kind: `normal`, a patch of 2 to 15 % of the image; `scar`, a thin turned patch; `union`, one of the two, each
            as often; `3way`, both of them as classes of their own.
        jitter: Strength of the colour jitter of every patch.
        image_jitter: Strength of the colour jitter of the whole image before anything is cut, which the normal image keeps.
        translation: The image is first shifted by up to this share of its side, mirrored at its border. The paper names a
            random translation, but no amount, and the usual reimplementation has none: 0.
        scar_axes: `released`: the reimplementation draws a scar's row by its width and its column by its height, so that
            2 % of scars stick out of the image; `mended`: by what they are.
    """

    kind: Kind = "3way"
    jitter: float = 0.1
    image_jitter: float = 0.1
    translation: float = 0.0
    scar_axes: ScarAxes = "mended"

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, Kind), ("scar_axes", self.scar_axes, ScarAxes)):
            if value not in get_args(allowed):
                raise ValueError(f'cutpaste.{name} is "{value}"; choose one of {", ".join(get_args(allowed))}.')
        for name in ("jitter", "image_jitter", "translation"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"cutpaste.{name} must lie in [0, 0.5), found {getattr(self, name)}.")

    @property
    def classes(self) -> int:
        """Images that one becomes: itself and one or two with a patch."""
        return 3 if self.kind == "3way" else 2


class CutPaste:
    """Views of a training image: `image` as it is, up to its colours, `pasted`, and with `3way` also `scar`.

    crop: side of a random square that is cut out first and stands for the image; None for the whole image.
    """

    def __init__(self, config: CutPasteConfig, crop: int | None = None) -> None:
        self.config, self.crop = config, crop

    def __call__(self, image: np.ndarray, seed: int, normalise: Callable[[np.ndarray], torch.Tensor]) -> dict[str, Any]:
        rng, config = np.random.default_rng([seed, _STREAM]), self.config
        image = self._part(rng, image)
        if config.image_jitter:
            image = np.asarray(jittered(Image.fromarray(image), draw_jitter(rng, config.image_jitter)))
        views = {"image": image}
        if config.kind == "3way":
            views |= {"pasted": self.normal(rng, image), "scar": self.scar(rng, image)}
        else:
            is_scar = config.kind == "scar" or (config.kind == "union" and rng.random() < 0.5)
            views["pasted"] = self.scar(rng, image) if is_scar else self.normal(rng, image)
        found: dict[str, Any] = {name: normalise(view) for name, view in views.items()}
        return found | {"mask": torch.zeros(1, *image.shape[:2], dtype=torch.bool)}

    def _part(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        most = [int(self.config.translation * length) for length in image.shape[:2]]
        if any(most):
            top, left = (rng.integers(2 * length + 1) for length in most)
            padded = np.pad(image, (*((length, length) for length in most), (0, 0)), mode="reflect")
            image = padded[top : top + image.shape[0], left : left + image.shape[1]]
        if self.crop is not None:
            top, left = (rng.integers(length - self.crop + 1) for length in image.shape[:2])
            image = image[top : top + self.crop, left : left + self.crop]
        return np.ascontiguousarray(image)

    def _jitter(self, rng: np.random.Generator) -> Jitter | None:
        return draw_jitter(rng, self.config.jitter) if self.config.jitter else None

    def normal(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """The image with a patch, whose jitter is drawn between its source and its target."""
        share = rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        size = patch_size(share, aspect, image.shape[:2])
        room = [max(0, length - part) for length, part in zip(image.shape[:2], size, strict=True)]
        source = rng.uniform(0, room)
        jitter = self._jitter(rng)
        return paste_patch(image, share, aspect, source, rng.uniform(0, room), jitter)

    def scar(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """The image with a scar, whose jitter and angle are drawn between its source and its target."""
        width, height = rng.uniform(*SCAR_WIDTH), rng.uniform(*SCAR_HEIGHT)
        source = rng.uniform(0, [max(0.0, image.shape[0] - height), max(0.0, image.shape[1] - width)])
        jitter = self._jitter(rng)
        scar = turned_scar(image, (width, height), source, rng.uniform(-SCAR_ANGLE, SCAR_ANGLE), jitter)
        columns, rows = scar.size
        if self.config.scar_axes == "released":
            rows, columns = columns, rows
        return paste_scar(
            image, scar, rng.uniform(0, [max(0, image.shape[0] - rows), max(0, image.shape[1] - columns)])
        )

    def describe(self) -> str:
        """In words, for a run's record."""
        config = self.config
        text = f"CutPaste {config.kind}, patches jittered by {config.jitter:g}, images by {config.image_jitter:g}"
        text += f", translated by up to {config.translation:g}, scar axes {config.scar_axes}"
        return text if self.crop is None else f"{text}, in crops of {self.crop} pixels"
