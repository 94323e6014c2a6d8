"""Pictures that show the same, encoded anew: a perceptual hash of each, compared within a category.

Photographs of one category resemble each other, so what all of them share is taken away: the hash of a picture is its
thumbnail, brought to mean 0 and deviation 1, less the mean of its category's, at length 1. The products of two hashes are
then correlations of what is particular to two pictures.
"""

from __future__ import annotations

import cv2
import numpy as np

SIDE = 24
NEAR = 0.985
"""Pictures of a higher correlation are nearly the same."""


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> grey float16 (SIDE, SIDE), averaged over areas."""
    return (
        cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).mean(axis=2, dtype=np.float32).astype(np.float16)
    )


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails (N, SIDE, SIDE) of one category -> float32 (N, SIDE ** 2), of length 1, or 0 if nothing is particular."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(flat.std(axis=1, keepdims=True), 1)  # what varies by less than a grey level is noise
    flat -= flat.mean(axis=0)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > 1e-3 * SIDE, flat / np.maximum(length, 1e-12), 0)


def near_pairs(test: np.ndarray, train: np.ndarray) -> list[tuple[int, int]]:
    """For each row of `test` hashes (M, D) that is near one of `train` (N, D): the two numbers, of the nearest."""
    if not len(train):
        return []
    pairs = []
    for start in range(0, len(test), 1024):
        alike = test[start : start + 1024] @ train.T
        nearest = alike.argmax(axis=1)
        pairs += [(start + i, int(j)) for i, j in enumerate(nearest) if alike[i, j] > NEAR]
    return pairs
