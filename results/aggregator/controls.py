"""Rows below a sweep's table for what was looked up in the same features, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from results.aggregator import names
from results.aggregator.records import StoredRecord, data_options
from results.aggregator.scores import Pool, Query
from results.aggregator.spec import Spec, spec_for_sweep
from results.aggregator.sweep_cells import canonical, describe_cell
from results.aggregator.sweep_rows import value_label
from results.aggregator.table import Cell, Row, Table, Value


def add_controls(table: Table, spec: Spec, pool: Pool, controls: Sequence[StoredRecord]) -> None:
    """Rows below the table for what was looked up in the same features, on the same data, under the same conditions."""
    wanted = {_features(stored) for _, stored in pool.used}
    rows = {stored.record.method for _, stored in pool.used}
    found = [stored for stored in controls if _features(stored) in wanted and stored.record.method not in rows]
    cells: dict[frozenset, StoredRecord] = {}
    for stored in sorted(
        found, key=lambda stored: [repr(value) for value in map(canonical, stored.record.cell.values())]
    ):
        cells.setdefault(stored.cell, stored)
    beside = Pool(found, pool.rms_std, categories=pool.categories)
    for cell, stored in cells.items():
        line = []
        for column, above in zip(table.columns, table.cells[0] if table.cells else (), strict=True):
            if above.runs is None:  # a printed column
                line.append(Cell(published=Value(reason="not printed"), key=dict(above.key)))
                continue
            key = {**above.key, "metric": column.metric, "method": stored.record.method, "variant": ""}
            value = beside.value(
                Query(column.metric, key["dataset"], key["category"], sweep=stored.record.sweep, cell=cell)
            )
            line.append(Cell(runs=value, key=key))
        label = f"{names.method_label(stored.record.method)}, {_in_words(stored)}"
        labels = (label, *[""] * (len(table.row_headers) - 1))
        table.rows.append(Row(labels, "Control, nothing trained", control=True))
        table.cells.append(line)
    pool.used += beside.used


def _in_words(stored: StoredRecord) -> str:
    """A control's cell as its own sweep's table calls it: `grid 8×8`."""
    known = spec_for_sweep(stored.record.sweep).parameters
    parts = []
    for key, value in stored.record.cell.items():
        if key in known:
            label = value_label(known[key].get("values", {}), value)
            parts.append(f"{str(known[key].get('label', key)).lower()} {label}")
    return ", ".join(parts) or describe_cell(stored.record.cell)


def _features(stored: StoredRecord) -> tuple[Any, ...]:
    """What a control must share with a row that it stands below: data, conditions, and the backbone that gives features."""
    record = stored.record
    data = tuple(sorted((d["name"], str(d["fingerprint"]), data_options(d)) for d in record.datasets))
    backbone = (record.backbone["name"], str(record.backbone["weights"]), str(record.backbone.get("sha256")))
    conditions = (record.profile, record.protocol, record.setting, str(record.metrics["version"]))
    return data, conditions, record.image_size, record.resize, backbone
