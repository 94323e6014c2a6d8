"""What fills a synthetic anomaly: photographs of a folder, drawn textures, or crops of the training images themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from datamodules.anomalies.perlin import blend, draw_blobs
from datamodules.anomalies.textures import draw_texture
from datamodules.errors import DataError
from datamodules.images import IMAGE_SUFFIXES, read_image, resize_image
from results.common.did_you_mean import did_you_mean

SOURCES = ("dtd", "textures", "own")
OPACITIES = {"released": (0.2, 1.0), "paper": (0.15, 1.0)}
"""Share of the texture inside an anomaly, drawn uniformly between these."""
_STREAM = 0x616E6F6D
"""Keeps the draws of anomalies apart from those of the augmentation, which start from the same seed."""


@dataclass(frozen=True)
class AnomalyConfig:
    """Anomalies for training images: Perlin blobs (DeSTSeg's) filled from a source.

    Args:
        source: `dtd`: photographs of a folder, drawn with replacement and resized without keeping their aspect; the
            papers' numbers belong to the Describable Textures Dataset. `textures`: drawn by this project, no file
            needed. `own`: crops of the training images, of another category where there is one, turned, mirrored
            and coloured anew.
        folder: Of `dtd`, searched recursively (DTD's own folder `images`).
        opacity: Range of the texture's share in an anomaly: `released` (0.2 to 1) or `paper` (0.15 to 1).
    """

    source: str = "textures"
    folder: str | None = None
    opacity: str = "released"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"anomalies.source is {self.source!r}. {did_you_mean(self.source, SOURCES)}")
        if self.opacity not in OPACITIES:
            raise ValueError(f"anomalies.opacity is {self.opacity!r}; allowed are {', '.join(OPACITIES)}.")
        if (self.folder is not None) != (self.source == "dtd"):
            raise ValueError(
                f"anomalies.source is {self.source!r} and anomalies.folder is {self.folder!r}: source dtd needs the folder "
                "of its photographs, and no other source reads one."
            )


class Anomalies:
    """Puts anomalies into images; what it does depends on the arguments and a seed alone.

    Args:
        config: What they are.
        rows: The training images, of which source `own` cuts its crops; each has a `category`.
        load: Gives a row's resized image, uint8 (H, W, 3), and mask.

    Raises:
        DataError: the folder has no image.
    """

    def __init__(
        self, config: AnomalyConfig, rows: Sequence[Any], load: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.config, self.rows, self.load = config, list(rows), load
        self.files = photographs(config.folder) if config.folder is not None else []
        self._categories = {row.category for row in self.rows}

    def __call__(self, image: np.ndarray, category: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """One image uint8 (H, W, 3) with an anomaly, float32 (H, W, 3) of the same scale, and where it is, bool (H, W).

        The mask is empty in about a twentieth of all draws; the image is then as it was.
        """
        rng = np.random.default_rng([seed, _STREAM])
        shape = image.shape[:2]
        mask = draw_blobs(rng, shape)
        low, high = OPACITIES[self.config.opacity]
        opacity = high - (high - low) * rng.random()  # in (low, high]
        if not mask.any():
            return image.astype(np.float32), mask
        return blend(image, self._texture(rng, shape, category), mask, opacity), mask

    def _texture(self, rng: np.random.Generator, shape: tuple[int, int], category: str) -> np.ndarray:
        if self.config.source == "dtd":
            return resize_image(read_image(self.files[rng.integers(len(self.files))]), shape, "pil_bilinear")
        if self.config.source == "textures":
            return draw_texture(rng, shape)
        return self._crop(rng, shape, category)

    def _crop(self, rng: np.random.Generator, shape: tuple[int, int], category: str) -> np.ndarray:
        others = len(self._categories) > 1
        while True:
            row = self.rows[rng.integers(len(self.rows))]
            if not others or row.category != category:
                break
        image = self.load(row)[0]
        side = rng.uniform(0.25, 1.0)
        height, width = (max(1, round(side * length)) for length in image.shape[:2])
        top, left = (
            rng.integers(length - part + 1) for length, part in zip(image.shape[:2], (height, width), strict=True)
        )
        crop = np.rot90(image[top : top + height, left : left + width], int(rng.integers(4)))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        crop = cv2.resize(np.ascontiguousarray(crop), shape[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float32)
        brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3).astype(np.float32)
        mean, grey = crop.mean(), crop.mean(2, keepdims=True)
        crop = grey + saturation * (crop - grey)
        return ((crop - mean) * contrast + mean * brightness).clip(0, 255).astype(np.uint8)

    def describe(self) -> str:
        """The source in words, with the contents of a folder, for a run's record."""
        text = f"synthetic anomalies: source {self.config.source}, opacity {self.config.opacity}"
        return f"{text}, {len(self.files)} photographs, contents {folder_hash(self.files)[:12]}" if self.files else text


def photographs(folder: str) -> list[str]:
    """Image files below a folder, sorted. Raises DataError if there is none."""
    root = Path(folder).expanduser()
    files = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(
            f"anomalies.folder {root} holds no image. For source dtd give the folder `images` of the Describable Textures "
            "Dataset, or choose source textures, which needs no file."
        )
    return files


def folder_hash(files: Sequence[str]) -> str:
    """Of the files' contents in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(Path(file).read_bytes(), digest_size=16).digest())
    return digest.hexdigest()
