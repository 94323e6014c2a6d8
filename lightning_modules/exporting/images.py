"""The images that a written file is checked with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from datamodules.handed_over import Preparation
from datamodules.prediction import unknown_rows
from datamodules.problems import number_of

MOST = 32
"""So many images at most, evenly picked."""


@dataclass(frozen=True)
class CheckImages:
    """Images as the graph takes them.

    Attributes:
        source: What they are, in words.
        names: Of each image.
        pixels: uint8 (N, height, width, 3), RGB.
        recorded: The image scores that the run's record has, float64 (N,); None where they are no test images.
    """

    source: str
    names: list[str]
    pixels: Tensor
    recorded: np.ndarray | None = None


def check_images(record: Path, category: str, preparation: Preparation, given: str | Path | None) -> CheckImages:
    """Those given, else the run's own test images, else, where these are not on this machine, noise.

    Args:
        record: The run's record.
        category: Key of the only category whose test images count; "" for all.
        preparation: The run's rules for images.
        given: A folder of photographs, or one.

    Raises:
        DataError: a given photograph cannot be read, or there is none.
    """
    if given:
        rows = _spread([row.image_path for row in unknown_rows(given)])
        return CheckImages(f"{number_of(len(rows), 'photograph')} from {given}", rows, _pixels(preparation, rows))
    table = _test_images(record, category)
    if table is not None:
        names = table["path"].tolist()
        found = f"{number_of(len(names), 'test image')} of the run"
        return CheckImages(found, names, _pixels(preparation, names), table["image_score"].to_numpy())
    noise = torch.randint(256, (8, *preparation.size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return CheckImages("8 images of noise", [f"noise {number}" for number in range(len(noise))], noise)


def _test_images(record: Path, category: str) -> pd.DataFrame | None:
    """Rows of the record's image scores; None if there are none or a file is not on this machine."""
    file = record / "image_scores.csv"
    if not file.is_file():
        return None
    table = pd.read_csv(
        file, dtype={"category": str, "path": str}, keep_default_na=False, na_values={"image_score": [""]}
    )
    table = table[table["category"] == category] if category else table
    table = table.loc[_spread(table.index.tolist())]
    return table if len(table) and all(Path(path).is_file() for path in table["path"]) else None


def _spread(items: list) -> list:
    places = np.linspace(0, len(items) - 1, min(MOST, len(items))).round().astype(int)
    return [items[place] for place in places]


def _pixels(preparation: Preparation, paths: list[str]) -> Tensor:
    return torch.cat(list(preparation.resized(paths, MOST)))
