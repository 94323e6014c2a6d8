"""The scores of normal images that a run's record keeps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FILE = "normal_scores.csv"
"""In a record: id, category, split (val, fold or train), image_score, map_max (highest pixel of the map, empty without one) and
path."""


def read(record: Path) -> pd.DataFrame | None:
    """The normal scores in a run's record; None in a record without them. Earlier versions kept no `map_max`."""
    if not (record / FILE).is_file():
        return None
    texts = {"category": str, "split": str, "path": str}
    empty = {"image_score": [""], "map_max": [""]}
    return pd.read_csv(record / FILE, dtype=texts, keep_default_na=False, na_values=empty)
