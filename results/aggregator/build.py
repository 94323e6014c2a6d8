"""Build tables: the papers' from what was printed or from our runs, and a sweep's from its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from results.aggregator import chance, methods_table, names, reference
from results.aggregator.captions import (
    NO_RUN,
    describe_runs,
    finish,
    found_categories,
    missing_values,
    shouts,
    version_notes,
)
from results.aggregator.controls import add_controls
from results.aggregator.other_data import on_data
from results.aggregator.published import KEYS, Printed, read_published
from results.aggregator.records import StoredRecord
from results.aggregator.scores import Pool, Query, check_table
from results.aggregator.spec import Entry, Spec, SpecError
from results.aggregator.sweep_cells import SweepCells, cell_key
from results.aggregator.sweep_rows import full_key, known_keys, missing_seeds, rows_of, varies
from results.aggregator.table import Cell, Column, Row, Table, Value, add_gaps
from results.common.methods import COMPARE, SWEEP

SOURCES = ("published", "runs", "both")
OWN_PAPERS = "own_papers"
"""Source of the published numbers that a method's own paper prints."""


def paper_table(
    spec: Spec,
    source: str = "published",
    records: Sequence[StoredRecord] = (),
    published: Mapping[tuple[str, ...], Printed] | None = None,
    rms_std: bool = False,
    dataset: str | None = None,
) -> Table:
    """A table with exactly the spec's rows and columns, filled from one side or both.

    With `dataset` its rows are the categories of that data set as the records know them; see `other_data`.

    Raises SpecError if the spec asks for nothing on the wanted side, ConflictError if records must not meet.
    """
    if source not in SOURCES:
        raise SpecError(f"source {source!r} is unknown; choose from {', '.join(SOURCES)}")
    if dataset is not None:
        spec = on_data(spec, dataset, records, printed=source == "both")
    if spec.rows is None:
        raise SpecError(f"{spec.name} is the table of sweep {spec.sweep}, not of a paper; use `sweep {spec.sweep}`")
    if source != "runs" and "source" not in spec.where:
        raise SpecError(f"{spec.name} has no printed counterpart; use --source runs")
    printed = read_published() if published is None else published
    pool = Pool(records, rms_std)
    if dataset is not None:
        pool.categories = found_categories(records)
    keys = known_keys([stored for stored in records if stored.record.sweep == spec.sweep], None)
    rows = [Row(row.labels, row.group, row.rule, row.default, apart=row.apart) for row in spec.rows]
    columns = [_column(column, spec) for column in spec.columns]
    cells = [[Cell(key=_merge(spec, row, column)) for column in spec.columns] for row in spec.rows]
    for row, line in zip(spec.rows, cells, strict=True):
        for column, cell in zip(spec.columns, line, strict=True):
            if source != "runs" and cell.key["dataset"] != dataset:
                cell.published = _printed_value(cell.key, printed)
            runs = {**row.runs, **column.runs}
            if source != "published" and cell.key.get("method") != "dataset" and "absent" not in runs:
                query = _query(spec, cell.key, runs, keys)
                queries = [query] if query.sweep else [_of_methods(query), query]
                answered = [each for each in queries if pool.find(each)]
                found = [pool.value(each) for each in answered[:1] or queries]
                cell.runs = max(found, key=lambda value: len(value.reason))  # what was found, else the fuller reason
    table = Table(spec.name, spec.title, source, spec.row_headers, rows, columns, cells, notes=list(spec.notes))
    check_table(pool.used, varies(spec, None), f"table {spec.name}")
    finish(table, spec, pool)
    if source != "published" and not table.has_runs:
        table.caption = table.caption.replace(NO_RUN, f"{NO_RUN} {_why_none(spec, table, records)}")
    if source == "both" and spec.own_papers is not None:
        _add_own_papers(table, spec, spec.own_papers, printed)
    return table


def _why_none(spec: Spec, table: Table, records: Sequence[StoredRecord]) -> str:
    """What the table asks of a run, and what there is instead."""
    keys = [cell.key for line in table.cells for cell in line if cell.runs is not None]
    wanted = {
        name: list(dict.fromkeys(filter(None, (key.get(name) for key in keys)))) for name in ("method", "dataset")
    }
    setting = {"unified": ", one model for all categories", "per_category": ", one model per category"}.get(
        spec.setting or "", ""
    )
    data = " or ".join(map(names.dataset_label, wanted["dataset"]))
    few = [names.method_label(method) for method in wanted["method"]]
    methods_text = ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
    place = f"the sweep {spec.sweep}" if spec.sweep else "a training of its own, or a cell of the sweep methods"
    asked = f"It asks for {methods_text} on {data}{setting}: {place}."
    found: dict[str, int] = {}
    for stored in records:
        record = stored.record
        on = " and ".join(names.dataset_label(d["name"]) for d in record.datasets)
        at = f"sweep {record.sweep}" if record.cell else "by itself"
        text = f"{names.method_label(record.method)} on {on} ({record.setting.replace('_', ' ')}, {at})"
        found[text] = found.get(text, 0) + 1
    if not found:
        return f"{asked} There is no run at all."
    wanted_first = sorted(found.items(), key=lambda item: (not any(item[0].startswith(f"{m} ") for m in few), -item[1]))
    listed = "; ".join(f"{count} of {text}" for text, count in wanted_first[:5])
    return f"{asked} There are {listed}" + (f"; and {len(found) - 5} more kinds." if len(found) > 5 else ".")


