"""The papers' tables as they were printed: one long table of all CSV files in `results/published/`.

Columns: source, table, dataset, category, method, variant, metric, value, std, certainty, note. Values are percent, as
printed, wrong ones included; `<metric>_gap` is the gap to the default row as printed. A category `mean` (or
`mean_objects`, `mean_textures`) is a printed mean, not one that was computed here. certainty: printed;
cross-checked and repaired for tables read from a picture; cited for a number that another paper or page quotes;
unverified for one from memory, of which no copy could be read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "published"
COLUMNS = (
    "source", "table", "dataset", "category", "method", "variant", "metric", "value", "std", "certainty", "note",
)  # fmt: skip
KEYS = COLUMNS[:7]
"""Columns that name a printed number; no two lines agree in all of them."""
CERTAINTIES = ("printed", "cross-checked", "repaired", "cited", "unverified")


@dataclass(frozen=True)
class Printed:
    """One printed number: value and std in percent, std None if the paper gives none."""

    value: float
    std: float | None
    certainty: str
    note: str


def read_published(folder: str | Path = FOLDER) -> dict[tuple[str, ...], Printed]:
    """All printed numbers by (source, table, dataset, category, method, variant, metric), in the files' order.

    Raises ValueError naming file and line for wrong columns, an unknown certainty, no number, or a repeated key.
    """
    return dict(_read(str(folder)))


@lru_cache(maxsize=8)
def _read(folder: str) -> dict[tuple[str, ...], Printed]:
    numbers: dict[tuple[str, ...], Printed] = {}
    for file in sorted(Path(folder).glob("*.csv")):
        with open(file, newline="", encoding="utf-8") as stream:
            _add(numbers, csv.reader(stream), file)
    return numbers


def _add(numbers: dict[tuple[str, ...], Printed], lines: Iterable[list[str]], file: Path) -> None:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            if tuple(line) != COLUMNS:
                raise ValueError(f"{file}: columns are {', '.join(line)}; needed are {', '.join(COLUMNS)}")
            continue
        if len(line) != len(COLUMNS):
            raise ValueError(f"{file} line {number}: {len(line)} fields instead of {len(COLUMNS)}")
        key, (value, std, certainty, note) = tuple(line[:7]), line[7:]
        if certainty not in CERTAINTIES:
            raise ValueError(
                f"{file} line {number}: certainty {certainty!r} is unknown; allowed are {', '.join(CERTAINTIES)}"
            )
        if key in numbers:
            raise ValueError(f"{file} line {number}: {' / '.join(key)} occurs twice")
        try:
            numbers[key] = Printed(float(value), float(std) if std else None, certainty, note)
        except ValueError:
            raise ValueError(f"{file} line {number}: value {value!r} or std {std!r} is not a number") from None
