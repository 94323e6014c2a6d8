"""Fewer training images, or dirty ones, as options of the data: `shots`, `fold` and `contamination`.

They only move rows of the table between splits, so ids, files and cached features stay those of the whole dataset. What is
used for nothing gets the split `UNUSED`. Every choice is by the smallest hashes of (seed, category, file name): with one seed
the images of 2 shots are among those of 4, the defects of 2 % among those of 5 %, and neither the machine, nor the root, nor the
other categories matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datamodules.errors import DataError
from datamodules.problems import number_of
from datamodules.sample_table import GOOD, SampleTable

UNUSED = "unused"
"""Split of images that are neither trained on nor tested on."""
FOLD = "fold"
"""Split of the normal images that one fold of a cross-validation leaves out: their scores are kept, nothing else sees them."""
TRAINABLE = ("train", "val", UNUSED, FOLD)
"""Splits of the images that some `holdout`, `shots` and `fold` train on."""


def check_options(shots: int | None, contamination: float, reserved: float | None) -> None:
    """DataError unless the options of the data module are possible ones."""
    if shots is not None and shots < 1:
        raise DataError(
            f"shots is a number of training images per category, at least 1, or null for all; found {shots}."
        )
    if not 0 <= contamination < 1:
        raise DataError(
            f"contamination is a share of the training images, 0 <= contamination < 1, found {contamination}."
        )
    if reserved is not None and not contamination <= reserved < 1:
        raise DataError(
            f"contamination_reserved is a share from contamination ({contamination:g}) to below 1, or null for the same; "
            f"found {reserved}."
        )


def few_shots(table: SampleTable, shots: int | None, seed: int) -> SampleTable:
    """Leave `shots` training images of each category; None leaves all. Held-out images stay as they are.

    Raises:
        DataError: a category has fewer.
    """
    if shots is None:
        return table
    table = table.copy()
    for (_, category), rows in table.groupby(["dataset", "category"], sort=False):
        train = rows[rows["split"] == "train"]
        if len(train) < shots:
            found = number_of(len(train), "training image")
            raise DataError(f"{category} has {found} (after holdout), fewer than shots={shots}: lower shots.")
        table.loc[_in_order(train, "shots", seed)[shots:], "split"] = UNUSED
    return table


def check_fold(fold: Sequence[int] | None, holdout: float | None) -> None:
    """DataError unless `fold` is a possible option beside `holdout`."""
    if fold is None:
        return
    if len(fold) != 2 or fold[1] < 2 or not 1 <= fold[0] <= fold[1]:
        raise DataError(f"fold is [which, of how many], for example [1, 5]: a fold of at least 2; found {list(fold)}.")
    if holdout:
        raise DataError(f"fold leaves normal images out itself: leave holdout ({holdout:g}) out, or fold.")


def leave_out(table: SampleTable, fold: Sequence[int] | None) -> SampleTable:
    """Move the training images of a fold to the split `FOLD`; None moves none.

    Folds are as equal as they can be in every category, and the choice depends on file names only.

    Args:
        table: after `few_shots`.
        fold: which (from 1) of how many.

    Raises:
        DataError: a category has fewer training images than there are folds, or validation images of its own.
    """
    if fold is None:
        return table
    which, folds = fold
    table = table.copy()
    for (_, category), rows in table.groupby(["dataset", "category"], sort=False):
        train = rows[rows["split"] == "train"]
        if (rows["split"] == "val").any():
            raise DataError(
                f"{category} has validation images of its own, from which its thresholds come: folds would add nothing."
            )
        if len(train) < folds:
            found = number_of(len(train), "training image")
            raise DataError(f"{category} has {found}, fewer than {folds} folds: take fewer folds.")
        table.loc[_in_order(train, "fold", 0)[which - 1 :: folds], "split"] = FOLD
    return table


def contaminate(table: SampleTable, share: float, reserved: float | None, seed: int) -> SampleTable:
    """Put defects of the test set in the place of a share of each category's training images.

    As many normal images leave the training set as defects enter, and those defects leave the test set. Nobody is told: such
    a row counts as normal (label 0, no mask).

    Args:
        table: after `few_shots`.
        share: of each category's training images, rounded to whole images.
        reserved: defects for this share leave the test set whether they are trained on or not, so that runs of different
            shares are tested on the same images. None is `share`.
        seed: of the choice.

    Raises:
        DataError: so few training images that no category gets a defect, or so few defects that none would be left to test.
    """
    reserved = share if reserved is None else reserved
    if reserved == 0:
        return table
    table = table.copy()
    entered = 0
    for (_, category), rows in table.groupby(["dataset", "category"], sort=False):
        train, defects = rows[rows["split"] == "train"], rows[(rows["split"] == "test") & (rows["label"] == 1)]
        count, leaving = (_whole(part * len(train)) for part in (share, reserved))
        if leaving >= len(defects):
            raise DataError(
                f"{category}: {reserved:g} of {number_of(len(train), 'training image')} are {number_of(leaving, 'defect')}, "
                f"and the test set has {len(defects)}, of which at least one must stay: lower contamination and "
                "contamination_reserved, or leave the category out."
            )
        chosen = _in_order(defects, "defects", seed)[:leaving]
        table.loc[chosen, "split"] = UNUSED
        table.loc[_in_order(train, "replaced", seed)[:count], "split"] = UNUSED
        for index in chosen[:count]:
            table.loc[index, ["split", "label", "anomaly_type"]] = ["train", 0, GOOD]
            table.at[index, "mask_paths"] = ()
        entered += count
    if share and not entered:
        raise DataError(
            f"contamination {share:g} is less than half an image of every category: raise it, or train on more images."
        )
    return table


def describe(table: SampleTable, shots: int | None, contamination: float, reserved: float | None) -> list[str]:
    """What the options made of the data, in sentences for a run's notes; [] if they are not used."""
    train = table[table["split"] == "train"]
    found = []
    if shots is not None:
        held = int((table["split"] == "val").sum())
        beside = f", beside {number_of(held, 'held-out image')}" if held else ""
        found.append(f"SHOTS: {number_of(shots, 'training image')} per category{beside}")
    if contamination or reserved:
        dirty = int((train["defect"] != GOOD).sum())
        left = reserved if reserved is not None else contamination
        found.append(
            f"CONTAMINATION: {dirty} of {number_of(len(train), 'training image')} are defects of the test set; defects for "
            f"{100 * left:g} % are not tested"
        )
    return found


def _whole(count: float) -> int:
    """Halves are rounded up; what floating point adds to a whole number does not count."""
    return math.floor(count + 0.5 + 1e-9)


def _in_order(rows: pd.DataFrame, what: str, seed: int) -> Sequence[int]:
    """Index labels of the rows in the order of their seeded hashes."""

    def key(row: tuple[int, str, str]) -> tuple[str, str]:
        _, category, path = row
        text = f"{what}\0{seed}\0{category}\0{Path(path).parent.name}/{Path(path).name}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), path

    return [row[0] for row in sorted(zip(rows.index, rows["category"], rows["image_path"], strict=True), key=key)]
