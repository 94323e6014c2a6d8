"""Random small patches of images at random scales, for networks that are trained on patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SCALES = (4, 16)
"""An image's side in patches, from and to."""
GREY = 0.1
"""Share of patches without colour."""
NOISE = 0.1
"""Standard deviation of the noise on a positive patch, for pixels in [0, 1]."""
_WEIGHTS = (0.299, 0.587, 0.114)


class Patches(NamedTuple):
    """anchors, positives: float32 (B, 3, p, p) in [0, 1] but for the noise of the positives, which are None unless asked for.
    The next anchor of the batch is a negative: each is of another image where there are enough."""

    anchors: Tensor
    positives: Tensor | None


class RandomPatches:
    """Draws as Uninformed Students trains its teacher: an image resized to 4 to 16 patches, one patch of it anywhere.

    The resized image is never made: the part that becomes the patch is cut out and resized, antialiased.

    images: uint8 (H, W, 3) each. seed: of all draws; the same seed gives the same patches.
    """

    def __init__(self, images: Sequence[np.ndarray], seed: int) -> None:
        if not len(images):
            raise ValueError("There is no image to cut patches from.")
        self.images = images
        self._rng = np.random.default_rng(seed)

    def draw(self, count: int, side: int, positives: bool = False) -> Patches:
        """`count` patches of `side` pixels; with `positives`, one for each: shifted by up to a quarter patch, and noisy."""
        rng = self._rng
        chosen = rng.permutation(len(self.images)) if count <= len(self.images) else None
        picks = chosen[:count] if chosen is not None else rng.integers(len(self.images), size=count)
        anchors, others = [], []
        for pick in picks:
            image = self.images[pick]
            scale = rng.uniform(SCALES[0], SCALES[1])
            shift = rng.integers(-((side - 1) // 4), (side - 1) // 4 + 1, size=2) / side
            grey = rng.random() < GREY
            window = [max(1, round(length / scale)) for length in image.shape[:2]]
            corner = [rng.integers(length - part + 1) for length, part in zip(image.shape[:2], window, strict=True)]
            moved = [
                int(np.clip(start + round(part * by), 0, length - part))
                for start, part, by, length in zip(corner, window, shift, image.shape[:2], strict=True)
            ]
            anchors.append(_cut(image, corner, window, side, grey))
            if positives:
                noise = rng.normal(0, NOISE, (3, side, side)).astype(np.float32)
                others.append(_cut(image, moved, window, side, grey) + torch.from_numpy(noise))
        return Patches(torch.stack(anchors), torch.stack(others) if positives else None)


def _cut(image: np.ndarray, corner: Sequence[int], window: Sequence[int], side: int, grey: bool) -> Tensor:
    """The window at a corner as float32 (3, side, side) in [0, 1]."""
    (top, left), (height, width) = corner, window
    part = torch.from_numpy(np.array(image[top : top + height, left : left + width])).permute(2, 0, 1)[None].float()
    resized = F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0].div(255)
    if grey:
        resized = torch.tensordot(torch.tensor(_WEIGHTS), resized, dims=1).expand(3, -1, -1).clone()
    return resized
