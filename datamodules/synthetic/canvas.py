"""A small renderer: colour, height and gloss of a surface -> what an inspection camera would see of it.

Coordinates: x to the right, y down, the image spans [-1, 1] in both, heights are in the same unit. Colours are
(red, green, blue) in [0, 1]. Everything is float32 and depends on numpy's generator alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

Colour = tuple[float, float, float]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[float, float] | float) -> np.ndarray:
    """Noise of about unit spread with `cells` (down, across) features per image; float32 `shape`."""
    down, across = (cells, cells) if isinstance(cells, int | float) else cells
    grid = rng.standard_normal((max(2, round(down)) + 2, max(2, round(across)) + 2), dtype=np.float32)
    return cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: float, octaves: int = 4, gain: float = 0.55
) -> np.ndarray:
    """Sum of smooth noises of doubling frequency, scaled to about unit spread; float32 `shape`."""
    total = np.zeros(shape, np.float32)
    weight, square = 1.0, 0.0
    for octave in range(octaves):
        cells_here = min(cells * 2**octave, shape[0])
        total += np.float32(weight) * smooth_noise(rng, shape, cells_here)
        square += weight**2
        weight *= gain
    return total / np.float32(square**0.5)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with `sigma` in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0.05 else image


def step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high` (which may lie below `low`)."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame turned by `angle` (radians, clockwise on screen)."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float, radius: float = 0.0) -> np.ndarray:
    """Signed distance to a rectangle with rounded corners; negative inside."""
    dx, dy = np.abs(x) - (half_width - radius), np.abs(y) - (half_height - radius)
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - np.float32(radius)


def polyline(x: np.ndarray, y: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a polyline (points (P, 2)) and the position along it in [0, 1] of the nearest point."""
    best = np.full(np.broadcast(x, y).shape, np.inf, np.float32)
    along = np.zeros_like(best)
    pieces = len(points) - 1
    for number, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        dx, dy = np.float32(x1 - x0), np.float32(y1 - y0)
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1).astype(np.float32)
        distance = np.hypot(x - x0 - t * dx, y - y0 - t * dy)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        along = np.where(nearer, (number + t) / pieces, along)
    return best, along


@dataclass(frozen=True)
class Light:
    """Where the lamp is and how the camera behaves; drawn anew for every photograph."""

    azimuth: float
    elevation: float = 0.9
    ambient: float = 0.5
    exposure: float = 1.0
    tint: Colour = (1.0, 1.0, 1.0)
    vignette: float = 0.15
    falloff: float = 0.1
    focus: float = 0.5
    noise: float = 0.012


class Window:
    """A square part of the canvas around (x, y), with local coordinates `x`, `y` as broadcastable grids."""

    def __init__(self, canvas: Canvas, x: float, y: float, reach: float) -> None:
        low_x, high_x = canvas.pixel(x - reach), canvas.pixel(x + reach) + 1
        low_y, high_y = canvas.pixel(y - reach), canvas.pixel(y + reach) + 1
        self.at = (slice(max(low_y, 0), max(high_y, 0)), slice(max(low_x, 0), max(high_x, 0)))
        self.x = canvas.axis[self.at[1]][None, :] - np.float32(x)
        self.y = canvas.axis[self.at[0]][:, None] - np.float32(y)

    @property
    def radius(self) -> np.ndarray:
        return np.hypot(self.x, self.y)

    @property
    def angle(self) -> np.ndarray:
        return np.arctan2(self.y, self.x)


