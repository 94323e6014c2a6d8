"""Scores of saved anomaly maps: a folder in MVTec's layout, or a CSV file that names the maps.

Folder: `<category>/test/<defect>/<name>.npy|.npz|.tif|.tiff`, `good` (or `ok`, `normal`, in any case) being the normal
images, and the masks in `<category>/ground_truth/<defect>/<name>_mask.png` (or `<name>.png`; other image formats and .npy
as well; or a folder `<name>/` of masks whose union counts) of the same folder or of another one, for example the data set
itself. A defect without a folder of masks has no masks.

CSV: columns `map`, `category`, `label` (0 normal, 1 anomalous), and if wanted `mask`, `dataset`, `score`. Paths are
relative to the file. An empty mask means that the mask of an anomalous image is not known.

The image score is the `score` column, else the maximum of the map. Masks are anomalous where a colour is not zero, in lossy
formats where it is above half of its range (a palette is resolved to its colours, alpha is ignored, EXIF orientation is
applied), and are resized (nearest) to the map if their size differs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .metric import AnomalyMetrics

MAP_SUFFIXES = (".npy", ".npz", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".jp2", ".avif", ".npy")
NORMAL_NAMES = ("good", "ok", "normal")
MAX_MEGAPIXELS = 179.0
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "old-jpeg", "webp", "jpeg2000")


@dataclass(frozen=True)
class SavedMap:
    """One row: where the map and the mask of an image are. mask None: all normal, or not known (label 1)."""

    map: Path
    category: str
    label: int
    mask: Path | None = None
    dataset: str = ""
    score: float | None = None


def find_maps(path: Path, masks: Path | None = None) -> list[SavedMap]:
    """Rows of a folder or of a CSV file. masks: folder of the masks if it is not the folder of the maps.

    Raises ValueError or FileNotFoundError that say what was expected where.
    """
    if path.is_file():
        return read_manifest(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder of maps nor a CSV file")
    if (path / "manifest.csv").is_file():
        return read_manifest(path / "manifest.csv")
    files = sorted(f for f in path.glob("*/test/*/*") if f.suffix.lower() in MAP_SUFFIXES)
    if not files:
        raise FileNotFoundError(
            f"no map in {path}: expected <category>/test/<defect>/<name> with one of {', '.join(MAP_SUFFIXES)}, "
            "or a manifest.csv"
        )
    return [_row(file, masks or path) for file in files]


def _row(file: Path, masks: Path) -> SavedMap:
    category, defect = file.parts[-4], file.parts[-2]
    if defect.casefold() in NORMAL_NAMES:
        return SavedMap(file, category, 0)
    folder = masks / category / "ground_truth" / defect
    if not folder.is_dir():
        return SavedMap(file, category, 1)
    there = {mask.name.casefold(): mask for mask in sorted(folder.iterdir(), reverse=True)}
    for name in (*(stem + suffix for stem in (f"{file.stem}_mask", file.stem) for suffix in MASK_SUFFIXES), file.stem):
        mask = there.get(name.casefold())
        if mask is not None and mask.name.startswith(file.stem):
            return SavedMap(file, category, 1, mask)
    raise FileNotFoundError(f"no mask for {file}: expected {folder / (file.stem + '_mask.png')}")


def read_manifest(path: Path) -> list[SavedMap]:
    """Rows of a CSV file."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.DictReader(stream)
        missing = {"map", "category", "label"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: missing columns {sorted(missing)}, found {reader.fieldnames}")
        rows = []
        for line, row in enumerate(reader, start=2):
            if row["label"] not in ("0", "1"):
                raise ValueError(
                    f"{path}, line {line}: label {row['label']!r}, allowed are 0 (normal) and 1 (anomalous)"
                )
            try:
                score = float(row["score"]) if row.get("score") else None
            except ValueError:
                raise ValueError(f"{path}, line {line}: score {row['score']!r} is not a number") from None
            mask = path.parent / row["mask"] if row.get("mask") else None
            label, dataset = int(row["label"]), row.get("dataset") or ""
            rows.append(SavedMap(path.parent / row["map"], row["category"], label, mask, dataset, score))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_map(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """float32 (H, W) anomaly map of a .npy, .npz (its only array, or the one named `map`) or TIFF file."""
    if path.suffix.lower() == ".npy":
        values = np.load(path)
    elif path.suffix.lower() == ".npz":
        with np.load(path) as arrays:
            if "map" not in arrays and len(arrays.files) != 1:
                raise ValueError(f"{path} holds {arrays.files}: expected one array, or one named 'map'")
            values = arrays["map" if "map" in arrays else arrays.files[0]]
    else:
        with _image(path, max_megapixels) as image:
            values = np.asarray(image)
    values = np.squeeze(values)
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"{path}: expected a map (H, W) of numbers, found {values.dtype} {values.shape}")
    return values.astype(np.float32)


def read_mask(path: Path, size: tuple[int, int], max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """bool (H, W) mask of a file, or the union of a folder's, resized (nearest) to `size` = (height, width)."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in MASK_SUFFIXES and not f.name.startswith("."))
    parts = [_marked(file, max_megapixels) for file in files]
    if len({part.shape for part in parts}) != 1:
        raise ValueError(f"{path}: expected masks of equal size, found {[part.shape for part in parts]}")
    values = np.any(parts, axis=0)
    if values.shape == size:
        return values
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))


def _marked(path: Path, max_megapixels: float) -> np.ndarray:
    """bool (H, W): the data module's rule for masks, in lines of its own because this package stands alone."""
    lossy = False
    if path.suffix.lower() == ".npy":
        values = np.squeeze(np.load(path))
    else:
        with _image(path, max_megapixels) as image:
            lossy = image.format in ("JPEG", "MPO", "JPEG2000", "AVIF") or image.info.get("compression") in _LOSSY_TIFF
            lossy |= image.format == "WEBP" and _lossy_webp(path.read_bytes())
            if image.mode not in ("L", "I", "F", "I;16", "I;16B") and "16" in str(
                image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
            ):
                raise ValueError(f"{path}: a mask of 16-bit colours; save it as 8-bit grey")
            ImageOps.exif_transpose(image, in_place=True)
            image.info.pop("transparency", None)
            if image.mode in ("1", "LA"):
                values = np.asarray(image.convert("L"))
            else:
                values = np.asarray(image if image.mode[0] in "LIF" and image.mode != "LAB" else image.convert("RGB"))
    if values.ndim == 3:
        values = values[..., :3].max(axis=-1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{path}: the mask holds NaN or infinity; write 0 where nothing is marked")
    return values > ((127 if values.dtype == np.uint8 else 32767) if lossy else 0)


def _image(path: Path, max_megapixels: float) -> Image.Image:
    image = Image.open(path)
    if image.width * image.height > max_megapixels * 1e6:
        image.close()
        raise ValueError(
            f"{path}: {image.width} x {image.height} pixels are more than {max_megapixels:g} megapixels allow"
        )
    return image


def _lossy_webp(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        place += 24 if name == b"ANMF" else 8 + size + size % 2  # a frame's own chunks follow its 16 bytes
    return True


def score_maps(rows: Sequence[SavedMap], max_megapixels: float = MAX_MEGAPIXELS, **options: Any) -> AnomalyMetrics:
    """`AnomalyMetrics` (made with `options`), updated with every row."""
    datasets: dict[str, str] = {}
    for row in rows:
        if datasets.setdefault(row.category, row.dataset) != row.dataset:
            raise ValueError(
                f"category {row.category!r} belongs to the datasets {datasets[row.category]!r} and {row.dataset!r}: "
                "name it <dataset>/<category>"
            )
    metrics = AnomalyMetrics(datasets, **options)
    for number, (row, values, mask) in enumerate(_read(rows, max_megapixels)):
        score = float(values.max()) if row.score is None else row.score
        known = row.mask is not None or row.label == 0
        try:
            metrics.update(values[None], mask[None], [score], [row.label], [row.category], [number], [known])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{row.map}: {error}") from error
    return metrics


def _read(rows: Sequence[SavedMap], max_megapixels: float) -> Iterator[tuple[SavedMap, np.ndarray, np.ndarray]]:
    for row in rows:
        values = read_map(row.map, max_megapixels)
        mask = read_mask(row.mask, values.shape, max_megapixels) if row.mask else np.zeros(values.shape, dtype=bool)
        yield row, values, mask
