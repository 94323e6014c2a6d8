"""Structural defects: changes to colour, height and gloss of a rendered surface. Severity 0 is subtle, 1 is obvious.

A defect draws everything it needs from its generator and is placed on the product's surface.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from datamodules.synthetic.canvas import Canvas, Window, blur, fractal_noise, polyline, step

Defect = Callable[[Canvas, np.random.Generator, float], None]


def place(canvas: Canvas, rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A point on the surface that is at least `margin` from its edge and the image's, or as far as there is."""
    inside = np.pad((canvas.surface > 0.5).astype(np.uint8), 1)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1] * canvas.px
    candidates = np.flatnonzero(depth >= min(margin, 0.8 * float(depth.max())))
    row, column = divmod(int(rng.choice(candidates)), canvas.n)
    return float(canvas.axis[column]), float(canvas.axis[row])


def wander(
    rng: np.random.Generator, x: float, y: float, length: float, angle: float, bend: float, points: int = 8
) -> np.ndarray:
    """A bent line of a given length centred at (x, y): (points, 2)."""
    headings = angle + np.cumsum(rng.normal(0, bend, points - 1))
    steps = length / (points - 1) * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return path - path.mean(axis=0) + [x, y]


def blob(canvas: Canvas, rng: np.random.Generator, window: Window, radius: float, ragged: float) -> np.ndarray:
    """Signed distance-like field of an irregular blob around the window's centre; negative inside."""
    angle = window.angle
    outline = np.full_like(angle, radius)
    for wave in range(2, 7):
        swing = ragged * radius * rng.normal() / wave
        outline += np.float32(swing) * np.cos(wave * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    stretch = float(rng.uniform(0.75, 1.3))
    return np.hypot(window.x * stretch, window.y / stretch) - outline


def _lines(canvas: Canvas, window: Window, path: np.ndarray, centre: tuple[float, float]) -> tuple[np.ndarray, ...]:
    return polyline(window.x, window.y, path - np.asarray(centre))


def scratch(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """One to three fine parallel grooves with bright flanks."""
    length = 0.12 + 0.55 * severity
    x, y = place(canvas, rng, 0.08 + 0.1 * severity)
    angle = rng.uniform(0, np.pi)
    for number in range(1 + int(rng.integers(0, 2 + (severity > 0.5)))):
        offset = np.array([-np.sin(angle), np.cos(angle)]) * 0.035 * number
        path = wander(rng, x + offset[0], y + offset[1], length * rng.uniform(0.6, 1), angle, 0.05)
        window = canvas.window(x, y, 0.75)
        distance, along = _lines(canvas, window, path, (x, y))
        width = (0.006 + 0.010 * severity) * (0.35 + np.sin(np.pi * np.clip(along, 0, 1)))
        groove = np.exp(-((distance / width) ** 2)) * (canvas.surface[window.at] > 0.5)
        canvas.add_height(window, -groove * np.float32(0.006 + 0.012 * severity))
        brightness = canvas.albedo[window.at].mean()
        tone = 0.25 + 0.45 * severity
        canvas.tone(window, 1 + groove * np.float32(tone if brightness < 0.5 else -tone))


def crack(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A jagged dark line that thins out, with a branch when severe."""
    x, y = place(canvas, rng, 0.15)
    angle = rng.uniform(0, 2 * np.pi)
    length = 0.3 + 0.7 * severity
    paths = [wander(rng, x, y, length, angle, 0.45, points=14)]
    if severity > 0.4:
        start = paths[0][5]
        paths.append(wander(rng, 0, 0, 0.45 * length, angle + 0.8, 0.4, points=7))
        paths[1] += start - paths[1][0]
    window = canvas.window(x, y, 1.0)
    for path in paths:
        distance, along = _lines(canvas, window, path, (x, y))
        width = (0.006 + 0.010 * severity) * (1.15 - along)
        gap = np.clip(1.5 - distance / np.maximum(width, 0.6 * canvas.px), 0, 1) * (canvas.surface[window.at] > 0.5)
        canvas.paint(window, gap * np.float32(0.55 + 0.35 * severity), (0.06, 0.055, 0.05), gloss=0.0)
        canvas.add_height(window, -gap * np.float32(0.01 + 0.02 * severity))


def stain(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A translucent spill with a darker rim."""
    radius = 0.11 + 0.16 * severity
    x, y = place(canvas, rng, radius)
    window = canvas.window(x, y, 2.2 * radius)
    distance = blob(canvas, rng, window, radius, 0.5)
    body = step(distance, 0.02, -0.03)
    rim = np.exp(-((distance / 0.018) ** 2))
    mottle = 1 + 0.15 * fractal_noise(rng, body.shape, 5)
    amount = (body * (0.5 + 0.5 * severity) * mottle + 0.45 * rim * body).astype(np.float32)
    amount *= canvas.surface[window.at]
    tint = np.asarray([(0.55, 0.42, 0.25), (0.30, 0.30, 0.36), (0.50, 0.30, 0.26)][int(rng.integers(3))], np.float32)
    part = canvas.albedo[window.at]
    part *= 1 - np.clip(amount, 0, 1)[..., None] * (1 - tint) * np.float32(0.35 + 0.45 * severity)
    canvas.gloss[window.at] += 0.25 * amount


def hole(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A punched or burnt-through hole, dark inside with a raised rim."""
    radius = 0.02 + 0.08 * severity
    x, y = place(canvas, rng, 1.5 * radius)
    window = canvas.window(x, y, 2.5 * radius)
    distance = blob(canvas, rng, window, radius, 0.35)
    inside = canvas.cover(distance, 1.5)
    rim = np.exp(-((distance / (0.25 * radius)) ** 2))
    canvas.add_height(window, rim * np.float32(0.012))
    canvas.paint(window, inside, (0.035, 0.03, 0.03), gloss=0.0)
    canvas.lift(window, inside, -0.06)


def dent(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A shallow round depression: no colour of its own, visible through its shading only."""
    radius = 0.10 + 0.10 * severity
    x, y = place(canvas, rng, radius)
    window = canvas.window(x, y, 2.5 * radius)
    distance = blob(canvas, rng, window, radius, 0.2) + radius
    canvas.add_height(window, -np.exp(-((distance / (0.65 * radius)) ** 2)) * np.float32(0.018 + 0.04 * severity))


def corrosion(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """Rough rusty patches that eat the gloss."""
    radius = 0.10 + 0.17 * severity
    x, y = place(canvas, rng, 0.6 * radius)
    window = canvas.window(x, y, 2 * radius)
    distance = blob(canvas, rng, window, radius, 0.5)
    rough = fractal_noise(rng, distance.shape, 8, octaves=4)
    amount = step(distance + 0.35 * radius * rough, 0.06, -0.05).astype(np.float32) * canvas.surface[window.at]
    shade = np.clip(1 + 0.3 * rough, 0.4, 1.6)[..., None]
    rust = np.asarray((0.46, 0.23, 0.10), np.float32) * shade
    canvas.paint(window, np.clip(amount * np.float32(0.45 + 0.5 * severity), 0, 1), rust)
    canvas.gloss[window.at] *= 1 - amount
    canvas.add_height(window, amount * rough * np.float32(0.006))


def contamination(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A hair or fibre, or crumbs, lying on the product."""
    x, y = place(canvas, rng, 0.15)
    if rng.random() < 0.55:
        path = wander(rng, x, y, 0.35 + 0.5 * severity, rng.uniform(0, 2 * np.pi), 0.35, points=12)
        window = canvas.window(x, y, 1.0)
        distance, _ = _lines(canvas, window, path, (x, y))
        radius = 0.005 + 0.011 * severity
        cover = canvas.cover(distance - radius)
        colour = [(0.10, 0.08, 0.07), (0.75, 0.72, 0.66), (0.55, 0.16, 0.13), (0.15, 0.25, 0.5)][int(rng.integers(4))]
        canvas.paint(window, cover, colour, gloss=0.15)
        canvas.add_height(window, np.float32(0.6) * np.sqrt(np.maximum(radius**2 - distance**2, 0)))
        return
    for _ in range(1 + int(rng.integers(1, int(3 + 3 * severity)))):
        cx, cy = x + rng.normal(0, 0.07), y + rng.normal(0, 0.07)
        radius = (0.012 + 0.040 * severity) * rng.uniform(0.5, 1)
        window = canvas.window(cx, cy, 2 * radius + 0.02)
        distance = blob(canvas, rng, window, radius, 0.6)
        cover = canvas.cover(distance, 1.3)
        grey = float(rng.uniform(0.2, 0.5))
        canvas.paint(window, cover, (grey * 1.1, grey * 0.95, grey * 0.75), gloss=0.05)
        canvas.add_height(window, cover * np.float32(0.7 * radius))


def burn(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A scorched spot: dark in the middle, brownish around."""
    radius = 0.06 + 0.17 * severity
    x, y = place(canvas, rng, radius)
    window = canvas.window(x, y, 2.4 * radius)
    distance = blob(canvas, rng, window, radius, 0.4)
    rough = fractal_noise(rng, distance.shape, 5)
    core = step(distance + 0.15 * radius * rough, 0.0, -0.8 * radius).astype(np.float32)
    halo = step(distance + 0.2 * radius * rough, 0.5 * radius, -0.4 * radius).astype(np.float32)
    strength = np.float32(0.25 + 0.7 * severity)
    part = canvas.albedo[window.at]
    part *= 1 - strength * halo[..., None] * np.asarray((0.35, 0.5, 0.62), np.float32)
    part *= 1 - strength * core[..., None] * np.float32(0.85)
    canvas.gloss[window.at] *= 1 - halo


def chip(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A piece broken off at an edge of the product: down to the table, or to rough pale material below."""
    edge = (canvas.surface > 0.5).astype(np.uint8)
    candidates = np.flatnonzero(edge - cv2.erode(edge, np.ones((3, 3), np.uint8), borderValue=1))
    row, column = divmod(int(rng.choice(candidates)), canvas.n)
    x, y = float(canvas.axis[column]), float(canvas.axis[row])
    radius = 0.035 + 0.09 * severity
    window = canvas.window(x, y, 2.2 * radius)
    distance = blob(canvas, rng, window, radius, 0.5)
    rough = fractal_noise(rng, distance.shape, 6)
    amount = canvas.cover(distance + 0.1 * radius * rough, 1.5) * canvas.surface[window.at]
    if canvas.backdrop is not None:
        fracture = np.exp(-((distance / 0.02) ** 2)) * canvas.surface[window.at] * np.float32(0.5)
        canvas.paint(window, fracture, canvas.albedo[window.at] * 0.6 + 0.25)
        canvas.cut(window, amount)
        return
    mean = canvas.albedo[window.at][canvas.surface[window.at] > 0.5].mean(axis=0)
    pale = (0.35 * mean + 0.65 * np.asarray((0.66, 0.62, 0.56)))[None, None] * (1 + 0.12 * rough[..., None])
    canvas.paint(window, amount * np.float32(0.55 + 0.4 * severity), pale.astype(np.float32), gloss=0.0)
    canvas.add_height(window, -amount * (np.float32(0.02 + 0.02 * severity) + 0.008 * rough))


def smear(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """Paint or print dragged along by a wipe: the colours below are blurred in one direction."""
    radius = 0.15 + 0.15 * severity
    x, y = place(canvas, rng, 0.7 * radius)
    window = canvas.window(x, y, 1.8 * radius)
    distance = blob(canvas, rng, window, radius, 0.3)
    amount = step(distance, 0.05, -0.05).astype(np.float32) * canvas.surface[window.at]
    length = int(canvas.n * (0.04 + 0.06 * severity)) | 1
    kernel = np.zeros((length, length), np.float32)
    angle = rng.uniform(0, np.pi)
    middle = length // 2
    reach = np.array([np.cos(angle), np.sin(angle)]) * middle
    ends = [tuple(round(middle + sign * float(part)) for part in reach) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1)
    dragged = cv2.filter2D(canvas.albedo, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)[window.at]
    canvas.paint(window, amount, dragged)
    canvas.gloss[window.at] *= 1 - 0.6 * amount
    canvas.height[window.at] += amount * (blur(canvas.height, 0.02 * canvas.n)[window.at] - canvas.height[window.at])


def tear(canvas: Canvas, rng: np.random.Generator, severity: float) -> None:
    """A slit from the product's edge inwards, opened to a wedge, through which the table shows."""
    solid = (canvas.surface > 0.5).astype(np.uint8)
    candidates = np.flatnonzero(solid - cv2.erode(solid, np.ones((3, 3), np.uint8), borderValue=1))
    row, column = divmod(int(rng.choice(candidates)), canvas.n)
    inwards = (
        cv2.Sobel(blur(canvas.surface, 0.02 * canvas.n), cv2.CV_32F, 1, 0),
        cv2.Sobel(blur(canvas.surface, 0.02 * canvas.n), cv2.CV_32F, 0, 1),
    )
    angle = float(np.arctan2(inwards[1][row, column], inwards[0][row, column])) + rng.normal(0, 0.3)
    start = np.array([canvas.axis[column], canvas.axis[row]])
    length = 0.08 + 0.28 * severity
    path = wander(rng, 0, 0, length, angle, 0.12)
    path += start - path[0]
    window = canvas.window(start[0], start[1], 0.5)
    distance, along = _lines(canvas, window, path, tuple(start))
    opening = (0.008 + 0.032 * severity) * (1.05 - along)
    canvas.cut(window, canvas.cover(distance - opening) * (canvas.surface[window.at] > 0.5))


STRUCTURAL: dict[str, Defect] = {
    "scratch": scratch,
    "crack": crack,
    "stain": stain,
    "hole": hole,
    "dent": dent,
    "corrosion": corrosion,
    "contamination": contamination,
    "burn": burn,
    "chip": chip,
    "tear": tear,
    "smear": smear,
}
