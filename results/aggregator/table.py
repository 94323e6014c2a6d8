"""A table before it is printed: labelled rows and columns of values that know where they come from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from results.aggregator.names import COSTS, is_ranked


@dataclass
class Value:
    """One number. `mean` and `std` are in percent (costs in their own unit); `mean` is None if there is none, then
    `reason` says why. `n` is the number of seeds behind it, `records` the runs ("sweep/run"), `mark` best, second or
    "".
    """

    mean: float | None = None
    std: float | None = None
    n: int | None = None
    reason: str = ""
    records: tuple[str, ...] = ()
    gap: float | None = None  # this value minus the default row's; for published values the gap as printed
    mark: str = ""
    note: str = ""
    printed: bool = False  # a paper's number: its spread is shown as printed, its gap without sign
    reference: bool = False  # from records that come with the project


@dataclass
class Cell:
    """What stands at one place: what the paper printed, what our runs give, or both. `key` is the query behind it."""

    published: Value | None = None
    runs: Value | None = None
    key: dict[str, str] = field(default_factory=dict)
    variant: str = ""  # of the runs, such as "selected at test"

    @property
    def main(self) -> Value:
        """The value that the table is about: ours, if it shows our runs at all."""
        return self.runs if self.runs is not None else self.published if self.published is not None else Value()

    @property
    def ours(self) -> float | None:
        """The mean of our runs, if there is one."""
        return None if self.runs is None else self.runs.mean

    @property
    def difference(self) -> float | None:
        """Ours minus published, where both exist."""
        if self.published is None or self.runs is None or self.published.mean is None or self.runs.mean is None:
            return None
        return self.runs.mean - self.published.mean


@dataclass
class Row:
    """A row's labels (one per row header), the group that it stands in, and whether a line goes above it.

    A `control` stands beside the rows that are compared, and a row `apart` is told more than they are: neither is ranked
    among them.
    """

    labels: tuple[str, ...]
    group: str = ""
    rule: bool = False
    default: bool = False
    control: bool = False
    apart: bool = False


@dataclass
class Column:
    """A column's label and group; `metric` decides on marks and digits."""

    label: str
    group: str = ""
    metric: str = ""
    digits: int = 1
    scientific: bool = False  # losses: three significant digits

    @property
    def ranked(self) -> bool:
        """Whether best and second best are marked in this column."""
        return is_ranked(self.metric)


@dataclass
class Table:
    """A finished table. `source` is published, runs or both; `missing` lists what a dash stands for."""

    name: str
    title: str
    source: str
    row_headers: tuple[str, ...]
    rows: list[Row]
    columns: list[Column]
    cells: list[list[Cell]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # shouted above the table

    @property
    def seeds(self) -> set[int]:
        """The numbers of seeds that occur; one value means that it can be said once, in the caption."""
        return {cell.runs.n for row in self.cells for cell in row if cell.runs is not None and cell.runs.n is not None}

    @property
    def has_runs(self) -> bool:
        """Whether any of our runs stands in the table."""
        return any(cell.runs is not None and cell.runs.mean is not None for row in self.cells for cell in row)


def mark_values(table: Table, compare: str) -> None:
    """Mark best and second best in place.

    compare: "columns" ranks the rows within each column (ablations), "rows" ranks the columns with the same metric
    within each row (methods side by side), "none" marks nothing. Ties at the printed precision share the mark. Of our runs
    no number is marked that differs from its neighbour in rank by no more than the spread of the seeds.
    """
    if compare == "none":
        return
    for which in ("published", "runs"):
        if compare == "columns":
            lines = [
                [
                    (getattr(cells[j], which), column.digits)
                    for row, cells in zip(table.rows, table.cells, strict=True)
                    if not row.control and not row.apart
                ]
                for j, column in enumerate(table.columns)
                if column.ranked
            ]
        else:
            metrics = dict.fromkeys(column.metric for column in table.columns if column.ranked)
            lines = [
                [(getattr(row[j], which), c.digits) for j, c in enumerate(table.columns) if c.metric == metric]
                for line, row in zip(table.rows, table.cells, strict=True)
                if not line.control
                for metric in metrics
            ]
        for line in lines:
            _mark_line(line)


def _mark_line(line: Sequence[tuple[Value | None, int]]) -> None:
    present = [
        (value, round(value.mean, digits)) for value, digits in line if value is not None and value.mean is not None
    ]
    levels = sorted({rounded for _, rounded in present}, reverse=True)
    if len(levels) < 2:  # a single value, or all equal, cannot be ranked
        return
    apart = [_apart(present, above, below) for above, below in itertools.pairwise(levels[:3])]
    marks = {levels[0]: "best"} if apart[0] else {}
    if all(apart):
        marks[levels[1]] = "second"
    for value, rounded in present:
        value.mark = marks.get(rounded, "")


def _apart(present: Sequence[tuple[Value, float]], above: float, below: float) -> bool:
    """Whether two neighbouring ranks differ by more than the seeds of either spread; with one seed nothing is known of it."""
    spreads = [v.std for v, rounded in present if rounded in (above, below) and v.std is not None and not v.printed]
    return above - below > max(spreads, default=0.0)


def add_gaps(table: Table) -> None:
    """Give every value of our runs its distance to the default row, in place; costs and unranked columns have none."""
    defaults = [index for index, row in enumerate(table.rows) if row.default]
    if len(defaults) != 1:
        return
    for j, column in enumerate(table.columns):
        reference = table.cells[defaults[0]][j].runs
        if column.metric in COSTS or not column.ranked or reference is None or reference.mean is None:
            continue
        for i, row in enumerate(table.cells):
            value = row[j].runs
            if i != defaults[0] and value is not None and value.mean is not None:
                value.gap = value.mean - reference.mean
