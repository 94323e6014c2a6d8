"""The rows of a sweep's table: its cells in the order of the sweep file, with the labels that the spec gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results.aggregator import methods_table, names
from results.aggregator.captions import listed
from results.aggregator.records import StoredRecord
from results.aggregator.scores import Pool
from results.aggregator.spec import Entry, Spec, SpecError
from results.aggregator.sweep_cells import SEED_KEYS, SweepCells, canonical, cell_key, describe_cell, show_value
from results.common.did_you_mean import did_you_mean

#: Which axes a sweep may vary, recognised by the key that it sets.
_SWEPT_AXES = (
    (".backbone", ("backbone", "weights")),
    (".method", ("random weights",)),
    ("image_size", ("image size",)),
    ("resize", ("resize",)),
    ("setting", ("setting", "data")),
    ("protocol", ("protocol",)),
    ("data.init_args", ("data",)),
)


def full_key(short: str, known: Sequence[str], where: str) -> str:
    """The dotted key that a spec means by its last part."""
    if short in known or not known:
        return short
    matches = [key for key in known if key.endswith(f".{short}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SpecError(f"table {where}: {short!r} may be {' or '.join(matches)}; write more of it")
    close = did_you_mean(short, [key.rpartition(".")[2] for key in known])
    raise SpecError(f"table {where}: the sweep has no parameter {short!r}. {close}")


def known_keys(records: Sequence[StoredRecord], sweep: SweepCells | None) -> list[str]:
    """Dotted keys of the sweep's and the records' cells, without the seed's."""
    keys = dict.fromkeys(key for key in (sweep.values if sweep else ()) if key not in SEED_KEYS)
    for stored in records:
        keys.update(dict.fromkeys(key for key in stored.record.cell if key not in SEED_KEYS))
    return list(keys)


def rows_of(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None, known: Sequence[str]
) -> tuple[list[Entry], tuple[str, ...], list[str]]:
    """The rows of a sweep's table, their headers, and the runs that no row stands for."""
    if spec.kind == "methods":
        return methods_table.rows(spec, records, sweep), methods_table.HEADERS, []
    if spec.rows is not None:
        return list(spec.rows), spec.row_headers, []
    chosen = [full_key(key, known, spec.name) for key in spec.parameters] if known else []
    varying = sweep.varying if sweep else _varying_in(records)
    order = [key for key in chosen if key in varying] + [key for key in varying if key not in chosen]
    cells = sweep.cells(order) if sweep else None
    strays: list[str] = []
    if cells is None:  # a search, or no sweep file: what was run
        unique = {cell_key({k: s.record.cell.get(k) for k in order}): s.record.cell for s in records}
        cells = [{key: cell.get(key) for key in order} for cell in unique.values()]
        cells.sort(key=lambda cell: [repr(canonical(cell[key])) for key in order])
    else:
        wanted = {cell_key(cell) for cell in cells}
        kept = set(order)
        strays = [s.name for s in records if frozenset(item for item in s.cell if item[0] in kept) not in wanted]
    labels = {full_key(key, known, spec.name): entry for key, entry in spec.parameters.items()} if known else {}
    default = (
        {full_key(key, known, spec.name): canonical(value) for key, value in spec.default.items()} if known else {}
    )
    entries = []
    for cell in cells:
        texts = tuple(value_label(labels.get(key, {}).get("values", {}), value, key) for key, value in cell.items())
        is_default = bool(default) and all(
            canonical(cell.get(key)) == value for key, value in default.items() if key in cell
        )
        entries.append(Entry(texts or ("all",), default=is_default, runs={"cell": cell}))
    headers = tuple(labels.get(key, {}).get("label", key.rsplit(".", 1)[-1].replace("_", " ")) for key in order)
    return entries, headers or ("",), strays


def value_label(labels: Mapping[Any, str], value: Any, key: str = "") -> str:
    """What the spec calls a parameter's value, else a method's name or the value itself."""
    for key, text in labels.items():
        if canonical(key) == canonical(value) or str(key) == show_value(value):
            return str(text)
    return names.method_label(str(value)) if key == "method" else show_value(value)


def _varying_in(records: Sequence[StoredRecord]) -> list[str]:
    """Cell keys with more than one value among the records, in the order of their first appearance."""
    values: dict[str, set] = {}
    for stored in records:
        for key, value in stored.record.cell.items():
            if key not in SEED_KEYS:
                values.setdefault(key, set()).add(canonical(value))
    return [key for key, found in values.items() if len(found) > 1]


def varies(spec: Spec, sweep: SweepCells | None) -> set[str]:
    """Axes on which the records of a sweep differ on purpose."""
    keys = list(sweep.varying) if sweep else []
    for entry in (*(spec.rows or ()), *spec.columns):
        keys += [str(key) for key in entry.runs.get("cell") or {}]
    keys += list(spec.parameters)
    return {axis for key in keys for part, axes in _SWEPT_AXES if part in f".{key}" for axis in axes}


def missing_seeds(entries: Sequence[Entry], pool: Pool, spec: Spec, known: Sequence[str]) -> list[str]:
    """Cells that lack a seed which other cells have."""
    seeds = {stored.record.seed for stored in pool.records}
    lines = []
    for entry in entries:
        cell = {full_key(key, known, spec.name): value for key, value in (entry.runs.get("cell") or {}).items()}
        have = {stored.record.seed for stored in pool.of_cell(spec.sweep, cell_key(cell))} if cell else set()
        if have and have != seeds:
            lost, there = listed(sorted(seeds - have)), listed(sorted(have))
            lines.append(f"{describe_cell(cell)}: seed {lost} is missing (there: {there})")
    return lines
