"""Tables in documents whose numbers are the reference records': a row names its cell, and this fills it in, or checks it.

A row `| PaDiM <!-- methods on photos: method=padim compare=recipe --> | 82.8 | ... |` is of that cell of that sweep, on
that data (a data set's name or folder, for a sweep with several). The header says which metric each column is; columns of
other names, and rows without such a comment, are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from results.aggregator import names, reference
from results.aggregator.records import RecordSet, StoredRecord
from results.aggregator.render import DASH
from results.aggregator.scores import Pool, Query
from results.aggregator.sweep_cells import canonical, cell_key, describe_cell
from results.common.did_you_mean import did_you_mean

DOCUMENTS = (Path("README.md"), Path("results/DEMOS.md"))
METRICS = {label: metric for metric, label in names.METRICS.items()} | {"train s": "train_seconds"}
"""Heading -> metric."""
_BAR = re.compile(r"(?<!\\)\|")
_CELL = re.compile(r"<!-- (\w+)(?: on ([\w./]+))?: ((?:\S+=\S+ )+)-->")


class DocumentError(ValueError):
    """A row that names no cell, or more than one; the message says where and what there is."""


def filled(text: str, name: str, root: Path = reference.FOLDER) -> str:
    """The document with the records' numbers in every row that names its cell.

    Args:
        text: In Markdown.
        name: Of the document, for messages.
        root: The reference folder.

    Raises:
        DocumentError: names the document and the line.
    """

    @cache
    def records(sweep: str) -> RecordSet:
        return reference.read_reference(root, sweep)

    lines = text.splitlines(keepends=True)
    head: list[str] = []
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            head = []
            continue
        _, *cells, end = _BAR.split(line)
        head = head or [cell.strip() for cell in cells]
        if not cells or "<!--" not in cells[0]:
            continue
        try:
            if not (named := _CELL.search(cells[0])):
                raise ValueError("the comment must be like <!-- sweep on data: key=value key=value -->")
            if len(cells) != len(head):
                raise ValueError(f"the row has {len(cells)} columns, its table's header {len(head)}")
            mine = _of_cell(records(named[1]), *named.groups())
            cells = [_cell(mine, METRICS.get(title), old) for title, old in zip(head, cells, strict=True)]
        except ValueError as error:
            raise DocumentError(f"{name}, line {number + 1}: {error}") from error
        lines[number] = f"|{'|'.join(cells)}|{end}"
    return "".join(lines)


def _of_cell(records: RecordSet, sweep: str, data: str | None, conditions: str) -> list[StoredRecord]:
    """The records of the one cell that a comment names, one per seed and, trained apart, per category."""
    wanted = [condition.partition("=")[::2] for condition in conditions.split()]
    if records.damaged:
        raise ValueError(f"a record of {sweep} is damaged: {records.damaged[0]}")
    if not records:
        raise ValueError(
            f"there are no reference records of a sweep {sweep}; `make reference ONLY={sweep}` makes what is planned"
        )
    keys = {key.rsplit(".", 1)[-1] for stored in records for key in stored.record.cell}
    for key, _ in wanted:
        if key not in keys:
            raise ValueError(f"{sweep} has no parameter {key!r}. {did_you_mean(key, sorted(keys))}")
    found = [
        stored
        for stored in records
        if all(
            any(
                name.rsplit(".", 1)[-1] == key and canonical(has) == canonical(value)
                for name, has in stored.record.cell.items()
            )
            for key, value in wanted
        )
        and (data is None or data in _data(stored))
    ]
    kinds = {(cell_key(stored.record.cell), str(_data(stored))): stored for stored in found}
    if len(kinds) != 1:
        there = "; ".join(f"{describe_cell(s.record.cell)} on {_data(s)[-1]}" for s in kinds.values())
        raise ValueError(f"the row must name one cell of {sweep}, and names {len(kinds)}{': ' if there else ''}{there}")
    return found


def _data(stored: StoredRecord) -> list[str]:
    """Names of a record's data sets, and the folders that they lay in."""
    return [d["name"] for d in stored.record.datasets] + [p.split()[-1] for p in reference.places(stored) or ()]


def _cell(records: Sequence[StoredRecord], metric: str | None, old: str) -> str:
    """A cell of the table: the records' number, or what stood there if the column is of no metric."""
    if metric is None:
        return old
    dataset = records[0].record.datasets[0]
    pool = Pool(records, categories={dataset["name"]: tuple(dataset["categories"])})
    value = pool.value(Query(metric, dataset["name"], sweep=records[0].record.sweep, cell=frozenset()))
    if value.mean is None:
        return f" {DASH} "
    digits = 0 if metric in names.COSTS else 1
    spread = "" if value.std is None else f" ± {value.std:.{digits}f}"
    return f" {value.mean:.{digits}f}{spread} "
