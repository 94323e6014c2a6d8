"""A contact sheet of the embedded benchmark: what its categories and defects look like."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from datamodules.outline import outlined
from datamodules.synthetic.categories import CATEGORIES
from datamodules.synthetic.writer import render_defect, render_normal


def contact_sheet(path: str | Path, seed: int = 0, tile: int = 136, defects: int = 6, quality: int = 80) -> Path:
    """Write a JPEG with one row per category: a normal image, then defects with the mask's outline.

    Args:
        path: file to write.
        seed: of the benchmark that is shown.
        tile: side of a picture in pixels; they are rendered at twice that and reduced.
        defects: defective images per row, cycling through the category's kinds with rising severity.
        quality: of the JPEG.
    """
    rows = []
    for name, category in CATEGORIES.items():
        tiles = [_tile(render_normal(name, seed, "train", 0, 2 * tile), None, tile, name.replace("_", " "))]
        for number in range(defects):
            defect = category.defects[number % len(category.defects)]
            severity = (0.35, 0.8, 0.55)[number % 3]
            image, mask, _ = render_defect(name, seed, defect, 10 + number, 2 * tile, severity)
            tiles.append(_tile(image, mask, tile, defect.replace("_", " ")))
        rows.append(np.hstack(tiles))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = np.pad(np.vstack(rows), ((4, 4), (4, 4), (0, 0)), constant_values=255)
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return path


def _tile(image: np.ndarray, mask: np.ndarray | None, side: int, text: str) -> np.ndarray:
    """A picture with its caption below, uint8 (side + 22, side + 6, 3)."""
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    if mask is not None:
        small = outlined(small, mask)
    framed = np.pad(small, ((3, 19), (3, 3), (0, 0)), constant_values=255)
    size = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0]
    place = ((side + 6 - size) // 2, side + 16)
    cv2.putText(framed, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
    return framed
