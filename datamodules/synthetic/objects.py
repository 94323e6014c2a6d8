"""Products with parts: steel plate, pill tray, circuit board, gasket, bottle cap, cable, gear.

Each function draws a `Scene` from a generator: one product in front of the camera, with the variation normal products
have in position, turn, size, finish and light; and what may be missing, added or misplaced on it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from datamodules.synthetic.canvas import Canvas, Window, box, fractal_noise, rotate, smooth_noise, step
from datamodules.synthetic.scene import Part, Scene, draw_light, draw_seed


class Frame:
    """The product's own coordinates in the picture: where it lies, how it is turned and how large it is."""

    def __init__(self, rng: np.random.Generator, shift: float, turn: float, zoom: float) -> None:
        self.x, self.y = rng.uniform(-shift, shift, 2).tolist()
        self.angle = float(rng.uniform(-turn, turn))
        self.scale = float(np.exp(rng.normal(0, zoom)))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Picture coordinates of a point of the product."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.x + self.scale * (c * x - s * y), self.y + self.scale * (s * x + c * y)

    def local(self, window: Window, canvas_x: float = 0.0, canvas_y: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Product coordinates of a window that is centred at (canvas_x, canvas_y)."""
        u, v = rotate(window.x + np.float32(canvas_x - self.x), window.y + np.float32(canvas_y - self.y), self.angle)
        return u / np.float32(self.scale), v / np.float32(self.scale)

    def part(self, rng: np.random.Generator, kind: str, draw, x: float, y: float, turn: float = 0.0, **more) -> Part:
        px, py = self.at(x, y)
        return Part(kind, draw, float(px), float(py), self.angle + turn, self.scale, draw_seed(rng), **more)


def moved(part: Part, x: float, y: float, turn: float = 0.0) -> Part:
    """The same part displaced by (x, y) in its product's frame and turned further."""
    c, s = math.cos(part.angle), math.sin(part.angle)
    return replace(
        part,
        x=part.x + part.scale * (c * x - s * y),
        y=part.y + part.scale * (s * x + c * y),
        angle=part.angle + turn,
    )


def brushed(canvas: Canvas, rng: np.random.Generator, angle: float, lines: float = 0.8) -> np.ndarray:
    """Fine streaks along `angle`, about unit spread."""
    n = canvas.n
    streaks = smooth_noise(rng, (n, n), (n * lines, 5)) + 0.6 * smooth_noise(rng, (n, n), (n * lines * 0.4, 3))
    turn = cv2.getRotationMatrix2D((n / 2, n / 2), -np.degrees(angle), 1.0)
    return cv2.warpAffine(streaks, turn, (n, n), borderMode=cv2.BORDER_REFLECT)


# -- steel plate -------------------------------------------------------------------------------------------------------

SCREWS = ((-0.58, -0.58), (0.58, -0.58), (-0.58, 0.58), (0.58, 0.58), (0.0, 0.0))


def steel_plate(rng: np.random.Generator) -> Scene:
    """Brushed steel plate on a dark mat, five hexagon socket screws in chamfered holes."""
    frame = Frame(rng, 0.04, 0.06, 0.02)

    def plate(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.10, 0.105, 0.11), np.float32)
        canvas.tone(whole, 1 + 0.25 * fractal_noise(rng, canvas.shape, 60, 2))
        u, v = frame.local(whole)
        inside = box(u, v, 0.86, 0.86, 0.10)
        cover = canvas.cover(inside)
        streaks = brushed(canvas, rng, frame.angle)
        cloud = fractal_noise(rng, canvas.shape, 3, 3)
        steel = np.asarray((0.53, 0.55, 0.57), np.float32) * (1 + 0.055 * streaks + 0.03 * cloud)[..., None]
        canvas.paint(whole, cover, steel, gloss=0.35)
        canvas.lift(whole, cover, 0.05 * step(inside, 0.0, -0.025) + 0.0006 * streaks)
        canvas.mark_surface(whole, cover)
        for x, y in SCREWS:
            hole = canvas.window(*frame.at(x, y), 0.16)
            distance = hole.radius - 0.072 * frame.scale
            chamfer = step(distance, 0.028, 0.0)
            canvas.add_height(hole, -0.02 * chamfer)
            canvas.paint(hole, canvas.cover(distance), (0.05, 0.05, 0.055), gloss=0.0)
            canvas.lift(hole, canvas.cover(distance), -0.03)

    parts = tuple(frame.part(rng, "screw", screw, x, y, rng.uniform(0, np.pi)) for x, y in SCREWS)
    spots = [(0.0, -0.58), (0.58, 0.0), (0.0, 0.58), (-0.58, 0.0), (0.3, 0.3), (-0.3, 0.28)]
    spare = tuple(frame.part(rng, "screw", screw, x, y, rng.uniform(0, np.pi)) for x, y in spots)
    swaps = []
    for index, part in enumerate(parts):
        direction, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.15)
        swaps.append((index, moved(part, reach * np.cos(direction), reach * np.sin(direction))))
    light = draw_light(rng, elevation=0.85, ambient=0.55)
    return Scene(plate, draw_seed(rng), light, parts, spare, tuple(swaps))


