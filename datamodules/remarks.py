"""What a run on some data must be read with: test images that were trained on, defects too small for the image size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datamodules.dataset import Row
from datamodules.images import read_mask
from datamodules.margin import kept, margin
from datamodules.problems import number_of
from datamodules.sample_table import FEWEST_HELD_OUT, SampleTable, category_keys


def held_out(table: SampleTable, fraction: float | None, defaults: Mapping[str, float]) -> list[str]:
    """What is held out for thresholds, in sentences: where that was nobody's wish, and where it is too little.

    Args:
        table: the samples, as split.
        fraction: what the user asked for; None for the default.
        defaults: dataset -> its own share, as in `datamodules.sample_table.hold_out`.
    """
    if fraction == 0 or (fraction is None and not any(defaults.values())):
        return []
    rows = table.assign(key=category_keys(table))
    if fraction is None:
        rows = rows[rows["dataset"].map(defaults) > 0]
    counts = {
        key: (int((splits == "val").sum()), int((splits == "train").sum()))
        for key, splits in rows.groupby("key", sort=False)["split"]
    }
    sentences = []
    kept = {key: held for key, (held, _) in counts.items() if held >= FEWEST_HELD_OUT}
    few = {key: pair for key, pair in counts.items() if pair[0] < FEWEST_HELD_OUT}
    if fraction is None and kept:
        share = ", ".join(f"{100 * value:g} %" for value in dict.fromkeys(defaults.values()) if value)
        sentences.append(
            f"{share} of the normal training images are held out for thresholds ({_listed(kept)}): own folders' default; "
            "data.init_args.holdout=0 trains on all"
        )
    if few:
        found = _listed({key: held for key, (held, _) in few.items()})
        sentences.append(
            f"fewer than {FEWEST_HELD_OUT} images held out are none ({found}): thresholds of these categories rest on training "
            "images too and are optimistic"
        )
    return sentences


def _listed(counts: Mapping[str, int], most: int = 5) -> str:
    shown = [f"{key} {count}" for key, count in list(counts.items())[:most]]
    return ", ".join([*shown, f"and {len(counts) - most} more"] if len(counts) > most else shown)


def tested_and_trained(others: Sequence[Row], test: Sequence[Row], hashes: Mapping[str, str]) -> list[str]:
    """A sentence if files of the test set are, byte by byte, files of another split as well.

    `hashes` are those of the images' contents, by path.
    """
    known = {hashes[row.image_path]: row.image_path for row in others}
    same = [(row.image_path, known[hashes[row.image_path]]) for row in test if hashes[row.image_path] in known]
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
