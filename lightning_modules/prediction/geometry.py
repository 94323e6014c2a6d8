"""From the pixels of a network's map back to those of the photograph."""

from __future__ import annotations

import cv2
import numpy as np

Size = tuple[int, int]
"""(height, width) in pixels."""


def to_photograph(
    values: np.ndarray, size: Size, crop: tuple[Size, Size] | None = None, unseen: float | None = None
) -> np.ndarray:
    """A map (h, w) at the (height, width) of its photograph, bilinearly.

    A network sees a photograph resized, whatever its proportions; so the map is stretched back. After a centre crop it is
    put where it belongs.

    Args:
        values: The map, float (h, w).
        size: Of the photograph, turned as EXIF says.
        crop: (height, width) before and after the centre crop; None without one.
        unseen: What the margin gets that a centre crop has cut off; None for the map's lowest value.

    Returns:
        Of the type of `values`, (height, width).
    """
    top, left, height, width = seen_part(size, crop)
    inner = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
    if (height, width) == size:
        return inner
    placed = np.full(size, values.min() if unseen is None else unseen, values.dtype)
    placed[top : top + height, left : left + width] = inner
    return placed


def seen_part(size: Size, crop: tuple[Size, Size] | None) -> tuple[int, int, int, int]:
    """Top, left, height and width of what a network sees of a photograph of (height, width) `size`, in its pixels."""
    if crop is None:
        return 0, 0, *size
    whole, kept = crop
    height, width = (round(side * part / all_of_it) for side, part, all_of_it in zip(size, kept, whole, strict=True))
    return round((size[0] - height) / 2), round((size[1] - width) / 2), height, width