def screw(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Cylinder head with a chamfered rim and a hexagon socket."""
    radius = 0.125 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.03)
    distance = window.radius - radius
    cover = canvas.cover(distance)
    ring = 1 + 0.05 * np.sin(220 * window.radius + rng.uniform(0, 6))
    metal = np.asarray((0.62, 0.60, 0.56), np.float32) * (ring * (1 + rng.normal(0, 0.05)))[..., None]
    canvas.paint(window, cover, metal, gloss=0.6)
    canvas.lift(window, cover, 0.05 + 0.055 * step(distance, 0.0, -0.03))
    x, y = rotate(window.x, window.y, part.angle)
    turns = [np.abs(np.cos(a) * x + np.sin(a) * y) for a in (0, np.pi / 3, 2 * np.pi / 3)]
    socket = np.maximum.reduce(turns) - 0.055 * part.scale
    canvas.paint(window, canvas.cover(socket), (0.07, 0.07, 0.075), gloss=0.0)
    canvas.lift(window, canvas.cover(socket), 0.02)


# -- pill tray ---------------------------------------------------------------------------------------------------------


def pill_tray(rng: np.random.Generator) -> Scene:
    """Tray with 3 x 4 wells: nine scored white tablets and a column of three two-coloured capsules."""
    frame = Frame(rng, 0.05, 0.05, 0.02)
    columns, rows = (-0.63, -0.21, 0.21, 0.63), (-0.5, 0.0, 0.5)

    def tray(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.45, 0.52, 0.58), np.float32)
        canvas.tone(
            whole, 1 + 0.015 * fractal_noise(rng, canvas.shape, 70, 2) + 0.02 * fractal_noise(rng, canvas.shape, 3)
        )
        canvas.gloss[:] = 0.18
        canvas.height[:] = 0.10
        u, v = frame.local(whole)
        canvas.height -= 0.06 * step(box(u, v, 0.93, 0.80, 0.12), -0.02, 0.02)
        for x in columns:
            for y in rows:
                well = canvas.window(*frame.at(x, y), 0.3)
                lx, ly = frame.local(well, *frame.at(x, y))
                distance = box(lx - np.float32(x), ly - np.float32(y), 0.175, 0.215, 0.12)
                canvas.lift(well, step(distance, 0.01, -0.035), 0.035)
                canvas.tone(well, 1 - 0.08 * step(distance, 0.0, -0.04))

    def fill(x: float, y: float) -> Part:
        jitter = rng.uniform(-0.022, 0.022, 2)
        kind, draw = ("capsule", capsule) if x > 0.5 else ("tablet", tablet)
        turn = rng.normal(0, 0.10) + np.pi * rng.integers(2) if x > 0.5 else rng.uniform(0, np.pi)
        return frame.part(rng, kind, draw, x + jitter[0], y + jitter[1], turn)

    parts = tuple(fill(x, y) for x in columns for y in rows)
    spots = [(0.0, 0.25), (0.42, -0.25), (-0.42, 0.25), (0.0, -0.25), (-0.21, 0.1), (0.42, 0.3)]
    spare = tuple(
        frame.part(rng, "tablet", tablet if rng.random() < 0.5 else capsule, x, y, rng.uniform(0, np.pi))
        for x, y in spots
    )
    wrong = {"tablet": ("capsule", capsule), "capsule": ("tablet", tablet)}
    swaps = tuple((i, replace(p, kind=wrong[p.kind][0], draw=wrong[p.kind][1])) for i, p in enumerate(parts))
    return Scene(tray, draw_seed(rng), draw_light(rng, elevation=0.95, ambient=0.6), parts, spare, swaps)


def tablet(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Round white tablet with a score line."""
    radius = 0.145 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.02)
    distance = window.radius - radius
    cover = canvas.cover(distance)
    chalk = np.asarray((0.88, 0.87, 0.84), np.float32) * (1 + 0.02 * fractal_noise(rng, cover.shape, 14, 2))[..., None]
    canvas.paint(window, cover, chalk, gloss=0.06)
    x, _ = rotate(window.x, window.y, part.angle)
    dome = 0.09 + 0.05 * np.sqrt(np.clip(1 - (window.radius / (1.08 * radius)) ** 2, 0, 1))
    canvas.lift(window, cover, dome - 0.014 * np.exp(-((x / 0.012) ** 2)))
    canvas.mark_surface(window, cover)


