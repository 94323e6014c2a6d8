"""The sample table: one row per image, the same columns for every dataset. Everything after it is dataset-agnostic.

| column | type | meaning |
|---|---|---|
| id | int64 | 0..N-1, unique, the row's position |
| dataset | str | name of the dataset in this experiment |
| category | str | category inside its dataset |
| split | str | train, val or test; unused where a run trains on fewer images than there are (`datamodules.training_set`) |
| label | int64 | 0 normal, 1 anomalous |
| defect | str | "good", or the name of the defect's folder |
| anomaly_type | str | good, structural or logical |
| image_path | str | file of the image |
| mask_paths | tuple[str, ...] | mask files whose union marks the defect; empty when no mask is given |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd

from datamodules.errors import DataError
from results.common.contents import content_hashes
from results.common.pair import label

SampleTable: TypeAlias = pd.DataFrame

GOOD = "good"
SPLITS = ("train", "val", "test")
FEWEST_HELD_OUT = 5
"""Held-out images of a category; the highest score of fewer would promise no lower rate of false alarms than one in five."""
ANOMALY_TYPES = (GOOD, "structural", "logical")


class TableRow(NamedTuple):
    """A row of the table."""

    id: int
    dataset: str
    category: str
    split: str
    label: int
    defect: str
    anomaly_type: str
    image_path: str
    mask_paths: tuple[str, ...]


COLUMNS = TableRow._fields


@dataclass(frozen=True)
class Sample:
    """One image as a reader found it. A sample is anomalous exactly if its `anomaly_type` is not "good"."""

    category: str
    split: str
    defect: str
    anomaly_type: str
    image_path: str
    mask_paths: tuple[str, ...] = ()


def build_table(dataset: str, samples: Iterable[Sample]) -> SampleTable:
    """Put samples into a validated table, ordered by category, split, defect (good first) and file name."""
    order = sorted(
        samples,
        key=lambda s: (s.category, SPLITS.index(s.split), s.defect != GOOD, s.defect, s.image_path),
    )
    table = pd.DataFrame(
        {
            "id": pd.array(range(len(order)), dtype="int64"),
            "dataset": [dataset] * len(order),
            "category": [s.category for s in order],
            "split": [s.split for s in order],
            "label": pd.array([int(s.anomaly_type != GOOD) for s in order], dtype="int64"),
            "defect": [s.defect for s in order],
            "anomaly_type": [s.anomaly_type for s in order],
            "image_path": [s.image_path for s in order],
            "mask_paths": [s.mask_paths for s in order],
        },
        columns=list(COLUMNS),
    )
    return validate(table)


def rows_of(table: SampleTable) -> Iterator[TableRow]:
    """The table's rows in order; quicker than `itertuples`, which takes texts out of their column one by one."""
    return map(TableRow._make, zip(*(table[column].tolist() for column in COLUMNS), strict=True))


def concatenate(tables: Iterable[SampleTable]) -> SampleTable:
    """Join tables of different datasets; ids are counted anew in the order given."""
    tables = list(tables)
    names = [name for table in tables for name in table["dataset"].unique()]
    if len(set(names)) != len(names):
        raise DataError(f"Two tables hold the same dataset name: {names}. Give one of them another `label`.")
    joined = pd.concat(tables, ignore_index=True)
    joined["id"] = pd.array(range(len(joined)), dtype="int64")
    return validate(joined)


def validate(table: SampleTable) -> SampleTable:
    """Return the table if it obeys the schema above, else raise DataError naming the first row that does not."""
    if tuple(table.columns) != COLUMNS:
        raise DataError(f"A sample table has the columns {COLUMNS}, found {tuple(table.columns)}.")
    if table["id"].tolist() != list(range(len(table))):
        raise DataError("Column id must count 0..N-1 in the order of the rows.")
    allowed = {"split": SPLITS, "label": (0, 1), "anomaly_type": ANOMALY_TYPES}
    for column, values in allowed.items():
        wrong = table[~table[column].isin(values)]
        if len(wrong):
            row = wrong.iloc[0]
            raise DataError(f"{row['image_path']}: {column} is {row[column]}, allowed are {values}.")
    normal = table["anomaly_type"] == GOOD
    contradiction = table[(table["label"] == 0) != normal]
    if len(contradiction):
        row = contradiction.iloc[0]
        raise DataError(f"{row['image_path']}: label {row['label']} contradicts anomaly_type {row['anomaly_type']!r}.")
    trained_on = table[(table["split"] != "test") & (table["label"] == 1)]
    if len(trained_on):
        row = trained_on.iloc[0]
        raise DataError(f"{row['image_path']}: an anomalous image in split {row['split']!r}; only test may hold them.")
    twice = table[table.duplicated("image_path")]
    if len(twice):
        raise DataError(f"{twice.iloc[0]['image_path']}: listed twice; an image belongs to exactly one row.")
    return table


