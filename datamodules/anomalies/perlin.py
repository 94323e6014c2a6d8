"""Perlin noise, and the blobs that are cut from it (DeSTSeg, CVPR 2023, https://arxiv.org/abs/2211.11317, released code)."""

from __future__ import annotations

import math

import cv2
import numpy as np

MOST_CELLS = 5
"""Cells along an axis are 2^k, k from 0 to this."""
THRESHOLD = 0.5


def perlin_noise(angles: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Gradient noise on a lattice of cells, float32 `shape`, about -1 to 1.

    angles: radians, one per lattice corner, (rows + 1, columns + 1). Cells may be of any aspect. The fraction along the
    rows meets the cosine of a corner's angle, that along the columns the sine.
    """
    angles = np.asarray(angles, np.float64)

    def along(length: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.arange(length) * (cells / length)
        cell = np.minimum(position.astype(int), cells - 1)
        fraction = position - cell
        return cell, fraction, ((6 * fraction - 15) * fraction + 10) * fraction**3

    row, v, fade_v = along(shape[0], angles.shape[0] - 1)
    column, u, fade_u = along(shape[1], angles.shape[1] - 1)
    cosine, sine = np.cos(angles), np.sin(angles)

    def corner(down: int, right: int) -> np.ndarray:
        at = np.ix_(row + down, column + right)
        return cosine[at] * (v - down)[:, None] + sine[at] * (u - right)[None]

    left = corner(0, 0) + fade_v[:, None] * (corner(1, 0) - corner(0, 0))
    right = corner(0, 1) + fade_v[:, None] * (corner(1, 1) - corner(0, 1))
    return (math.sqrt(2) * (left + fade_u[None] * (right - left))).astype(np.float32)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turned clockwise about its centre, bilinear, zeros outside; same shape."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def draw_blobs(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """bool `shape`: noise above 0.5, on 1 to 32 cells per axis and turned by up to 90 degrees; empty in a twentieth of draws."""
    cells = 2 ** rng.integers(0, MOST_CELLS + 1, 2)
    noise = perlin_noise(rng.uniform(0, 2 * math.pi, cells + 1), shape)
    return rotate(noise, rng.uniform(-90, 90)) > THRESHOLD


def blend(image: np.ndarray, texture: np.ndarray, mask: np.ndarray, opacity: float) -> np.ndarray:
    """The image where the mask is False, else opacity * texture + (1 - opacity) * image.

    image, texture: (H, W, 3), any real type and the same scale; mask: bool (H, W). Returns float32 (H, W, 3).
    """
    inside = np.float32(opacity) * texture + np.float32(1 - opacity) * image
    return np.where(mask[..., None], inside, image).astype(np.float32)