def capsule(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Two-coloured gelatine capsule lying down, glossy."""
    radius = 0.088 * part.scale
    window = canvas.window(part.x, part.y, 0.26)
    x, y = rotate(window.x, window.y, part.angle)
    distance = box(x, y, radius, 0.185 * part.scale, radius)
    cover = canvas.cover(distance)
    red = step(y, -0.006, 0.006)[..., None]
    colour = red * np.asarray((0.66, 0.13, 0.11), np.float32) + (1 - red) * np.asarray((0.90, 0.80, 0.52), np.float32)
    canvas.paint(window, cover, colour * np.float32(1 + rng.normal(0, 0.03)), gloss=0.9)
    depth = np.clip(-distance / radius, 0, 1)
    profile = np.sqrt(np.clip(1 - (1 - depth) ** 2, 0, 1))
    canvas.lift(window, cover, 0.045 + radius * profile + 0.006 * red[..., 0])
    canvas.mark_surface(window, cover)


# -- circuit board -----------------------------------------------------------------------------------------------------

RESISTORS = (
    (-0.62, -0.66, 0), (-0.34, -0.66, 0), (-0.06, -0.66, 0), (-0.66, 0.10, 1), (-0.66, 0.36, 1),
    (0.62, -0.10, 1), (0.36, 0.62, 0), (0.66, 0.62, 0),
)  # fmt: skip
EMPTY_PADS = ((-0.66, 0.64, 1), (0.30, -0.10, 1), (-0.36, 0.66, 0))
_TRACES = (
    ((-0.75, -0.66), (-0.86, -0.55), (-0.86, 0.80), (-0.40, 0.80)),
    ((-0.20, -0.66), (-0.20, -0.36)), ((0.08, -0.66), (0.20, -0.54), (0.42, -0.54)),
    ((-0.66, 0.23), (-0.50, 0.10), (-0.36, 0.10)), ((-0.66, 0.00), (-0.52, -0.10), (-0.36, -0.10)),
    ((0.10, -0.02), (0.44, -0.02), (0.62, -0.22)), ((0.10, 0.10), (0.50, 0.10), (0.62, 0.02)),
    ((-0.12, 0.36), (-0.12, 0.62), (0.24, 0.62)), ((0.04, 0.36), (0.04, 0.50), (0.56, 0.50), (0.56, 0.62)),
    ((-0.28, 0.36), (-0.28, 0.54), (-0.50, 0.54), (-0.66, 0.46)), ((0.85, -0.85), (0.85, 0.85), (0.1, 0.85)),
    ((-0.48, -0.66), (-0.48, -0.40), (-0.36, -0.28)), ((0.56, -0.30), (0.56, -0.22)),
)  # fmt: skip
_VIAS = (
    (-0.86, 0.2),
    (0.2, -0.54),
    (0.44, -0.02),
    (-0.12, 0.52),
    (0.85, 0.3),
    (-0.5, 0.54),
    (0.3, 0.85),
    (-0.48, -0.5),
)


def circuit_board(rng: np.random.Generator) -> Scene:
    """Green circuit board: a chip, eight resistors, two capacitors, traces and vias."""
    frame = Frame(rng, 0.03, 0.03, 0.015)

    def board(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.05, 0.25, 0.14), np.float32)
        canvas.tone(
            whole, 1 + 0.06 * fractal_noise(rng, canvas.shape, 90, 2) + 0.04 * fractal_noise(rng, canvas.shape, 3)
        )
        canvas.gloss[:] = 0.22
        canvas.surface[:] = 1
        zoom = 4
        lines = np.zeros((canvas.n * zoom, canvas.n * zoom), np.uint8)
        for trace in _TRACES:
            points = (np.array([frame.at(*point) for point in trace]) + 1) / 2 * canvas.n * zoom
            cv2.polylines(lines, [points.astype(np.int32)], False, 255, round(0.011 * canvas.n * zoom))
        traces = cv2.resize(lines, canvas.shape, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        canvas.paint(whole, traces, np.asarray((0.13, 0.43, 0.22), np.float32))
        canvas.height += 0.004 * traces
        for x, y in _VIAS:
            via = canvas.window(*frame.at(x, y), 0.05)
            canvas.paint(via, canvas.cover(via.radius - 0.032), (0.70, 0.58, 0.30), gloss=0.6)
            canvas.paint(via, canvas.cover(via.radius - 0.014), (0.03, 0.03, 0.03), gloss=0.0)
        for x, y, upright in RESISTORS + EMPTY_PADS:
            for side in (-1, 1):
                dx, dy = (0, 0.075 * side) if upright else (0.075 * side, 0)
                pad = canvas.window(*frame.at(x + dx, y + dy), 0.09)
                lx, ly = rotate(pad.x, pad.y, frame.angle)
                cover = canvas.cover(box(lx, ly, 0.045, 0.045, 0.01))
                canvas.paint(pad, cover, (0.66, 0.66, 0.64), gloss=0.7)
                canvas.add_height(pad, 0.012 * cover)
            outline = canvas.window(*frame.at(x, y), 0.2)
            lx, ly = rotate(outline.x, outline.y, frame.angle)
            edge = np.abs(box(lx, ly, *((0.075, 0.15) if upright else (0.15, 0.075)))) - 0.005
            canvas.paint(outline, canvas.cover(edge) * np.float32(0.8), (0.82, 0.84, 0.80), gloss=0.05)

    resistors = [
        frame.part(rng, "resistor", resistor, x, y, np.pi / 2 * up + rng.normal(0, 0.03)) for x, y, up in RESISTORS
    ]
    others = [
        frame.part(rng, "chip", chip_package, -0.12, 0.0, rng.normal(0, 0.008), removable=False),
        frame.part(rng, "capacitor", capacitor, 0.56, -0.52, rng.normal(0, 0.05)),
        frame.part(rng, "capacitor", capacitor, 0.36, 0.27, rng.normal(0, 0.05)),
    ]
    spare = tuple(
        frame.part(rng, "resistor", resistor, x, y, np.pi / 2 * up + rng.normal(0, 0.03)) for x, y, up in EMPTY_PADS
    )
    ways = [(0.05, 0.06, 0.5), (0.0, 0.08, 0.0), (0.02, -0.05, -0.6), (0.09, 0.0, 0.25)]
    swaps = [(i, moved(part, *ways[int(rng.integers(4))])) for i, part in enumerate(resistors)]
    swaps += [(i, replace(others[i - 8], angle=others[i - 8].angle + np.pi)) for i in (9, 10)]
    light = draw_light(rng, elevation=0.9, ambient=0.6)
    return Scene(board, draw_seed(rng), light, (*resistors, *others), spare, tuple(swaps))


def resistor(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Chip resistor: black body, tinned ends, a printed value."""
    window = canvas.window(part.x, part.y, 0.2)
    x, y = rotate(window.x, window.y, part.angle)
    distance = box(x, y, 0.105 * part.scale, 0.052 * part.scale, 0.006)
    cover = canvas.cover(distance)
    canvas.paint(window, cover, (0.075, 0.075, 0.08), gloss=0.2)
    canvas.lift(window, cover, 0.042)
    ends = cover * step(np.abs(x), 0.068 * part.scale, 0.076 * part.scale)
    canvas.paint(window, ends, (0.72, 0.72, 0.70), gloss=0.7)
    digit = np.minimum(np.abs(np.abs(x) - 0.022), np.abs(x)) < 0.007
    print_ = cover * digit * (np.abs(y) < 0.022)
    canvas.paint(window, print_.astype(np.float32) * np.float32(0.7), (0.8, 0.8, 0.78))


def chip_package(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Square flat package with pins on four sides and a dot at pin 1."""
    window = canvas.window(part.x, part.y, 0.5)
    x, y = rotate(window.x, window.y, part.angle)
    half = 0.24 * part.scale
    comb = lambda t: step(np.abs(((t / (0.08 * part.scale)) % 1.0) - 0.5), 0.30, 0.22)  # noqa: E731
    for along, out in ((x, y), (y, x)):
        pins = comb(along) * canvas.cover(box(along, out, half - 0.01, half + 0.085))
        canvas.paint(window, pins, (0.70, 0.70, 0.68), gloss=0.6)
        canvas.lift(window, pins, 0.02)
    body = canvas.cover(box(x, y, half + 0.03, half + 0.03, 0.015))
    resin = np.asarray((0.085, 0.085, 0.09), np.float32) * (1 + 0.08 * fractal_noise(rng, body.shape, 60, 2))[..., None]
    canvas.paint(window, body, resin, gloss=0.12)
    canvas.lift(window, body, 0.06)
    dot = canvas.cover(np.hypot(x + half - 0.04, y + half - 0.04) - 0.022)
    canvas.paint(window, dot, (0.55, 0.55, 0.55))
    for row, width in ((-0.05, 0.13), (0.02, 0.16), (0.09, 0.09)):
        glyphs = (np.abs(((x * 17) % 1.0) - 0.5) < 0.33) & (np.abs(y - row) < 0.016) & (np.abs(x) < width)
        canvas.paint(window, glyphs.astype(np.float32) * np.float32(0.5), (0.6, 0.6, 0.58))


def capacitor(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Electrolytic capacitor seen from above: aluminium can with a black mark on its negative side."""
    radius = 0.135 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.04)
    x, y = rotate(window.x, window.y, part.angle)
    base = canvas.cover(box(x, y, radius + 0.015, radius + 0.015, 0.03))
    canvas.paint(window, base, (0.06, 0.06, 0.065), gloss=0.15)
    canvas.lift(window, base, 0.03)
    distance = window.radius - radius
    can = canvas.cover(distance)
    canvas.paint(window, can, np.asarray((0.66, 0.67, 0.68), np.float32), gloss=0.35)
    canvas.lift(window, can, 0.13 + 0.02 * step(distance, 0.0, -0.025))
    mark = canvas.cover(distance + 0.02) * step(x, -0.06, -0.068)
    canvas.paint(window, mark, (0.08, 0.08, 0.09), gloss=0.15)


# -- gasket ------------------------------------------------------------------------------------------------------------


def gasket(rng: np.random.Generator) -> Scene:
    """Black rubber gasket with six bolt holes on a light table, at any turn."""
    frame = Frame(rng, 0.09, np.pi, 0.035)

    def ring(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.70, 0.70, 0.68), np.float32)
        canvas.tone(
            whole, 1 + 0.02 * fractal_noise(rng, canvas.shape, 40, 2) + 0.025 * fractal_noise(rng, canvas.shape, 3)
        )
        canvas.keep_backdrop()
        u, v = frame.local(whole)
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        outer = radius - (0.70 + 0.05 * np.cos(6 * angle))
        distance = np.maximum(outer, 0.40 - radius)
        cover = canvas.cover(distance)
        rubber = (
            np.asarray((0.125, 0.125, 0.13), np.float32)
            * (1 + 0.10 * fractal_noise(rng, canvas.shape, 80, 2))[..., None]
        )
        canvas.paint(whole, cover, rubber, gloss=0.22)
        bead = np.exp(-(((radius - 0.465) / 0.022) ** 2))
        canvas.lift(whole, cover, 0.05 * step(distance, 0.0, -0.02) + 0.02 * bead)
        canvas.mark_surface(whole, cover)

    def bolt(turn: float, reach: float = 0.60) -> Part:
        return frame.part(rng, "hole", through_hole, reach * np.cos(turn), reach * np.sin(turn))

    turns = [k * np.pi / 3 for k in range(6)]
    parts = tuple(bolt(turn) for turn in turns)
    spare = tuple(bolt(turn + np.pi / 6, 0.565) for turn in turns)
    swaps = tuple((i, bolt(turn + rng.choice([-1, 1]) * rng.uniform(0.15, 0.30), 0.58)) for i, turn in enumerate(turns))
    return Scene(ring, draw_seed(rng), draw_light(rng, ambient=0.65), parts, spare, swaps)


