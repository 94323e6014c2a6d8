"""What a run on some data must be read with: test images that were trained on, defects too small for the image size."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from datamodules.dataset import Row
from datamodules.images import read_mask
from datamodules.problems import number_of


def tested_and_trained(others: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """A sentence if files of the test set are, byte by byte, files of another split as well."""
    by_size: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for part, rows in enumerate((others, test)):
        for row in rows:
            by_size[os.path.getsize(row.image_path)][part].append(row.image_path)
    same: list[tuple[str, str]] = []
    for trained, tested in by_size.values():
        if trained and tested:
            known = {_digest(path): path for path in trained}
            same += [(path, known[digest]) for path in tested if (digest := _digest(path)) in known]
    if not same:
        return []
    few = f"{number_of(len(same), 'test image')} of {len(test)}"
    return [f"{few}: the same file is used for training (e.g. {same[0][0]} is {same[0][1]}), so scores are too good."]


def _digest(path: str) -> bytes:
    return xxhash.xxh3_128_digest(Path(path).read_bytes())


def vanishing_masks(
    test: Sequence[Row], resized: Callable[[Row], np.ndarray], thresholds: Mapping[str, int], size: tuple[int, int]
) -> list[str]:
    """A sentence if masks that mark something mark nothing at (height, width) `size`; `resized` gives a row's mask."""
    rows = [row for row in test if row.mask_paths]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        left = list(pool.map(lambda row: bool(resized(row).any()), rows))
    empty = [row for row, any_left in zip(rows, left, strict=True) if not any_left]
    lost = [row for row in empty if read_mask(row.mask_paths, thresholds.get(row.dataset, 0), float("inf")).any()]
    if not lost:
        return []
    return [
        f"{len(lost)} of {number_of(len(rows), 'mask')} of defects vanish at {size[1]} x {size[0]} pixels (e.g. "
        f"{lost[0].mask_paths[0]}): their images count as anomalous without a marked pixel. "
        "data.init_args.mask_resize=area or a larger image_size keeps them."
    ]
