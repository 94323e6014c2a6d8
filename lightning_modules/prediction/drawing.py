"""Pictures of a prediction at the photograph's own size: original, map, outlines, and what the colours mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINE = (0, 229, 255)
"""Of outlines: a colour that products and heat maps seldom have, on black."""
LONGEST = 65_000
"""Pixels of a side of a JPEG file, which allows 65,535."""
NARROWEST = 420
"""Pixels that the words below the panels need."""
COLOURS = {"good": (27, 94, 32), "defect": (179, 38, 30), "cannot tell": (122, 82, 0)}


def panels(
    photo: np.ndarray,
    values: np.ndarray,
    above: np.ndarray,
    scale: tuple[float, float],
    seen: tuple[int, int, int, int] | None = None,
) -> list[np.ndarray]:
    """Original, map and outlines of a photograph.

    Args:
        photo: uint8 (H, W, 3), RGB.
        values: Its map, float (H, W).
        above: bool (H, W), what is outlined.
        scale: The map's values at the two ends of the colours.
        seen: Top, left, height and width of what the network saw, if that is not everything; it is framed.

    Returns:
        Three uint8 (H, W, 3), RGB.
    """
    # Before the heat map's colours, so that a photograph of that size needs no floats of three channels.
    grey = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    heat = cv2.addWeighted(grey, 0.35, colours(values, *scale), 0.65, 0)
    thickness = max(1, round(min(photo.shape[:2]) / 200))
    outlined = photo.copy()
    if above.any():
        around = cv2.dilate(above.view(np.uint8), np.ones((2 * thickness + 1,) * 2, np.uint8))
        lines, _ = cv2.findContours(around, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(outlined, lines, -1, (0, 0, 0), 2 * thickness + 1)
        cv2.drawContours(outlined, lines, -1, LINE, thickness)
    if seen is not None:
        top, left, height, width = seen
        for picture in (heat, outlined):
            cv2.rectangle(picture, (left, top), (left + width - 1, top + height - 1), (255, 255, 255), 1)
    return [photo, heat, outlined]


def small_panels(
    photo: np.ndarray,
    values: np.ndarray,
    above: np.ndarray,
    scale: tuple[float, float],
    seen: tuple[int, int, int, int] | None = None,
    longest: int = 420,
) -> list[np.ndarray]:
    """As `panels`, with a longer side of at most `longest` pixels; no outline vanishes."""
    factor = min(1.0, longest / max(photo.shape[:2]))
    size = tuple(max(1, round(side * factor)) for side in photo.shape[1::-1])
    photo, values = (cv2.resize(array, size, interpolation=cv2.INTER_AREA) for array in (photo, values))
    above = cv2.resize(above.view(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 0
    return panels(photo, values, above, scale, seen and tuple(round(edge * factor) for edge in seen))


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map (H, W) in the colours of `inferno`, uint8 (H, W, 3), RGB; `low` and `high` are its two ends."""
    factor = 255 / max(high - low, 1e-12)
    levels = values - np.float32(low)  # in place from here on: photographs are large
    levels *= np.float32(factor)
    levels = np.clip(levels, 0, 255, out=levels).astype(np.uint8)
    return cv2.applyColorMap(levels, _inferno())


@functools.cache
def _inferno() -> np.ndarray:
    import matplotlib

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, None, :3] * 255).round().astype(np.uint8)


def sheet(pictures: Sequence[np.ndarray], decision: str, words: str, ends: Sequence[tuple[float, str]]) -> Image.Image:
    """The panels in one picture, each in its own size, the first in the upper left corner; below them words and colours.

    Args:
        pictures: uint8 (H, W, 3), RGB, of one size.
        decision: good, defect or cannot tell; decides the colour of the words.
        words: One line; smaller where it would not fit.
        ends: Places on the colour bar, from 0 to 1, with what to write there.
    """
    height, width = pictures[0].shape[:2]
    stacked = width > 2 * height
    size = (width, len(pictures) * height) if stacked else (len(pictures) * width, height)
    part = min(1.0, LONGEST / max(size))
    letters = round(min(max(0.022 * max(size) * part, 13), 90))
    below = _words(max(NARROWEST, round(size[0] * part)), letters, decision, words, ends)
    whole = np.full((round(size[1] * part) + below.height, below.width, 3), 255, np.uint8)
    whole[-below.height :] = below
    for number, picture in enumerate(pictures):
        if part < 1:
            picture = cv2.resize(picture, (int(width * part), int(height * part)), interpolation=cv2.INTER_AREA)
        high, wide = picture.shape[:2]
        top, left = (number * high, 0) if stacked else (0, number * wide)
        whole[top : top + high, left : left + wide] = picture
    return Image.fromarray(whole)


def _words(width: int, letters: int, decision: str, words: str, ends: Sequence[tuple[float, str]]) -> Image.Image:
    """The strip below the panels: words, and what the colours mean; `letters` is the height of a line in pixels."""
    out = Image.new("RGB", (width, 5 * letters), "white")
    draw = ImageDraw.Draw(out)
    over = draw.textlength(words, _font(letters)) / (width - 2 * letters)
    draw.text((letters, 0.6 * letters), words, COLOURS[decision], _font(max(8, int(letters / max(1, over)))))
    right = min(width - letters, letters + 40 * letters)
    bar = np.broadcast_to(np.linspace(0, 1, right - letters, dtype=np.float32), (letters, right - letters))
    out.paste(Image.fromarray(colours(bar, 0, 1)), (letters, 2 * letters))
    for place, text in ends:
        x = letters + round(place * (right - letters - 1))
        draw.line([(x, 2 * letters), (x, 3.4 * letters)], (0, 0, 0), max(1, letters // 12))
        anchor = "la" if place < 0.25 else "ra" if place > 0.75 else "ma"
        draw.text((x, 3.5 * letters), text, (0, 0, 0), _font(round(0.8 * letters)), anchor=anchor)
    return out


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows the names that files have around the world better than most."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def write(picture: np.ndarray, file: Path, quality: int = 80) -> None:
    """A picture, uint8 (H, W, 3), RGB, as a JPEG file."""
    Image.fromarray(picture).save(file, quality=quality)