def _add_own_papers(table: Table, spec: Spec, points: float, printed: Mapping[tuple[str, ...], Printed]) -> None:
    """Beside a column with a number `points` or more from its method's own paper, a column of the own papers' numbers; and
    a footnote.
    """
    own = {
        (dataset, category, method, variant, metric): (paper, number)
        for (source, paper, dataset, category, method, variant, metric), number in printed.items()
        if source == OWN_PAPERS
    }
    setting = f"setting={spec.setting or 'per_category'}"
    for j in reversed(range(len(table.columns))):
        column, cells, far = table.columns[j], [], []
        for line in table.cells:
            key, value = line[j].key, line[j].published
            dataset, category, method, metric = (key.get(k, "") for k in ("dataset", "category", "method", "metric"))
            shown = Value(reason="its own paper's number is not known here")
            if known := own.get((dataset, category, method, setting, metric)):
                paper, number = known
                shown = Value(number.value, note=f"{paper}; {number.certainty}: {number.note}", printed=True)
                here = None if value is None else value.mean
                if here is not None and abs(here - number.value) >= points:
                    name = f"{names.method_label(method)}, {names.metric_label(metric)}"
                    far.append(f"{name}: {here:g} here, {number.value:g} in {paper} ({number.note})")
            cells.append(Cell(published=shown, key={**key, "source": OWN_PAPERS}))
        if not far:
            continue
        label = f"{column.label}, own paper" if column.group else column.label
        group = column.group or "own paper"
        table.columns.insert(j + 1, dataclasses.replace(column, label=label, group=group, metric="threshold"))
        for line, cell in zip(table.cells, cells, strict=True):
            line.insert(j + 1, cell)
        table.notes.append(f"Far from the method's own paper: {'; '.join(far)}.")


def sweep_table(
    spec: Spec,
    records: Sequence[StoredRecord],
    sweep: SweepCells | None = None,
    printed_beside: bool = True,
    rms_std: bool = False,
    published: Mapping[tuple[str, ...], Printed] | None = None,
    controls: Sequence[StoredRecord] = (),
) -> Table:
    """The table of one sweep: a row per cell (or as the spec lists them), on whatever data it was run.

    Args:
        spec: see `results.aggregator.spec`; its `where` concerns only what the paper printed.
        records: the sweep's records.
        sweep: the sweep file; without it the rows are the cells that were run.
        printed_beside: append the paper's printed columns where the spec names them.
        controls: records of the sweeps in `names.CONTROLS`; those on the same features stand below, a row per cell.
    """
    datasets = list(dict.fromkeys(dataset["name"] for stored in records for dataset in stored.record.datasets))
    pool = Pool(records, rms_std, categories=found_categories(records))
    keys = known_keys(records, sweep)
    entries, headers, strays = rows_of(spec, records, sweep, keys)
    plan: list[tuple[Entry, str]] = []
    for number, dataset in enumerate(datasets or [""]):
        for column in spec.columns:
            once = "dataset" in column.where or column.where.get("metric") in names.COSTS
            if number == 0 or not once:
                plan.append((column, column.where.get("dataset", dataset)))
    columns: list[Column] = []
    cells: list[list[Cell]] = [[] for _ in entries]
    for column, dataset in plan:
        group = (
            names.dataset_label(dataset) if len(datasets) > 1 and column.where.get("metric") not in names.COSTS else ""
        )
        columns.append(dataclasses.replace(_column(column, spec), group=group or column.group))
        for row, line in zip(entries, cells, strict=True):
            key = {**_merge(spec, row, column), "dataset": dataset}
            runs = {**row.runs, **column.runs}
            value = Value(reason="no run corresponds") if "absent" in runs else None
            query = _query(spec, key, runs, keys, sweep=True)
            line.append(Cell(runs=value or pool.value(query), key=key, variant=query.variant))
    if printed_beside and "source" in spec.where:
        printed = read_published() if published is None else published
        paper = f"printed, {names.dataset_label(spec.where.get('dataset', ''))}".rstrip(", ")
        for column in spec.columns:
            found = [_printed_value(_merge(spec, row, column), printed) for row in entries]
            if any(value.mean is not None for value in found):
                columns.append(dataclasses.replace(_column(column, spec), group=paper))
                for row, line, value in zip(entries, cells, found, strict=True):
                    line.append(Cell(published=value, key=_merge(spec, row, column)))
    rows = [Row(row.labels, row.group, row.rule, row.default, apart=row.apart) for row in entries]
    table = Table(spec.name, spec.title, "runs", headers, rows, columns, cells, notes=list(spec.notes))
    if spec.kind == "methods":
        suffix, what = methods_table.experiment(records)
        table.name, table.title = spec.name + suffix, f"{spec.title}, {what}" if what else spec.title
    check_table(pool.used, varies(spec, sweep), f"the table of sweep {spec.sweep}")
    if spec.sweep not in names.CONTROLS and spec.kind != "methods":  # the methods have their control among them
        add_controls(table, spec, pool, controls)
    table.missing += missing_seeds(entries, pool, spec, keys)
    if strays:
        listed = ", ".join(strays[:5]) + (f" and {len(strays) - 5} more" if len(strays) > 5 else "")
        table.notes.append(f"Runs of cells that are not in the sweep file, left out: {listed}.")
    finish(table, spec, pool)
    add_gaps(table)
    return table


