"""Drawn textures that no product has: what fills a synthetic anomaly where no folder of photographs is at hand.

Six families, each equally often: fractal noise, gratings, checks and weaves, Voronoi cells, dots, marble. A field of numbers
becomes colours through two to four random ones, some of which differ clearly, and is lit unevenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import cv2
import numpy as np

CONTRAST = 0.25
"""Two of a texture's colours differ by at least this in some channel, in [0, 1]."""


def draw_texture(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3), a texture as the generator draws it."""
    field = FAMILIES[rng.integers(len(FAMILIES))](rng, shape)
    low, high = float(field.min()), float(field.max())
    field = (field - low) / (high - low) if high > low else np.zeros_like(field)
    coloured = _colours(rng, field)
    shading = 0.8 + 0.4 * _noise(rng, shape, int(rng.integers(2, 5)))
    noise = rng.standard_normal((*shape, 1), dtype=np.float32) * np.float32(rng.uniform(0, 0.03))
    return ((coloured * shading[..., None] + noise).clip(0, 1) * 255).round().astype(np.uint8)


def _colours(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """A field in [0, 1] through random colours, float32 (H, W, 3)."""
    count = int(rng.integers(2, 5))
    while True:
        colours = rng.uniform(0, 1, (count, 3))
        if np.abs(colours[:, None] - colours[None]).max() >= CONTRAST:
            break
    stops = np.linspace(0, 1, count)
    return np.stack([np.interp(field, stops, colours[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise in [0, 1] with about `cells` blobs along an axis, float32 `shape`."""
    small = rng.uniform(0, 1, (cells + 2, cells + 2)).astype(np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)


def _fractal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    gain, cells = rng.uniform(0.4, 0.7), int(rng.integers(2, 6))
    octaves = int(rng.integers(4, 7))
    return reduce(np.add, (gain**k * _noise(rng, shape, min(cells * 2**k, max(shape))) for k in range(octaves)))


def _axes(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates along a random direction and across it, float32 `shape`."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cosine * columns + sine * rows, cosine * rows - sine * columns


def _grating(rng: np.random.Generator, shape: tuple[int, int], shift: np.ndarray | float = 0.0) -> np.ndarray:
    field = np.zeros(shape, np.float32)
    for _ in range(int(rng.integers(1, 3))):
        along, _ = _axes(rng, shape)
        wave = np.sin(2 * np.pi * (along + shift) / rng.uniform(4, 64) + rng.uniform(0, 2 * np.pi))
        field += np.sign(wave) if rng.random() < 0.3 else wave
    return field


def _checks(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    along, across = _axes(rng, shape)
    jitter = rng.uniform(0, 4) * (_noise(rng, shape, 8) - 0.5)
    x, y = (along + jitter) / rng.uniform(6, 48), (across + jitter) / rng.uniform(6, 48)
    if rng.random() < 0.5:
        return ((np.floor(x) + np.floor(y)) % 2).astype(np.float32)
    over = (np.floor(x) + np.floor(y)) % 2 == 0
    return np.where(over, np.sin(np.pi * (x % 1)), np.sin(np.pi * (y % 1)) - 0.5).astype(np.float32)


def _voronoi(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    count = int(rng.integers(20, 401))
    sites = np.ones(shape, np.uint8)
    sites[rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)] = 0
    distance, cell = cv2.distanceTransformWithLabels(sites, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    if rng.random() < 0.5:
        return distance
    return rng.uniform(0, 1, int(cell.max()) + 1).astype(np.float32)[cell]


def _dots(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    field = np.zeros(shape, np.float32)
    count = int(rng.integers(50, 801))
    rows, columns = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
    radii, values = rng.integers(2, 17, count), rng.uniform(0.3, 1, count)
    for row, column, radius, value in zip(*map(np.ndarray.tolist, (rows, columns, radii, values)), strict=True):
        cv2.circle(field, (column, row), radius, value, cv2.FILLED)
    return field


def _marble(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return _grating(rng, shape, rng.uniform(5, 40) * _fractal(rng, shape))


FAMILIES: tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], ...] = (
    _fractal,
    _grating,
    _checks,
    _voronoi,
    _dots,
    _marble,
)
