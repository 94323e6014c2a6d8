"""What a run on some data must be read with: test images that were trained on, defects too small for the image size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datamodules.dataset import Row
from datamodules.images import read_mask
from datamodules.margin import kept, margin
from datamodules.problems import number_of
from results.common.contents import content_hashes


def tested_and_trained(others: Sequence[Row], test: Sequence[Row], roots: Mapping[str, str | Path]) -> list[str]:
    """A sentence if files of the test set are, byte by byte, files of another split as well.

    `roots` are the folders of the datasets, by which the contents of their files are remembered.
    """
    digests: dict[str, str] = {}
    for dataset, root in roots.items():
        paths = [row.image_path for row in (*others, *test) if row.dataset == dataset]
        digests.update(zip(paths, content_hashes(paths, root), strict=True))
    known = {digests[row.image_path]: row.image_path for row in others}
    same = [(row.image_path, known[digests[row.image_path]]) for row in test if digests[row.image_path] in known]
    if not same:
        return []
    few = f"TRAINED ON TEST IMAGES, {number_of(len(same), 'test image')} of {len(test)}"
    return [f"{few}: the same file is used for training (e.g. {same[0][0]} is {same[0][1]}), so scores are too good."]


def cropped_masks(
    test: Sequence[Row], whole: Callable[[Row], np.ndarray], whole_size: tuple[int, int], size: tuple[int, int]
) -> list[str]:
    """The sentence on a centre crop; `whole` gives a row's mask at (height, width) `whole_size`."""
    rows = [row for row in test if row.mask_paths]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [margin(pool.map(lambda row: kept(whole(row), size), rows)).sentence(whole_size, size)]


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
