"""The categories of the embedded benchmark: three textures and seven objects.

A category is a function that draws a `Scene` from a generator: the layout of one product in front of the camera, with
all the variation that normal products have. `CATEGORIES` names the defects that occur on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from datamodules.synthetic.canvas import Canvas, box, fractal_noise, rotate, smooth_noise, step
from datamodules.synthetic.scene import Part, Scene, draw_light


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


# -- textures ----------------------------------------------------------------------------------------------------------


def fabric(rng: np.random.Generator) -> Scene:
    """Plain weave, blue warp over cream weft, slightly rotated and stretched."""
    angle, period = rng.normal(0, 0.04), 0.115 * np.exp(rng.normal(0, 0.04))
    phase = rng.uniform(0, 1, 2)

    def weave(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        wobble = 0.012 * smooth_noise(rng, canvas.shape, 4), 0.012 * smooth_noise(rng, canvas.shape, 4)
        u, v = rotate(whole.x + wobble[0], whole.y + wobble[1], angle)
        u, v = u / period + phase[0] * 2, v / period + phase[1] * 2
        column, row = np.floor(u).astype(int), np.floor(v).astype(int)
        fu, fv = u - column - 0.5, v - row - 0.5
        over = np.cos(np.pi * u - np.pi / 2) * np.cos(np.pi * v - np.pi / 2)
        sign = np.where((column + row) % 2 == 0, 1.0, -1.0)
        warp = 0.55 * sign * np.cos(np.pi * fv) * np.cos(np.pi * fu * 0.7) + np.sqrt(
            np.clip(1 - (2.05 * fu) ** 2, 0, 1)
        )
        weft = -0.55 * sign * np.cos(np.pi * fu) * np.cos(np.pi * fv * 0.7) + np.sqrt(
            np.clip(1 - (2.05 * fv) ** 2, 0, 1)
        )
        top = np.maximum(warp, weft).astype(np.float32)
        del over
        yarn = rng.normal(0, 0.06, (2, 128)).astype(np.float32)
        is_warp = step(warp - weft, -0.05, 0.05)[..., None]
        blue = (
            np.asarray((0.20, 0.29, 0.47), np.float32)
            * (1 + yarn[0][column % 128] + 0.10 * np.sin(9 * (fu + 0.6 * v)))[..., None]
        )
        cream = (
            np.asarray((0.76, 0.71, 0.60), np.float32)
            * (1 + yarn[1][row % 128] + 0.06 * np.sin(9 * (fv + 0.6 * u)))[..., None]
        )
        canvas.albedo[:] = is_warp * blue + (1 - is_warp) * cream
        canvas.albedo *= (0.5 + 0.5 * np.clip(top / 1.3, 0, 1) ** 0.7)[..., None] * (
            1 + 0.05 * fractal_noise(rng, canvas.shape, 6)
        )[..., None]
        canvas.height[:] = 0.018 * top + 0.002 * fractal_noise(rng, canvas.shape, 64, 2)
        canvas.surface[:] = 1

    return Scene(weave, _seed(rng), draw_light(rng, elevation=0.95))


def wood(rng: np.random.Generator) -> Scene:
    """Planed softwood board: growth rings, pores along the grain, now and then a knot."""
    angle, shift = rng.normal(0, 0.03), rng.uniform(0, 10)

    def board(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        u, v = rotate(whole.x, whole.y, angle)
        bend = 0.10 * smooth_noise(rng, canvas.shape, (2, 3)) + 0.03 * smooth_noise(rng, canvas.shape, (3, 9))
        across = u + bend
        if rng.random() < 0.4:
            kx, ky = rng.uniform(-0.7, 0.7, 2)
            spread = np.hypot((u - kx) * 1.6, (v - ky) * 0.8)
            across = across + 0.25 * np.exp(-((spread / 0.22) ** 2)) * np.sign(u - kx + 1e-6) * 0.6
        ring = (across * 5.5 + shift) % 1.0
        late = step(ring, 0.35, 0.93) * step(ring, 1.0, 0.95)
        fibre = (
            smooth_noise(rng, canvas.shape, (7, canvas.n * 0.6)) * 0.6
            + smooth_noise(rng, canvas.shape, (14, canvas.n)) * 0.5
        )
        tone = np.clip(0.72 * late + 0.09 * fibre + 0.05 * fractal_noise(rng, canvas.shape, 3) + 0.1, 0, 1)[..., None]
        canvas.albedo[:] = (1 - tone) * np.asarray((0.79, 0.62, 0.42), np.float32) + tone * np.asarray(
            (0.54, 0.35, 0.19), np.float32
        )
        pores = step(smooth_noise(rng, canvas.shape, (22, canvas.n * 0.8)), 1.5, 2.2)
        canvas.tone(whole, 1 - 0.45 * pores)
        canvas.height[:] = -0.004 * pores - 0.002 * late + 0.001 * fibre
        canvas.gloss[:] = 0.12
        canvas.surface[:] = 1

    return Scene(board, _seed(rng), draw_light(rng, ambient=0.6))


def tiles(rng: np.random.Generator) -> Scene:
    """Glazed terrazzo tiles with grout between them."""
    angle, pitch = rng.normal(0, 0.02), 0.98 * np.exp(rng.normal(0, 0.02))
    origin = rng.uniform(-0.12, 0.12, 2)

    def floor(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        u, v = rotate(whole.x - origin[0], whole.y - origin[1], angle)
        column, row = np.floor(u / pitch).astype(int), np.floor(v / pitch).astype(int)
        fu, fv = u - (column + 0.5) * pitch, v - (row + 0.5) * pitch
        inside = box(fu, fv, pitch / 2 - 0.028, pitch / 2 - 0.028, 0.03)
        tile = canvas.cover(inside)
        tint = rng.normal(0, 0.025, 16)[(column * 3 + row) % 16]
        canvas.albedo[:] = (
            np.asarray((0.47, 0.45, 0.42), np.float32) * (1 + 0.10 * fractal_noise(rng, canvas.shape, 50, 2))[..., None]
        )
        base = (
            np.asarray((0.80, 0.78, 0.73), np.float32)
            * (1 + tint + 0.02 * fractal_noise(rng, canvas.shape, 4))[..., None]
        )
        canvas.paint(whole, tile, base, gloss=0.45)
        chips = [(0.38, 0.36, 0.35), (0.62, 0.45, 0.33), (0.55, 0.57, 0.58), (0.24, 0.25, 0.27)]
        for colour, cells, threshold in zip(chips, (26, 20, 30, 40), (1.15, 1.45, 1.2, 1.6), strict=True):
            field = smooth_noise(rng, canvas.shape, cells)
            canvas.paint(whole, tile * step(field, threshold, threshold + 0.15), colour)
        canvas.height[:] = 0.03 * step(inside, 0.004, -0.02) + 0.0006 * fractal_noise(rng, canvas.shape, 5)
        canvas.surface[:] = tile

    return Scene(floor, _seed(rng), draw_light(rng, elevation=1.0, ambient=0.55))


@dataclass(frozen=True)
class Category:
    """A category: how to draw a scene of it, and which defects it can have."""

    draw: Callable[[np.random.Generator], Scene]
    structural: tuple[str, ...]
    logical: tuple[str, ...] = ()


CATEGORIES: dict[str, Category] = {
    "fabric": Category(fabric, ("hole", "stain", "contamination", "burn")),
    "wood": Category(wood, ("scratch", "crack", "hole", "stain")),
    "tiles": Category(tiles, ("crack", "chip", "stain", "contamination")),
}
