"""Products that fill the picture: woven fabric, a wooden board, terrazzo tiles.

Each function draws a `Scene` from a generator: one product in front of the camera, with the variation normal products
have.
"""

from __future__ import annotations

import math

import numpy as np

from datamodules.synthetic.canvas import Canvas, box, fractal_noise, rotate, smooth_noise, step
from datamodules.synthetic.scene import Scene, draw_light, draw_seed


def fabric(rng: np.random.Generator) -> Scene:
    """Two-and-one twill, blue warp over pale weft, slightly rotated and stretched."""
    angle, period = rng.normal(0, 0.04), 0.088 * math.exp(rng.normal(0, 0.03))
    phase = rng.uniform(0, 3, 2).tolist()

    def weave(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        drift = 0.01 * smooth_noise(rng, canvas.shape, 4), 0.01 * smooth_noise(rng, canvas.shape, 4)
        u, v = rotate(whole.x + drift[0], whole.y + drift[1], angle)
        u, v = u / period + phase[0], v / period + phase[1]
        column, row = np.floor(u), np.floor(v)
        fu, fv = u - column - 0.5, v - row - 0.5
        turn = (column - row) % 3  # 0: the weft lies on top; 2, then 1: a warp float over two rows
        weft_on_top = turn == 0
        across = np.where(weft_on_top, fv, fu)
        along = np.where(weft_on_top, fu * 2, fv + np.where(turn == 1, np.float32(0.5), np.float32(-0.5)))
        round_ = np.sqrt(np.clip(1 - (1.9 * across) ** 2, 0, 1)) * (1 - 0.45 * along * along)
        twist = np.sin(np.where(weft_on_top, 14 * u + 7 * fv, 14 * v + 7 * fu))
        yarn = rng.normal(0, 0.05, (2, 64)).astype(np.float32)
        shade = np.where(weft_on_top, yarn[0][row.astype(int) % 64], yarn[1][column.astype(int) % 64])
        shade = (1 + shade + 0.07 * twist) * (0.38 + 0.62 * round_) * (1 + 0.04 * fractal_noise(rng, canvas.shape, 5))
        pale, blue = np.asarray((0.74, 0.73, 0.70), np.float32), np.asarray((0.27, 0.36, 0.52), np.float32)
        canvas.albedo[:] = np.where(weft_on_top[..., None], pale, blue) * shade[..., None]
        canvas.height[:] = 0.016 * round_ + 0.0015 * twist
        canvas.surface[:] = 1

    return Scene(weave, draw_seed(rng), draw_light(rng, elevation=0.95))


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

    return Scene(board, draw_seed(rng), draw_light(rng, ambient=0.6))


def tiles(rng: np.random.Generator) -> Scene:
    """Glazed terrazzo tiles with grout between them."""
    angle, pitch = rng.normal(0, 0.02), 0.98 * math.exp(rng.normal(0, 0.02))
    origin = rng.uniform(-0.12, 0.12, 2).tolist()

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

    return Scene(floor, draw_seed(rng), draw_light(rng, elevation=1.0, ambient=0.55))