def through_hole(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """A round hole through the product."""
    radius = 0.062 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.03)
    canvas.cut(window, canvas.cover(window.radius - radius))


# -- bottle cap --------------------------------------------------------------------------------------------------------


def bottle_cap(rng: np.random.Generator) -> Scene:
    """Red crown cap with 21 flutes and a printed star in a ring, at any turn."""
    frame = Frame(rng, 0.08, np.pi, 0.03)
    hue = rng.normal(0, 0.03)

    def cap(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.34, 0.36, 0.38), np.float32)
        canvas.tone(
            whole, 1 + 0.08 * brushed(canvas, rng, 0.3, 0.3) * 0.4 + 0.03 * fractal_noise(rng, canvas.shape, 60, 2)
        )
        canvas.keep_backdrop()
        u, v = frame.local(whole)
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        flute = np.cos(21 * angle)
        distance = radius - (0.76 + 0.030 * flute)
        cover = canvas.cover(distance)
        canvas.paint(whole, cover, (0.60 + hue, 0.09, 0.10), gloss=0.75)
        skirt = np.clip((radius - 0.58) / 0.18, 0, 1)
        profile = 0.20 - 0.17 * skirt**1.6 + 0.022 * skirt * flute + 0.012 * np.exp(-(((radius - 0.50) / 0.04) ** 2))
        canvas.lift(whole, cover, profile + 0.0006 * fractal_noise(rng, canvas.shape, 30, 2))
        canvas.mark_surface(whole, cover)

    logo = frame.part(rng, "print", star, 0.0, 0.0, rng.normal(0, 0.02))
    swaps = []
    for _ in range(4):
        direction, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.07, 0.13)
        swaps.append((0, moved(logo, reach * np.cos(direction), reach * np.sin(direction))))
    light = draw_light(rng, elevation=0.95, ambient=0.55)
    return Scene(cap, draw_seed(rng), light, (logo,), (), tuple(swaps))


