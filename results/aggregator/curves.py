"""The identical shortcut as a table: how far the loss falls, and what that does to detection and localisation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from results.aggregator import reference
from results.aggregator.captions import describe_runs, shouts, version_notes
from results.aggregator.history import DETECTION, LOCALISATION, LOSS, Curve, read_curve
from results.aggregator.records import RecordError, StoredRecord
from results.aggregator.scores import Query, check_cell, check_table
from results.aggregator.spec import Spec
from results.aggregator.sweep_cells import SweepCells, cell_key
from results.aggregator.sweep_rows import known_keys, rows_of
from results.aggregator.table import Cell, Column, Row, Table, Value


def with_history(records: Sequence[StoredRecord]) -> tuple[list[StoredRecord], list[str]]:
    """The records whose history can be read, and why others cannot."""
    good, problems = [], []
    for stored in records:
        try:
            stored.history  # noqa: B018 - read on first use
            good.append(stored)
        except RecordError as error:
            problems.append(f"Damaged record, left out: {error}")
    return good, problems


def cell_curves(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None
) -> list[tuple[str, list[StoredRecord]]]:
    """The sweep's cells in the table's order: label and records (one per seed, may be empty)."""
    entries, _, _ = rows_of(spec, records, sweep, known_keys(records, sweep))
    found = []
    for entry in entries:
        wanted = cell_key(entry.runs.get("cell") or {})
        found.append((", ".join(entry.labels), [stored for stored in records if wanted <= stored.cell]))
    return found


def curve_table(spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None = None) -> Table:
    """Per cell: the loss's first and final value; peak, epoch of the peak, final value and drop of both AUROCs.

    AUROCs in percent, drop in points, mean ± std over seeds. A cell without a curve is a dash and listed. Runs of
    different length are said so above the table, because a longer run has more time to fall.
    """
    records, problems = with_history(records)
    entries, headers, _ = rows_of(spec, records, sweep, known_keys(records, sweep))
    columns = [Column("first", "Loss", "loss", scientific=True), Column("final", "Loss", "loss", scientific=True)]
    for group in ("Image AUROC", "Pixel AUROC"):
        columns += [
            Column(label, group, "threshold", 0 if label == "epoch" else 1)
            for label in ("peak", "epoch", "final", "drop")
        ]
    rows, cells, missing = [], [], []
    last_epochs: set[int] = set()
    for entry, (label, mine) in zip(entries, cell_curves(spec, records, sweep), strict=True):
        rows.append(Row(entry.labels, default=entry.default))
        if mine:
            check_cell(mine, Query("image_auroc", mine[0].record.datasets[0]["name"]))
        line: list[Cell] = []
        for name, width in ((LOSS, 2), (DETECTION, 4), (LOCALISATION, 4)):
            read = [(stored.name, read_curve(stored, name)) for stored in mine]
            silent = [run for run, curve in read if curve is None]
            if not mine or silent:
                reason = f"no {name} in the history of {', '.join(silent)}" if silent else "no run"
                missing.append(f"{label}: {reason}")
                line += [Cell(runs=Value(reason=reason))] * width
                continue
            curves = [curve for _, curve in read if curve is not None]
            last_epochs.update(curve.epochs[-1] for curve in curves)
            line += [Cell(runs=value) for value in _summary(name, curves, mine)]
        cells.append(line)
    used = [(Query("image_auroc", d["name"]), stored) for stored in records for d in stored.record.datasets]
    check_table(used, where=f"the curves of sweep {spec.sweep}")
    table = Table(
        spec.name, spec.title, "runs", headers, rows, columns, cells, notes=[*spec.notes, *reference.notes(records)]
    )
    table.missing = list(dict.fromkeys(missing))
    table.warnings = [*shouts(records), *problems]
    table.notes += version_notes(table, records)
    if len(last_epochs) > 1:
        table.warnings.append(f"Runs of different length in one table: last epochs {sorted(last_epochs)}.")
    table.caption = f"Peak: best epoch on the test set; drop: peak minus final, in points. {describe_runs(records)}"
    return table


def _summary(name: str, curves: Sequence[Curve], records: Sequence[StoredRecord]) -> list[Value]:
    if name == LOSS:
        columns = [[curve.values[0] for curve in curves], [curve.final for curve in curves]]
    else:
        peaks = [curve.peak for curve in curves]
        columns = [
            [100 * value for value, _ in peaks],
            [float(epoch) for _, epoch in peaks],
            [100 * curve.final for curve in curves],
            [100 * (value - curve.final) for (value, _), curve in zip(peaks, curves, strict=True)],
        ]
    names = tuple(sorted(stored.name for stored in records))
    return [
        Value(
            statistics.fmean(column),
            statistics.stdev(column) if len(column) > 1 else None,
            len(column),
            records=names,
            reference=any(stored.reference for stored in records),
        )
        for column in columns
    ]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds at the epochs that all of them have."""
    common = sorted(set.intersection(*(set(curve.epochs) for curve in curves)))
    lookup: list[Mapping[int, float]] = [dict(zip(curve.epochs, curve.values, strict=True)) for curve in curves]
    return Curve(tuple(common), tuple(statistics.fmean(values[epoch] for values in lookup) for epoch in common))
