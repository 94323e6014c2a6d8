"""Images of which nothing is known: any folder, or one file."""

from __future__ import annotations

import warnings
from pathlib import Path

from datamodules.dataset import UNKNOWN, Row
from datamodules.errors import DataError
from datamodules.images import infer_bit_depth
from datamodules.reading import odd_mode
from datamodules.tree import IMAGE_SUFFIXES


def unknown_rows(root: str | Path) -> list[Row]:
    """Rows of the images under a folder, or of one file: label -1, anomaly_type "unknown", category "", no masks.

    Hidden files, and the masks in folders called ground_truth, are left out.
    """
    root = Path(root).expanduser()
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    found = [p for p in found if not p.name.startswith(".") and "ground_truth" not in p.relative_to(root).parts]
    if not found:
        raise DataError(f"predict_root {root}: no image there (looked for {', '.join(IMAGE_SUFFIXES)}).")
    return [Row(number, "", "", UNKNOWN, "unknown", str(path), ()) for number, path in enumerate(found)]


def depth_of(rows: list[Row], declared: int | None) -> dict[str, int]:
    """Bit depth of the rows' 16-bit images, if there are any: the declared one, which a run's configuration holds."""
    if declared is not None:
        return {"": declared}
    deep = [row.image_path for row in rows if odd_mode(row.image_path) == "16-bit"]
    if not deep:
        return {}
    bits = infer_bit_depth(deep)
    warnings.warn(
        f"{len(deep)} 16-bit images are read as {bits} bits (inferred); declare bit_depth to fix it", stacklevel=3
    )
    return {"": bits}