def category_tables(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None = None, rms_std: bool = False
) -> list[Table]:
    """One table per cell of a sweep: a row per category and the mean, a column per metric."""
    pool = Pool(records, rms_std, categories=found_categories(records))
    keys = known_keys(records, sweep)
    entries, headers, _ = rows_of(spec, records, sweep, keys)
    metrics = [column for column in (*spec.columns, *spec.details) if column.where.get("metric") not in names.COSTS]
    tables = []
    for number, entry in enumerate(entries, start=1):
        rows, cells = [], []
        for dataset, categories in pool.categories.items():
            group = names.dataset_label(dataset) if len(pool.categories) > 1 else ""
            for category in (*categories, "mean"):
                rows.append(Row((names.category_label(category),), group, rule=category == "mean"))
                line = []
                for column in metrics:
                    key = {**_merge(spec, entry, column), "dataset": dataset, "category": category}
                    runs = {**entry.runs, **column.runs}
                    line.append(Cell(runs=pool.value(_query(spec, key, runs, keys, sweep=True)), key=key))
                cells.append(line)
        labels = [f"{head}: {text}" if head else text for head, text in zip(headers, entry.labels, strict=True)]
        title = f"{spec.title}: {', '.join(labels)}" + (" (default)" if entry.default else "")
        table = Table(
            f"{spec.name}.{number}", title, "runs", ("Category",), rows, [_column(c, spec) for c in metrics], cells
        )
        table.missing += missing_values(table)
        tables.append(table)
    check_table(pool.used, varies(spec, sweep), f"the tables of sweep {spec.sweep}")
    for table in tables:
        used = _records_of(table, records)
        table.caption = describe_runs(used)
        table.warnings = shouts(used)
        table.notes += [*version_notes(table, used), *chance.notes(table, used), *reference.notes(used)]
    return tables


def _merge(spec: Spec, row: Entry, column: Entry) -> dict[str, str]:
    return {"category": "mean", "variant": "", **spec.where, **column.where, **row.where}


def _column(entry: Entry, spec: Spec) -> Column:
    metric = entry.where.get("metric", spec.where.get("metric", ""))
    digits = names.COSTS[metric][2] if metric in names.COSTS else spec.digits
    return Column(entry.labels[-1], entry.group, metric, digits if entry.digits is None else entry.digits)


def _printed_value(key: Mapping[str, str], printed: Mapping[tuple[str, ...], Printed]) -> Value:
    wanted = tuple(key.get(name, "") for name in KEYS)
    number = printed.get(wanted)
    if number is None:
        return Value(reason="not printed")
    gap = printed.get((*wanted[:-1], f"{wanted[-1]}_gap"))
    note = f"{number.certainty}: {number.note}" if number.note else number.certainty
    return Value(number.value, number.std, gap=None if gap is None else gap.value, note=note, printed=True)


def _query(
    spec: Spec, key: Mapping[str, str], runs: Mapping[str, Any], known: Sequence[str], sweep: bool = False
) -> Query:
    # In a sweep the method may be what varies.
    method = runs.get("method") if sweep else runs.get("method", key.get("method"))
    name = runs.get("sweep", spec.sweep)
    cell = {full_key(short, known, spec.name): value for short, value in (runs.get("cell") or {}).items()}
    return Query(
        metric=key["metric"],
        dataset=runs.get("dataset", key["dataset"]),
        category=key["category"],
        method=method,
        sweep=name,
        cell=cell_key(cell) if name else None,
        variant=runs.get("variant", ""),
        setting=runs.get("setting", spec.setting),
    )


def _of_methods(query: Query) -> Query:
    """The same number from the sweep `methods`, where each method has its own recipe as in its paper."""
    return dataclasses.replace(query, sweep=SWEEP, cell=cell_key({COMPARE: "recipe"}))


def _records_of(table: Table, records: Sequence[StoredRecord]) -> list[StoredRecord]:
    wanted = {name for row in table.cells for cell in row if cell.runs for name in cell.runs.records}
    return [stored for stored in records if stored.name in wanted]
