"""Images of which nothing is known: any folders and files."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from datamodules.dataset import UNKNOWN, ImageSource, Row
from datamodules.errors import DataError
from datamodules.images import (
    IMAGE_SUFFIXES,
    MAX_MEGAPIXELS,
    centre,
    infer_bit_depth,
    odd_mode,
    read_image,
    resize_image,
)
from datamodules.problems import number_of
from results.common.contents import CLUTTER

SHOWN = 20
"""At most this many files that are not images are named."""


def unknown_rows(roots: str | Path | Sequence[str | Path], dataset: str = "") -> list[Row]:
    """Rows of the images under folders, or of files: label -1, anomaly_type "unknown", category "", no masks.

    Linked folders are entered once, and a file that is named twice is one row. Whatever is called as an image is a row, and
    fails when it is read if it is none; files of other names are told in one warning. Hidden files, and the masks in folders
    called ground_truth, are left out.
    """
    paths: dict[str, None] = {}
    for root in [roots] if isinstance(roots, (str, Path)) else roots:
        paths |= dict.fromkeys(_images(Path(root).expanduser()))
    return [Row(number, dataset, "", UNKNOWN, "unknown", path, ()) for number, path in enumerate(paths)]


def _images(root: Path) -> list[str]:
    """Every image under a folder, or the file itself."""
    if not root.is_dir():
        paths, others = [str(root)] if root.exists() else [], []
    else:
        found = sorted(_files(str(root)), key=Path)
        paths = [path for path in found if path.lower().endswith(IMAGE_SUFFIXES)]
        others = [path for path in found if path not in set(paths)] if len(paths) < len(found) else []
    if not paths and not root.exists():
        what = "a link to nothing" if root.is_symlink() else "not there"
        raise DataError(f"predict_root {root} is {what}: give a folder of images, or an image file.")
    if not paths:
        raise DataError(f"predict_root {root}: no image there (looked for {', '.join(IMAGE_SUFFIXES)}).")
    if others:
        names = ", ".join(os.path.relpath(path, root) for path in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        warnings.warn(f"{number_of(len(others), 'file')} not read, by suffix: {names}{more}", stacklevel=4)
    return paths


def _files(root: str) -> list[str]:
    files, entered = [], {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        new = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        folders[:] = [
            name
            for name, real in new.items()
            if not (real in entered or name == "ground_truth" or name.startswith("."))
        ]
        entered.update(new[name] for name in folders)
        files += [
            os.path.join(folder, name) for name in names if not name.startswith(".") and name.casefold() not in CLUTTER
        ]
    return files


class PhotographSource(ImageSource):
    """Loads images as its base does, and can keep the last ones at their own size, so that none is decoded twice.

    Attributes:
        room: Bytes that may be kept in this process; 0 keeps none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.room = 0
        self._kept: dict[str, np.ndarray] = {}

    def load(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """As `ImageSource.load`."""
        photograph, _ = self.photograph(row)
        resized = centre(resize_image(photograph, self.whole, self.resize), self.size)
        return np.ascontiguousarray(resized), np.zeros(self.size, bool)

    def photograph(self, row: Row) -> tuple[np.ndarray, None]:
        """As `ImageSource.photograph`; there is no mask."""
        photograph = self.read(row.image_path, row.dataset)
        if photograph.nbytes <= self.room and get_worker_info() is None:
            self.room -= photograph.nbytes
            self._kept[row.image_path] = photograph
        return photograph, None

    def take(self, path: str) -> np.ndarray | None:
        """An image as `read` gives it, if it was kept; it is kept no longer."""
        kept = self._kept.pop(path, None)
        self.room += 0 if kept is None else kept.nbytes
        return kept

    def read(self, path: str, dataset: str) -> np.ndarray:
        """An image at its own size, turned as EXIF says, uint8 (H, W, 3), RGB."""
        return read_image(path, self._bit_depths.get(dataset), self.max_megapixels)


def depth_of(rows: list[Row], declared: int | None, max_megapixels: float = MAX_MEGAPIXELS) -> dict[str, int]:
    """Bit depth of the rows' 16-bit images, if there are any: the declared one, which a run's configuration holds."""
    if declared is not None:
        return {row.dataset: declared for row in rows[:1]}
    deep, bits = [], 0
    for row in rows:
        with contextlib.suppress(DataError):  # of a file that cannot be read, its own row will tell
            if odd_mode(row.image_path) == "16-bit":
                deep.append(row)
                if len(deep) <= 32:
                    bits = max(bits, infer_bit_depth([row.image_path], max_megapixels=max_megapixels))
    if not bits:
        return {}
    told = number_of(len(deep), "16-bit image")
    warnings.warn(f"{told} read as {bits} bits (inferred); declare bit_depth to fix it", stacklevel=3)
    return {deep[0].dataset: bits}
