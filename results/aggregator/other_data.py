"""A paper's table on other data: its methods and metrics, the categories of the data that one has, and dashes for the rest.

What the paper printed is of its own data, so it stands apart, as a row or as columns of its own, and no difference is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from results.aggregator import names
from results.aggregator.records import StoredRecord
from results.aggregator.spec import Entry, Spec, SpecError

ONLY_PRINTED = {"absent": True}
"""`runs` of a row or column that no run of ours can fill."""
_OF_THE_DATA = "dataset"
"""Pseudo-method of columns that describe the paper's data, such as its anomaly ratio."""


def on_data(spec: Spec, dataset: str, records: Sequence[StoredRecord], printed: bool) -> Spec:
    """The spec of the same table on the data set `dataset`, as far as `records` know its categories.

    Args:
        spec: Spec of a paper's table that trainings fill: without `sweep`, with rows of its own.
        dataset: Name of a data set, as in the records.
        records: Records from which the categories are taken.
        printed: Whether the paper's numbers stand beside ours.

    Raises:
        SpecError: If the table belongs to a sweep or is of that data set already, or no record is of it.
    """
    if spec.sweep or spec.rows is None:
        raise SpecError(
            f"{spec.name} is made from the sweep {spec.sweep}; its own table shows whatever data it ran on: "
            f"make table TABLE={spec.sweep}"
        )
    conditions = [spec.where, *(entry.where for entry in (*spec.rows, *spec.columns))]
    if any(dataset == where.get("dataset") for where in conditions):
        raise SpecError(f"{spec.name} is of {names.dataset_label(dataset)} already: leave --dataset (DATASET=) out")
    found: dict[str, None] = {}
    known: dict[str, None] = {}
    for stored in records:
        for each in stored.record.datasets:
            known[each["name"]] = None
            if each["name"] == dataset:
                found.update(dict.fromkeys(each["categories"]))
    if not found:
        raise SpecError(f"no run is of the data set {dataset!r}; runs are of {', '.join(sorted(known)) or 'none'}")
    if "mean" in found:
        raise SpecError(
            f"{dataset} has a category called mean, as the row of the mean over categories is called: rename its folder"
        )
    columns: tuple[Entry, ...] = tuple(column for column in spec.columns if column.where.get("method") != _OF_THE_DATA)
    notes = list(spec.notes)
    if len(columns) < len(spec.columns):
        notes.append("What the paper tells about its data has no column here; check-data tells it of yours.")
    if printed:
        notes.append(
            f"Printed numbers are of the paper's data, ours of {names.dataset_label(dataset)}: not to be subtracted."
        )
    if any("category" in row.where for row in spec.rows):
        rows = _by_category(spec, dataset, tuple(found), printed)
    else:
        rows = spec.rows
        ours = _of_means(columns, dataset)
        theirs = [
            dataclasses.replace(
                column, group=f"{column.group}, printed" if column.group else "Printed", runs=ONLY_PRINTED
            )
            for column in columns
        ]
        columns = (*ours, *theirs) if printed else tuple(ours)
    return dataclasses.replace(
        spec,
        title=f"{spec.title}; here on {names.dataset_label(dataset)}",
        rows=rows,
        columns=columns,
        notes=tuple(notes),
        own_papers=None,
    )


def _by_category(spec: Spec, dataset: str, categories: tuple[str, ...], printed: bool) -> tuple[Entry, ...]:
    """A row for each category, the mean, and if wanted the paper's mean."""
    rows, more = [], [""] * (len(spec.row_headers) - 1)
    for category in (*categories, "mean"):
        where = {"category": category, "dataset": dataset}
        rows.append(Entry((names.category_label(category), *more), rule=category == "mean", where=where))
    mean = next((row for row in spec.rows or () if row.where.get("category") == "mean"), None)
    if printed and mean is not None:
        place = names.dataset_label(spec.where.get("dataset", ""))
        title = (f"{mean.labels[0]}, printed, {place}", *mean.labels[1:])
        rows.append(dataclasses.replace(mean, labels=title, group="", rule=False, runs=ONLY_PRINTED))
    return tuple(rows)


def _of_means(columns: Sequence[Entry], dataset: str) -> list[Entry]:
    """The columns of this data set in the place of the paper's ones."""
    label = names.dataset_label(dataset)
    ours: dict[tuple, Entry] = {}
    for column in columns:
        where = {key: value for key, value in column.where.items() if key != "dataset"} | {"dataset": dataset}
        labels, group = column.labels, column.group
        if "dataset" not in column.where:
            group = group or label
        elif group == names.dataset_label(column.where["dataset"]):
            group = label
        else:
            labels = (label,)
        new = dataclasses.replace(column, labels=labels, group=group, where=where)
        ours.setdefault((labels, group, tuple(sorted(where.items()))), new)
    return list(ours.values())
