"""Images of which nothing is known: any folder, or one file."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from datamodules.dataset import UNKNOWN, Row
from datamodules.errors import DataError
from datamodules.images import IMAGE_SUFFIXES, MAX_MEGAPIXELS, infer_bit_depth, odd_mode
from datamodules.problems import number_of
from results.common.contents import CLUTTER

SHOWN = 20
"""At most this many files that are not images are named."""


def unknown_rows(root: str | Path, dataset: str = "") -> list[Row]:
    """Rows of the images under a folder, or of one file: label -1, anomaly_type "unknown", category "", no masks.

    Linked folders are entered once. Whatever is called as an image is a row, and fails when it is read if it is none;
    files of other names are told in one warning. Hidden files, and the masks in folders called ground_truth, are left out.
    """
    root = Path(root).expanduser()
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
        warnings.warn(f"{number_of(len(others), 'file')} not read, by suffix: {names}{more}", stacklevel=3)
    return [Row(number, dataset, "", UNKNOWN, "unknown", path, ()) for number, path in enumerate(paths)]


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