def star(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Five-pointed star in a double ring, printed in white and gold."""
    window = canvas.window(part.x, part.y, 0.52 * part.scale)
    x, y = rotate(window.x / part.scale, window.y / part.scale, part.angle)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    off_tip = np.abs((angle * 5 / (2 * np.pi) + 0.5) % 1.0 - 0.5) * (2 * np.pi / 5)
    edge = radius * (math.sin(0.32) * np.cos(off_tip) + math.cos(0.32) * np.sin(off_tip)) - 0.27 * math.sin(0.32)
    canvas.paint(window, canvas.cover(edge), (0.90, 0.88, 0.82), gloss=0.5)
    canvas.paint(window, canvas.cover(np.abs(radius - 0.40) - 0.016), (0.90, 0.88, 0.82), gloss=0.5)
    canvas.paint(window, canvas.cover(np.abs(radius - 0.35) - 0.007), (0.80, 0.62, 0.25), gloss=0.6)


# -- cable -------------------------------------------------------------------------------------------------------------

INSULATION = ((0.44, 0.24, 0.13), (0.12, 0.26, 0.56), (0.55, 0.60, 0.14))


def cable(rng: np.random.Generator) -> Scene:
    """Cut through a cable: grey sheath, filler, a brown, a blue and a green wire of copper strands."""
    frame = Frame(rng, 0.05, 0.12, 0.025)

    def sheath(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.07, 0.075, 0.085), np.float32)
        canvas.tone(whole, 1 + 0.12 * fractal_noise(rng, canvas.shape, 6))
        canvas.keep_backdrop()
        u, v = frame.local(whole)
        radius = np.hypot(u, v) + 0.006 * smooth_noise(rng, canvas.shape, 6)
        cut = brushed(canvas, rng, 0.4, 0.25)
        outer = canvas.cover(radius - 0.88)
        grey = (
            np.asarray((0.46, 0.47, 0.48), np.float32)
            * (1 + 0.03 * cut + 0.03 * fractal_noise(rng, canvas.shape, 40, 2))[..., None]
        )
        canvas.paint(whole, outer, grey, gloss=0.1)
        canvas.lift(whole, outer, 0.06 * step(radius, 0.88, 0.85) + 0.0008 * cut)
        canvas.mark_surface(whole, outer)
        inner = canvas.cover(radius - 0.77)
        filler = (
            np.asarray((0.70, 0.69, 0.65), np.float32) * (1 + 0.05 * fractal_noise(rng, canvas.shape, 30, 3))[..., None]
        )
        canvas.paint(whole, inner, filler, gloss=0.03)
        canvas.lift(whole, inner, 0.045 + 0.002 * fractal_noise(rng, canvas.shape, 30, 2))
        for turn in _WIRE_TURNS:
            seat = canvas.window(*frame.at(0.40 * np.cos(turn), 0.40 * np.sin(turn)), 0.42)
            cover = canvas.cover(seat.radius - 0.335 * frame.scale)
            canvas.paint(seat, cover, (0.10, 0.10, 0.10), gloss=0.0)
            canvas.lift(seat, cover, -0.04)

    parts = tuple(
        frame.part(rng, "wire", wire, 0.40 * np.cos(t), 0.40 * np.sin(t), rng.uniform(0, 1), colour=c)
        for t, c in zip(_WIRE_TURNS, INSULATION, strict=True)
    )
    swaps = tuple((i, replace(p, colour=INSULATION[(i + s) % 3])) for i, p in enumerate(parts) for s in (1, 2))
    return Scene(sheath, draw_seed(rng), draw_light(rng, elevation=0.95), parts, (), swaps)


_WIRE_TURNS = (-np.pi / 2, np.pi / 6, 5 * np.pi / 6)


def wire(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """Insulation around 19 copper strands."""
    radius = 0.325 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.02)
    cover = canvas.cover(window.radius - radius)
    grain = 1 + 0.03 * fractal_noise(rng, cover.shape, 20, 2)
    canvas.paint(window, cover, np.asarray(part.colour, np.float32) * grain[..., None], gloss=0.15)
    canvas.lift(window, cover, 0.06 + 0.012 * step(window.radius, radius, radius - 0.03))
    core = 0.225 * part.scale
    canvas.paint(window, canvas.cover(window.radius - core), (0.09, 0.05, 0.03), gloss=0.0)
    canvas.lift(window, canvas.cover(window.radius - core), 0.02)
    thick = core / 5.0
    places = [(0.0, 0.0)]
    places += [(2 * thick * np.cos(a), 2 * thick * np.sin(a)) for a in np.arange(6) * np.pi / 3 + part.angle]
    places += [
        (3.95 * thick * np.cos(a), 3.95 * thick * np.sin(a)) for a in np.arange(12) * np.pi / 6 + 1.3 * part.angle
    ]
    for x, y in places:
        dx, dy = rng.normal(0, 0.004, 2)
        strand = canvas.window(part.x + x + dx, part.y + y + dy, thick + 0.02)
        inside = canvas.cover(strand.radius - thick)
        shade = np.float32(1 + rng.normal(0, 0.10))
        canvas.paint(strand, inside, np.asarray((0.74, 0.43, 0.25), np.float32) * shade, gloss=0.55)
        tilt = rng.normal(0, 0.12, 2)
        canvas.lift(
            strand, inside, (0.05 + tilt[0] * strand.x + tilt[1] * strand.y + rng.normal(0, 0.006)).astype(np.float32)
        )


# -- gear --------------------------------------------------------------------------------------------------------------


def gear(rng: np.random.Generator) -> Scene:
    """Turned steel gear with 18 teeth, a keyed bore and five lightening holes, at any turn."""
    frame = Frame(rng, 0.06, np.pi, 0.025)

    def wheel(canvas: Canvas, rng: np.random.Generator) -> None:
        whole = canvas.everywhere()
        canvas.albedo[:] = np.asarray((0.16, 0.20, 0.26), np.float32)
        canvas.tone(whole, 1 + 0.10 * fractal_noise(rng, canvas.shape, 70, 2))
        canvas.keep_backdrop()
        u, v = frame.local(whole)
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        tooth = np.tanh(2.2 * np.cos(18 * angle) + 0.1) / np.tanh(2.2)
        distance = radius - (0.745 + 0.065 * tooth)
        key = box(u - 0.20, v, 0.09, 0.05)
        distance = np.maximum(distance, -np.minimum(radius - 0.19, key))
        cover = canvas.cover(distance)
        turning = np.interp(radius, np.linspace(0, 1.6, 400), rng.normal(0, 1, 400)).astype(np.float32)
        sheen = np.cos(2 * (np.arctan2(whole.y - frame.y, whole.x - frame.x)) + 0.6)
        steel = np.asarray((0.55, 0.55, 0.545), np.float32)
        steel = steel * (1 + 0.06 * turning + 0.10 * sheen + 0.03 * fractal_noise(rng, canvas.shape, 4))[..., None]
        canvas.paint(whole, cover, steel, gloss=0.3)
        web = step(radius, 0.32, 0.35) * step(radius, 0.64, 0.61)
        canvas.lift(whole, cover, 0.10 * step(distance, 0.0, -0.02) - 0.035 * web + 0.0008 * turning)
        canvas.mark_surface(whole, cover)

    def opening(turn: float) -> Part:
        return frame.part(rng, "hole", lightening_hole, 0.48 * np.cos(turn), 0.48 * np.sin(turn))

    turns = [k * 2 * np.pi / 5 + 0.63 for k in range(5)]
    parts = tuple(opening(turn) for turn in turns)
    spare = tuple(opening(turn + np.pi / 5) for turn in turns)
    swaps = tuple((i, opening(turn + rng.choice([-1, 1]) * rng.uniform(0.2, 0.45))) for i, turn in enumerate(turns))
    return Scene(wheel, draw_seed(rng), draw_light(rng, elevation=0.85, ambient=0.5), parts, spare, swaps)


def lightening_hole(canvas: Canvas, part: Part, rng: np.random.Generator) -> None:
    """A round hole through the web."""
    radius = 0.092 * part.scale
    window = canvas.window(part.x, part.y, radius + 0.03)
    canvas.cut(window, canvas.cover(window.radius - radius))
