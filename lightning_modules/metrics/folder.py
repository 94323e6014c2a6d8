"""Scores of saved anomaly maps: a folder in MVTec's layout, or a CSV file that names the maps.

Folder: `<category>/test/<defect>/<name>.npy|.npz|.tif|.tiff`, `good` being the normal images, and the masks in
`<category>/ground_truth/<defect>/<name>_mask.png` (or `<name>.png`; other image formats and .npy as well) of the same
folder or of another one, for example the data set itself. A defect without a folder of masks has no masks.

CSV: columns `map`, `category`, `label` (0 normal, 1 anomalous), and if wanted `mask`, `dataset`, `score`. Paths are
relative to the file. An empty mask means that the mask of an anomalous image is not known.

The image score is the `score` column, else the maximum of the map. Masks are anomalous where not zero, and are resized
(nearest) to the map if their size differs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .metric import AnomalyMetrics

MAP_SUFFIXES = (".npy", ".npz", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".npy")


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
    if defect == "good":
        return SavedMap(file, category, 0)
    folder = masks / category / "ground_truth" / defect
    if not folder.is_dir():
        return SavedMap(file, category, 1)
    for stem in (f"{file.stem}_mask", file.stem):
        for suffix in MASK_SUFFIXES:
            if (folder / (stem + suffix)).is_file():
                return SavedMap(file, category, 1, folder / (stem + suffix))
    raise FileNotFoundError(f"no mask for {file}: expected {folder / (file.stem + '_mask.png')}")


def read_manifest(path: Path) -> list[SavedMap]:
    """Rows of a CSV file."""
    with path.open(newline="") as stream:
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


def read_map(path: Path) -> np.ndarray:
    """float32 (H, W) anomaly map of a .npy, .npz (its only array, or the one named `map`) or TIFF file."""
    if path.suffix.lower() == ".npy":
        values = np.load(path)
    elif path.suffix.lower() == ".npz":
        with np.load(path) as arrays:
            if "map" not in arrays and len(arrays.files) != 1:
                raise ValueError(f"{path} holds {arrays.files}: expected one array, or one named 'map'")
            values = arrays["map" if "map" in arrays else arrays.files[0]]
    else:
        with Image.open(path) as image:
            values = np.asarray(image)
    values = np.squeeze(values)
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"{path}: expected a map (H, W) of numbers, found {values.dtype} {values.shape}")
    return values.astype(np.float32)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W) mask, anomalous where the file is not zero, resized (nearest) to `size` = (height, width)."""
    if path.suffix.lower() == ".npy":
        values = np.squeeze(np.load(path)) != 0
    else:
        with Image.open(path) as image:
            values = np.asarray(image.convert("L") if image.mode == "P" else image) != 0
    if values.ndim == 3:
        values = values[..., :3].any(axis=-1)
    if values.shape == size:
        return values
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))


def score_maps(rows: Sequence[SavedMap], **options: object) -> AnomalyMetrics:
    """`AnomalyMetrics` (made with `options`), updated with every row."""
    datasets: dict[str, str] = {}
    for row in rows:
        if datasets.setdefault(row.category, row.dataset) != row.dataset:
            raise ValueError(
                f"category {row.category!r} belongs to the datasets {datasets[row.category]!r} and {row.dataset!r}: "
                "name it <dataset>/<category>"
            )
    metrics = AnomalyMetrics(datasets, **options)
    for number, (row, values, mask) in enumerate(_read(rows)):
        score = float(values.max()) if row.score is None else row.score
        known = row.mask is not None or row.label == 0
        try:
            metrics.update(values[None], mask[None], [score], [row.label], [row.category], [number], [known])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{row.map}: {error}") from error
    return metrics


def _read(rows: Sequence[SavedMap]) -> Iterator[tuple[SavedMap, np.ndarray, np.ndarray]]:
    for row in rows:
        values = read_map(row.map)
        mask = read_mask(row.mask, values.shape) if row.mask else np.zeros(values.shape, dtype=bool)
        yield row, values, mask
