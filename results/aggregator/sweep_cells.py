"""What a table needs to know of a W&B sweep file: which cells there are, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from results.common.sweep_file import axis, read

SEED_KEYS = ("seed_everything", "seed")


@dataclass(frozen=True)
class SweepCells:
    """A sweep's parameters in the file's order: dotted key -> its values (a fixed one has a single value).

    `values` is None for a parameter that is drawn from a range, and for all parameters of a random or bayes search:
    then the cells are the ones that were run.
    """

    name: str
    description: str
    values: dict[str, list[Any] | None]

    @property
    def varying(self) -> list[str]:
        """Keys with more than one value, without the seed, in the file's order."""
        return [
            key for key, values in self.values.items() if key not in SEED_KEYS and (values is None or len(values) > 1)
        ]

    @property
    def seeds(self) -> list[int] | None:
        """The seeds that the file asks for, None if it leaves them open."""
        for key in SEED_KEYS:
            if self.values.get(key):
                return [int(seed) for seed in self.values[key] or ()]
        return None

    def cells(self, order: Sequence[str] | None = None) -> list[dict[str, Any]] | None:
        """The grid's cells without seeds, first key slowest, values in the file's order; None for a search."""
        keys = list(order or self.varying)
        axes = [values for key in keys if (values := self.values.get(key)) is not None]
        if len(axes) < len(keys):
            return None
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes)]


def read_sweep(path: str | Path) -> SweepCells:
    """Read a sweep file; raises ValueError naming the file and the key that cannot be understood."""
    path = Path(path)
    content = read(path)
    if not isinstance(content.get("parameters"), Mapping):
        raise ValueError(f"{path}: a sweep file is a mapping with `parameters`")
    grid = content.get("method", "grid") == "grid"
    values: dict[str, list[Any] | None] = {}
    for key, entry in content["parameters"].items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{path}: parameter {key!r} is {entry!r}; write {{value: ...}} or {{values: [...]}}")
        known = grid or "value" in entry or (key in SEED_KEYS and "values" in entry)
        found = axis(entry) if known else None
        values[key] = None if found is None else _unique(found)
    return SweepCells(str(content.get("name", path.stem)), str(content.get("description") or ""), values)


def canonical(value: Any) -> Any:
    """A hashable form in which two spellings of one value are equal: 1 and 1.0, [4, 3] and (4, 3), "null" and None.

    True and 1 stay different, as in W&B. Strings that the command line would read as another type become that type.
    """
    if isinstance(value, str):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            return ("str", value)
        if isinstance(parsed, str):
            try:
                return ("number", float(parsed))  # YAML 1.1 reads 1e-4 as a string
            except ValueError:
                return ("str", parsed)
        return canonical(parsed)
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, (int, float)):
        return ("number", float(value))
    if isinstance(value, Mapping):
        return ("mapping", tuple(sorted((str(key), canonical(item)) for key, item in value.items())))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(canonical(item) for item in value))
    return ("str", str(value))


def cell_key(cell: Mapping[str, Any]) -> frozenset:
    """Identity of a cell, its seed left out; a part of a cell is a subset."""
    return frozenset((key, canonical(value)) for key, value in cell.items() if key not in SEED_KEYS)


def describe_cell(cell: Mapping[str, Any]) -> str:
    """A cell in one line, with the last part of each key: `neighbor_size=7, query=layerwise`."""
    parts = [f"{key.rsplit('.', 1)[-1]}={show_value(value)}" for key, value in cell.items() if key not in SEED_KEYS]
    return ", ".join(parts) or "no parameters"


def show_value(value: Any) -> str:
    """A parameter's value as a reader writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "{" + ", ".join(show_value(item) for item in value) + "}"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _unique(values: Sequence[Any]) -> list[Any]:
    seen: dict[Any, Any] = {}
    for value in values:
        seen.setdefault(canonical(value), value)
    return list(seen.values())
