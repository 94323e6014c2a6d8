"""A mask drawn into its image."""

from __future__ import annotations

import cv2
import numpy as np

YELLOW = (255, 235, 0)


def outlined(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = YELLOW, tint: float = 0.0
) -> np.ndarray:
    """An image with the outline of a mask just outside of it, so that what is marked stays visible.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W) of any size; every region of it is seen, however small it becomes at the image's.
        colour: of the outline, which is one pixel wide between two dark ones.
        tint: share of the colour inside the mask, in [0, 1]: it tells the marked side from the other.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    area = cv2.INTER_AREA if mask.shape[0] > height else cv2.INTER_LINEAR
    marked = (cv2.resize(mask.astype(np.float32), (width, height), interpolation=area) > 0).view(np.uint8)
    rings = [cv2.dilate(marked, np.ones((side, side), np.uint8)) for side in (1, 3, 5, 7)]
    picture = image.astype(np.float32)
    picture[marked > 0] += tint * (np.asarray(colour, np.float32) - picture[marked > 0])
    for inner, outer, paint in zip(rings, rings[1:], ((20, 20, 20), colour, (20, 20, 20)), strict=False):
        picture[outer > inner] = paint
    return picture.astype(np.uint8)