def category_keys(table: SampleTable) -> list[str]:
    """Key per row: the category, or `dataset/category` when the table holds several datasets."""
    categories = table["category"].tolist()
    if table["dataset"].nunique() <= 1:
        return categories
    return list(map(label, table["dataset"], categories))


def file_hashes(table: SampleTable, roots: Mapping[str, str | Path]) -> dict[str, str]:
    """The hash of the contents of every image and mask, by path; `roots` as in `fingerprint`.

    Raises:
        OSError: a file cannot be read.
    """
    paths: dict[str, dict[str, str]] = {}
    for dataset, image, masks in zip(
        *(table[c].tolist() for c in ("dataset", "image_path", "mask_paths")), strict=True
    ):
        files = paths.setdefault(dataset, {})
        files[image] = ""
        files.update(dict.fromkeys(masks, ""))
    hashes: dict[str, str] = {}
    for dataset, files in paths.items():
        hashes.update(zip(files, content_hashes(files, roots[dataset]), strict=True))
    return hashes


def fingerprint(table: SampleTable, roots: Mapping[str, str | Path], hashes: Mapping[str, str] | None = None) -> str:
    """sha256 over relative paths, contents, splits, labels and mask pairing: equal wherever the data is equal.

    Args:
        table: the samples; their order does not matter.
        roots: dataset name -> the folder its paths are taken relative to, so that the place on disk does not matter.
        hashes: what `file_hashes` found of these and perhaps other files; None looks at the files now.
    """
    lines = [
        "\t".join([row.dataset, row.category, row.split, str(row.label), row.anomaly_type, *files])
        for row, files in _files_of_rows(table, roots, hashes)
    ]
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _files_of_rows(
    table: SampleTable, roots: Mapping[str, str | Path], hashes: Mapping[str, str] | None = None
) -> Iterator[tuple[TableRow, list[str]]]:
    """Each row with "place:hash of the contents" of its image and masks."""
    known = file_hashes(table, roots) if hashes is None else hashes
    folders = {dataset: str(root) for dataset, root in roots.items()}
    for row in rows_of(table):
        root = folders[row.dataset]
        yield row, [f"{_place(path, root)}:{known[path]}" for path in (row.image_path, *row.mask_paths)]


def _place(path: str, root: str) -> str:
    """The path relative to the root, with forward slashes."""
    prefix = f"{root}{os.sep}"
    return (
        path[len(prefix) :].replace(os.sep, "/")
        if path.startswith(prefix)
        else Path(os.path.relpath(path, root)).as_posix()
    )


def content_hash(table: SampleTable, roots: Mapping[str, str | Path], rules: Mapping[str, Any]) -> str:
    """sha256 that changes with any image, mask or their order: what is computed once per row of `table` depends on it.

    Args:
        table: the samples; their order is their ids'.
        roots: as in `fingerprint`.
        rules: whatever else decides how a file becomes pixels, as plain values.
    """
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for row, files in _files_of_rows(table, roots):
        for file in files:
            digest.update(f"{row.id}\t{file}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hold_out(table: SampleTable, fraction: float | None, defaults: Mapping[str, float] | None = None) -> SampleTable:
    """Move `fraction` of each category's training images to split val, unless the category has val images already.

    The choice depends on file names only (smallest hashes first), so it is the same for every seed, machine and root,
    and images added later change it little. At least one image is moved and at least one stays.

    Args:
        table: the samples.
        fraction: in [0, 1); None for each dataset's own of `defaults`, where that makes at least `FEWEST_HELD_OUT` images.
        defaults: dataset -> its fraction; 0 for one that is not named.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise DataError(f"holdout is a fraction of the normal training images, 0 <= holdout < 1, found {fraction}.")
    table = table.copy()
    if fraction == 0:
        return table
    given = fraction
    for (dataset, category), rows in table.groupby(["dataset", "category"], sort=False):
        train = rows[rows["split"] == "train"]
        fraction = (defaults or {}).get(dataset, 0.0) if given is None else given
        if (rows["split"] == "val").any() or train.empty or fraction == 0:
            continue
        if given is None and round(fraction * len(train)) < FEWEST_HELD_OUT:
            continue
        if len(train) == 1:
            raise DataError(f"{category}: one training image cannot be split; set holdout to 0 or add images.")
        count = min(max(1, round(fraction * len(train))), len(train) - 1)
        hashes = train["image_path"].map(lambda path: hashlib.sha256(Path(path).name.encode()).hexdigest())
        chosen = sorted(zip(hashes, train["image_path"], train.index, strict=True))[:count]
        table.loc[[index for *_, index in chosen], "split"] = "val"
    return table