class Canvas:
    """Albedo (n, n, 3), height (n, n), gloss (n, n) and `surface` (n, n), where the product under inspection is."""

    def __init__(self, n: int, colour: Colour = (0.5, 0.5, 0.5)) -> None:
        self.n = n
        self.px = 2.0 / n
        self.axis = ((np.arange(n, dtype=np.float32) + 0.5) * 2 / n - 1).astype(np.float32)
        self.albedo = np.empty((n, n, 3), np.float32)
        self.albedo[:] = colour
        self.height = np.zeros((n, n), np.float32)
        self.gloss = np.zeros((n, n), np.float32)
        self.surface = np.zeros((n, n), np.float32)
        self.backdrop: np.ndarray | None = None
        """Albedo (n, n, 3) of what lies below the product, seen where a piece is gone; None if it fills the view."""

    def copy(self) -> Canvas:
        """An independent canvas with the same content."""
        other = copy.copy(self)
        for name in ("albedo", "height", "gloss", "surface"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def keep_backdrop(self) -> None:
        """Declare what is painted so far as lying below the product."""
        self.backdrop = self.albedo.copy()

    def cut(self, window: Window, cover: np.ndarray) -> None:
        """Take the product away where `cover` is 1, down to the backdrop; ValueError without one."""
        if self.backdrop is None:
            raise ValueError("nothing lies below this product: paint what does and call keep_backdrop before cut")
        part = self.albedo[window.at]
        part += cover[..., None] * (self.backdrop[window.at] - part)
        self.gloss[window.at] *= 1 - cover
        self.surface[window.at] *= 1 - cover
        self.height[window.at] *= 1 - cover

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n

    def pixel(self, coordinate: float) -> int:
        """Index of the pixel that holds a coordinate; outside the image it lies outside [0, n)."""
        return int(np.floor((coordinate + 1) / 2 * self.n))

    def everywhere(self) -> Window:
        return Window(self, 0, 0, 1)

    def window(self, x: float, y: float, reach: float) -> Window:
        return Window(self, x, y, reach)

    def cover(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """Coverage in [0, 1] of a shape given by signed distance, antialiased over `softness` pixels."""
        return np.clip(0.5 - distance / np.float32(self.px * softness), 0, 1)

    def paint(self, window: Window, cover: np.ndarray, colour: Colour | np.ndarray, gloss: float | None = None) -> None:
        """Lay a colour, (3,) or (h, w, 3), over the window where `cover` is 1; set the gloss there too if given."""
        part = self.albedo[window.at]
        part += cover[..., None] * (np.asarray(colour, np.float32) - part)
        if gloss is not None:
            self.gloss[window.at] += cover * (np.float32(gloss) - self.gloss[window.at])

    def tone(self, window: Window, factor: np.ndarray) -> None:
        """Multiply the albedo by `factor` (h, w)."""
        self.albedo[window.at] *= factor[..., None]

    def lift(self, window: Window, cover: np.ndarray, height: np.ndarray | float) -> None:
        """Replace the height by `height` where `cover` is 1."""
        part = self.height[window.at]
        part += cover * (height - part)

    def add_height(self, window: Window, height: np.ndarray) -> None:
        self.height[window.at] += height

    def mark_surface(self, window: Window, cover: np.ndarray, value: float = 1.0) -> None:
        """Declare part of the image as (value 1) or as not (value 0) the surface on which defects occur."""
        self.surface[window.at] += cover * (np.float32(value) - self.surface[window.at])

    def photograph(self, light: Light) -> np.ndarray:
        """Shade the scene: float32 (n, n, 3) in [0, 1] before noise."""
        scale = np.float32(1 / (8 * self.px))
        height = blur(self.height, 0.6)
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, borderType=cv2.BORDER_REPLICATE) * scale
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, borderType=cv2.BORDER_REPLICATE) * scale
        length = np.sqrt(1 + slope_x**2 + slope_y**2)
        flat, lz = math.cos(light.elevation), math.sin(light.elevation)
        lx, ly = flat * math.cos(light.azimuth), flat * math.sin(light.azimuth)
        diffuse = np.maximum(0, (-slope_x * lx - slope_y * ly + lz) / length)
        norm = math.sqrt(flat**2 + (lz + 1) ** 2)
        facing = np.maximum(0, (-slope_x * (lx / norm) - slope_y * (ly / norm) + (lz + 1) / norm) / length)
        highlight = facing**40 * self.gloss
        lit = 1 - self._shadow(lx, ly, lz)
        hollow = np.clip((self._surroundings() - self.height) * 8, 0, 0.5)
        shade = light.ambient * (1 - hollow) + (1.25 - light.ambient) * (diffuse / lz) * lit
        image = self.albedo * shade[..., None]
        image += (0.55 * highlight * lit)[..., None]
        y, x = self.axis[:, None], self.axis[None, :]
        field = 1 - light.vignette * 0.5 * (x * x + y * y) + light.falloff * (x * lx + y * ly)
        image *= (light.exposure * field)[..., None] * np.asarray(light.tint, np.float32)
        bright = image > 0.8
        image[bright] = 0.8 + 0.2 * np.tanh((image[bright] - 0.8) * 5)  # a film-like shoulder instead of clipping
        return blur(image, light.focus)

    def _shadow(self, lx: float, ly: float, lz: float) -> np.ndarray:
        """Soft cast shadows in [0, 1]: how far higher ground towards the lamp rises above the ray to it."""
        half = self.n // 2, self.n // 2
        height = cv2.resize(self.height, half, interpolation=cv2.INTER_AREA)
        towards = math.hypot(lx, ly)
        rise = lz / towards
        deepest = np.zeros_like(height)
        for distance in (0.02, 0.045, 0.08, 0.13):
            shift = distance / (2 * self.px * towards)
            move = np.array([[1, 0, -shift * lx], [0, 1, -shift * ly]], np.float32)
            ground = cv2.warpAffine(height, move, half, borderMode=cv2.BORDER_REPLICATE)
            deepest = np.maximum(deepest, ground - height - distance * rise)
        return self._grown(blur(0.75 * step(deepest, 0.0, 0.03), 0.012 * half[0]))

    def _grown(self, small: np.ndarray) -> np.ndarray:
        return cv2.resize(small, self.shape, interpolation=cv2.INTER_LINEAR)

    def _surroundings(self) -> np.ndarray:
        """Mean height around each pixel."""
        quarter = max(8, self.n // 4)
        small = cv2.resize(self.height, (quarter, quarter), interpolation=cv2.INTER_AREA)
        return self._grown(blur(small, 0.035 * quarter))


@lru_cache(maxsize=4)
def _grain(n: int) -> np.ndarray:
    """Sensor noise of about unit spread, partly common to the colours; float32 (2 n, 2 n, 3)."""
    rng = np.random.default_rng(n)
    common = rng.standard_normal((2 * n, 2 * n, 1), dtype=np.float32)
    return np.float32(0.8) * common + np.float32(0.6) * rng.standard_normal((2 * n, 2 * n, 3), dtype=np.float32)


def expose(image: np.ndarray, light: Light, rng: np.random.Generator) -> np.ndarray:
    """Add the sensor's shot and read noise and quantise: float32 (n, n, 3) in [0, 1] -> uint8.

    The noise is a window at random of a field that is made once: drawing it for each image took a third of the time.
    """
    n = image.shape[0]
    down, across = rng.integers(0, n, 2)
    grain = _grain(n)[down : down + n, across : across + n]
    level = np.sqrt(0.25 + np.clip(image[..., 1:2], 0, 1)) * np.float32(light.noise * 255)
    return np.clip(image * 255 + (grain * level + 0.5), 0, 255).astype(np.uint8)
