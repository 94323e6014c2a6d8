"""Build tables: the papers' from what was printed or from our runs, and a sweep's from its cells."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from results.aggregator import chance, methods_table, names, reference
from results.aggregator.history import FALLING, fall
from results.aggregator.other_data import on_data
from results.aggregator.published import KEYS, Printed, read_published
from results.aggregator.records import SHOUTED, RecordError, StoredRecord, data_options
from results.aggregator.scores import Pool, Query, axis_value, check_table, versions
from results.aggregator.spec import Entry, Spec, SpecError, spec_for_sweep
from results.aggregator.sweep_cells import SEED_KEYS, SweepCells, canonical, cell_key, describe_cell, show_value
from results.aggregator.table import Cell, Column, Row, Table, Value, add_gaps, mark_values
from results.common.did_you_mean import did_you_mean
from results.common.methods import COMPARE, METHOD, SWEEP

SOURCES = ("published", "runs", "both")
OWN_PAPERS = "own_papers"
"""Source of the published numbers that a method's own paper prints."""
UNUSED = "unused in the file"
"""A run's note that holds this lists parts of a weights file that the backbone has no use for; its record keeps it."""
NO_RUN = "No run fits this table yet."
DIRTY = "Some runs were made from code with uncommitted changes."
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
    if spec.rows is None:
        raise SpecError(f"{spec.name} is the table of sweep {spec.sweep}, not of a paper; use `sweep {spec.sweep}`")
    if source != "runs" and "source" not in spec.where:
        raise SpecError(f"{spec.name} has no printed counterpart; use --source runs")
    printed = read_published() if published is None else published
    pool = Pool(records, rms_std)
    if dataset is not None:
        spec = on_data(spec, dataset, records, printed=source == "both")
        pool.categories = _found_categories(records)
    keys = _known_keys([stored for stored in records if stored.record.sweep == spec.sweep], None)
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
    _finish(table, spec, pool)
    if source != "published" and not table.has_runs:
        table.caption = table.caption.replace(NO_RUN, f"{NO_RUN} {_why_none(spec, table, records)}")
    if source == "both" and spec.own_papers is not None:
        _add_own_papers(table, spec, printed)
    return table


def _why_none(spec: Spec, table: Table, records: Sequence[StoredRecord]) -> str:
    """What the table asks of a run, and what there is instead."""
    keys = [cell.key for line in table.cells for cell in line if cell.runs is not None]
    wanted = {
        name: list(dict.fromkeys(filter(None, (key.get(name) for key in keys)))) for name in ("method", "dataset")
    }
    setting = {"unified": ", one model for all categories", "per_category": ", one model per category"}.get(
        spec.setting, ""
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


def _add_own_papers(table: Table, spec: Spec, printed: Mapping[tuple[str, ...], Printed]) -> None:
    """Beside a column with a number far from its method's own paper, a column of the own papers' numbers; and a footnote."""
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
            wanted = (key.get("dataset"), key.get("category"), key.get("method"), setting, key.get("metric"))
            paper, number = own.get(wanted, ("", None))
            shown = Value(reason="its own paper's number is not known here")
            if number is not None:
                shown = Value(number.value, note=f"{paper}; {number.certainty}: {number.note}", printed=True)
                gap = None if value is None or value.mean is None else value.mean - number.value
                if gap is not None and abs(gap) >= spec.own_papers:
                    name = f"{names.method_label(key['method'])}, {names.metric_label(key['metric'])}"
                    far.append(f"{name}: {value.mean:g} here, {number.value:g} in {paper} ({number.note})")
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
    pool = Pool(records, rms_std, categories=_found_categories(records))
    keys = _known_keys(records, sweep)
    entries, headers, strays = _sweep_rows(spec, records, sweep, keys)
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
        _add_controls(table, spec, pool, controls)
    table.missing += _missing_seeds(entries, pool, spec, keys)
    if strays:
        listed = ", ".join(strays[:5]) + (f" and {len(strays) - 5} more" if len(strays) > 5 else "")
        table.notes.append(f"Runs of cells that are not in the sweep file, left out: {listed}.")
    _finish(table, spec, pool)
    add_gaps(table)
    return table


def category_tables(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None = None, rms_std: bool = False
) -> list[Table]:
    """One table per cell of a sweep: a row per category and the mean, a column per metric."""
    pool = Pool(records, rms_std, categories=_found_categories(records))
    keys = _known_keys(records, sweep)
    entries, headers, _ = _sweep_rows(spec, records, sweep, keys)
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
        table.missing += _missing_values(table)
        tables.append(table)
    check_table(pool.used, varies(spec, sweep), f"the tables of sweep {spec.sweep}")
    for table in tables:
        used = _records_of(table, records)
        table.caption = describe_runs(used)
        table.warnings = shouts(used)
        table.notes += [*version_notes(table, used), *chance.notes(table, used), *reference.notes(used)]
    return tables


def describe_runs(records: Sequence[StoredRecord]) -> str:
    """What a reader needs to judge numbers from runs: protocol, seeds, backbone, weights, data, versions, commit."""
    if not records:
        return NO_RUN
    seeds = sorted({stored.record.seed for stored in records})
    spread = f"± sample standard deviation over seeds {_list(seeds)} (n = {len(seeds)} unless stated)"
    if len(seeds) == 1:
        spread = f"one seed ({seeds[0]}), so no spread"
    parts = [f"Percent, mean over categories, {spread}."]
    settings = {"unified": "one model for all categories", "per_category": "one model per category"}
    parts.append(
        f"Protocol {_all(records, lambda r: r.protocol)}, profile {_all(records, lambda r: r.profile)}, "
        f"{_all(records, lambda r: settings[r.setting])}."
    )
    recipes: dict[str, list[str]] = {}  # methods that share theirs are named together
    for method in sorted({stored.record.method for stored in records}):
        mine = [stored for stored in records if stored.record.method == method]
        weights = _all(mine, lambda r: "RANDOM weights" if r.random_weights else f"weights {_weights(r)}")
        backbone = _all(mine, lambda r: r.backbone["name"])
        size = " or ".join(sorted({axis_value(stored, "image size") for stored in mine}))
        recipe = f"backbone {backbone}, {weights}, images {size} ({_all(mine, lambda r: r.resize)})"
        recipes.setdefault(recipe, []).append(names.method_label(method))
    parts += [f"{_list(methods)}: {recipe}." for recipe, methods in recipes.items()]
    for dataset in sorted({d["name"] for stored in records for d in stored.record.datasets}):
        found = sorted(_found_categories(records)[dataset])
        known = names.DATASET_CATEGORIES.get(dataset, ())
        part = f"{len(found)} of {len(known)} categories: {_list(found)}" if 0 < len(found) < len(known) else ""
        noun = "category" if len(found) == 1 else "categories"
        prints = sorted(
            {str(d["fingerprint"])[:10] for s in records for d in s.record.datasets if d["name"] == dataset}
        )
        count = f"{len(prints)} fingerprints" if len(prints) > 3 else f"fingerprint {_list(prints)}"
        options = {data_options(d) for s in records for d in s.record.datasets if d["name"] == dataset}
        ways = sorted((text[2:] or "all images" for text in options), key=lambda text: (len(text), text))
        told = f"; trained with {' or '.join(ways)}" if options != {""} else ""
        parts.append(f"Data: {names.dataset_label(dataset)} ({part or f'{len(found)} {noun}'}, {count}{told}).")
    commits = sorted({_commit(stored) for stored in records})
    libraries = " or ".join(sorted({versions(stored) for stored in records}))
    parts.append(
        f"Metrics version {_all(records, lambda r: str(r.metrics['version']))}; {libraries}; commit {_list(commits)}."
    )
    return " ".join(parts)


def shouts(records: Iterable[StoredRecord]) -> list[str]:
    """What must be seen before the numbers: random weights, the released code's protocol, notes in capitals, dirty code."""
    records = list(records)
    found = []
    if any(stored.record.random_weights for stored in records):
        found.append("RANDOM BACKBONE WEIGHTS: the numbers show that the pipeline runs, not how good a method is.")
    if any(stored.record.protocol == "as_released" for stored in records):
        found.append("PROTOCOL as_released: these numbers follow the released code, test-set choices included.")
    found += [f"{note}." for note in _run_notes(records) if SHOUTED.match(note)]
    if any(stored.record.provenance.get("git_dirty") for stored in records):
        found.append(DIRTY)
    return found


def version_notes(table: Table, records: Iterable[StoredRecord]) -> list[str]:
    """One note that says which rows were made with which versions; empty if all runs of the table agree."""
    of_run = {stored.name: versions(stored) for stored in records}
    rows: dict[str, dict[str, None]] = {}
    for row, line in zip(table.rows, table.cells, strict=True):
        for cell in line:
            for name in cell.runs.records if cell.runs else ():
                if name in of_run:
                    rows.setdefault(of_run[name], {})[_row_title(row)] = None
    if len(rows) < 2:
        return []
    groups = "; ".join(f"{version}: {_list(list(titles))}" for version, titles in sorted(rows.items()))
    return [f"The rows were run with different library versions. {groups}."]


def falling_notes(table: Table, records: Iterable[StoredRecord]) -> list[str]:
    """One note that names the rows whose training loss was still falling at the end; empty if there is none."""
    falling = set()
    for stored in records:
        try:
            share = fall(stored)
        except RecordError:  # a damaged history; the curves say so
            continue
        if share is not None and share > FALLING:
            falling.add(stored.name)
    rows = [
        _row_title(row)
        for row, line in zip(table.rows, table.cells, strict=True)
        if any(cell.runs and falling & set(cell.runs.records) for cell in line)
    ]
    if not rows:
        return []
    return [
        f"Still falling when training ended (the loss, by more than {100 * FALLING:.0f} % over the last tenth of the epochs): "
        f"{_list(rows)}. Longer trainings may change the order."
    ]


def _run_notes(records: Iterable[StoredRecord]) -> list[str]:
    """What the runs themselves had to say, once each."""
    said = dict.fromkeys(note for stored in records for note in stored.record.notes)
    return [note for note in said if UNUSED not in note]


def _notes_by_method(records: Sequence[StoredRecord]) -> list[str]:
    """The runs' notes, after their method's name where the runs are of several; without those that are shouted."""
    labels = {
        stored.name: names.method_label(str(stored.record.cell.get(METHOD) or stored.record.method))
        for stored in records
    }
    quiet = {
        label: [note for note in _run_notes(s for s in records if labels[s.name] == label) if not SHOUTED.match(note)]
        for label in dict.fromkeys(labels.values())
    }
    if len(quiet) < 2:
        return list(itertools.chain.from_iterable(quiet.values()))
    return [f"{label}: {'; '.join(said)}." for label, said in quiet.items() if said]


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
    cell = {_full_key(short, known, spec.name): value for short, value in (runs.get("cell") or {}).items()}
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


def _full_key(short: str, known: Sequence[str], where: str) -> str:
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


def _known_keys(records: Sequence[StoredRecord], sweep: SweepCells | None) -> list[str]:
    keys = dict.fromkeys(key for key in (sweep.values if sweep else ()) if key not in SEED_KEYS)
    for stored in records:
        keys.update(dict.fromkeys(key for key in stored.record.cell if key not in SEED_KEYS))
    return list(keys)


def _found_categories(records: Sequence[StoredRecord]) -> dict[str, tuple[str, ...]]:
    """data set -> the categories that any of the records declares, in the records' order."""
    found: dict[str, dict[str, None]] = {}
    for stored in records:
        for dataset, category in stored.record.category_keys:
            found.setdefault(dataset, {})[category] = None
    return {dataset: tuple(categories) for dataset, categories in found.items()}


def _sweep_rows(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None, known: Sequence[str]
) -> tuple[list[Entry], tuple[str, ...], list[str]]:
    """The rows of a sweep's table, their headers, and the runs that no row stands for."""
    if spec.kind == "methods":
        return methods_table.rows(spec, records, sweep), methods_table.HEADERS, []
    if spec.rows is not None:
        return list(spec.rows), spec.row_headers, []
    chosen = [_full_key(key, known, spec.name) for key in spec.parameters] if known else []
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
    labels = {_full_key(key, known, spec.name): entry for key, entry in spec.parameters.items()} if known else {}
    default = (
        {_full_key(key, known, spec.name): canonical(value) for key, value in spec.default.items()} if known else {}
    )
    entries = []
    for cell in cells:
        texts = tuple(_value_label(labels.get(key, {}).get("values", {}), value, key) for key, value in cell.items())
        is_default = bool(default) and all(
            canonical(cell.get(key)) == value for key, value in default.items() if key in cell
        )
        entries.append(Entry(texts or ("all",), default=is_default, runs={"cell": cell}))
    headers = tuple(labels.get(key, {}).get("label", key.rsplit(".", 1)[-1].replace("_", " ")) for key in order)
    return entries, headers or ("",), strays


def _value_label(labels: Mapping[Any, str], value: Any, key: str = "") -> str:
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


def _add_controls(table: Table, spec: Spec, pool: Pool, controls: Sequence[StoredRecord]) -> None:
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
            label = _value_label(known[key].get("values", {}), value)
            parts.append(f"{str(known[key].get('label', key)).lower()} {label}")
    return ", ".join(parts) or describe_cell(stored.record.cell)


def _features(stored: StoredRecord) -> tuple[Any, ...]:
    """What a control must share with a row that it stands below: data, conditions, and the backbone that gives features."""
    record = stored.record
    data = tuple(sorted((d["name"], str(d["fingerprint"]), data_options(d)) for d in record.datasets))
    backbone = (record.backbone["name"], str(record.backbone["weights"]), str(record.backbone.get("sha256")))
    conditions = (record.profile, record.protocol, record.setting, str(record.metrics["version"]))
    return data, conditions, record.image_size, record.resize, backbone


def varies(spec: Spec, sweep: SweepCells | None) -> set[str]:
    """Axes on which the records of a sweep differ on purpose."""
    keys = list(sweep.varying) if sweep else []
    for entry in (*(spec.rows or ()), *spec.columns):
        keys += [str(key) for key in entry.runs.get("cell") or {}]
    keys += list(spec.parameters)
    return {axis for key in keys for part, axes in _SWEPT_AXES if part in f".{key}" for axis in axes}


def _missing_seeds(entries: Sequence[Entry], pool: Pool, spec: Spec, known: Sequence[str]) -> list[str]:
    """Cells that lack a seed which other cells have."""
    seeds = {stored.record.seed for stored in pool.records}
    lines = []
    for entry in entries:
        cell = {_full_key(key, known, spec.name): value for key, value in (entry.runs.get("cell") or {}).items()}
        have = {stored.record.seed for stored in pool.of_cell(spec.sweep, cell_key(cell))} if cell else set()
        if have and have != seeds:
            lost, there = _list(sorted(seeds - have)), _list(sorted(have))
            lines.append(f"{describe_cell(cell)}: seed {lost} is missing (there: {there})")
    return lines


def _missing_values(table: Table) -> list[str]:
    """The dashes of our runs: one line per reason for columns that are missing in every row, else one per row."""
    names_of = [f"{column.group} {column.label}".strip() for column in table.columns]
    whole: dict[str, list[str]] = {}
    for j, name in enumerate(names_of):
        ours = [line[j].runs for line in table.cells if line[j].runs is not None]
        reasons = {value.reason if value.mean is None else "" for value in ours}
        if len(ours) > 1 and len(reasons) == 1 and reasons != {""}:
            whole.setdefault(reasons.pop(), []).append(name)
    lines = [f"{', '.join(columns)}: {reason}" for reason, columns in whole.items()]
    told = {name for columns in whole.values() for name in columns}
    never = []  # rows without any run, told in one line
    for row, line in zip(table.rows, table.cells, strict=True):
        reasons_of: dict[str, list[str]] = {}
        for name, cell in zip(names_of, line, strict=True):
            if cell.runs is not None and cell.runs.mean is None and name not in told:
                reasons_of.setdefault(cell.runs.reason, []).append(name)
        title = _row_title(row)
        for reason, columns in reasons_of.items():
            everything = len(columns) == len(names_of) and len(columns) > 1
            if everything and reason == "no run":
                never.append(title)
            else:
                lines.append(
                    f"{title}: {'all columns' if everything else ', '.join(_by_group(table, columns))}: {reason}"
                )
    return [*lines, f"no run of {'; '.join(never)}"] if never else lines


def _by_group(table: Table, columns: Sequence[str]) -> list[str]:
    """Names of columns, with `all of GROUP` in place of a whole group's."""
    left = list(columns)
    for group in dict.fromkeys(column.group for column in table.columns if column.group):
        whole = [f"{group} {column.label}".strip() for column in table.columns if column.group == group]
        if len(whole) > 1 and set(whole) <= set(left):
            left = [f"all of {group}" if name == whole[0] else name for name in left if name not in whole[1:]]
    return left


def _row_title(row: Row) -> str:
    return " / ".join(part for part in (row.group, *row.labels) if part)


def _finish(table: Table, spec: Spec, pool: Pool) -> None:
    """Marks, list of what is missing, caption."""
    mark_values(table, spec.compare)
    table.missing += _missing_values(table)
    used = list({stored.name: stored for _, stored in pool.used}.values())
    parts = []
    if table.source != "runs":
        parts.append(
            f"As printed in {spec.paper or 'the papers'}, percent; best and second best are marked from the printed numbers."
        )
    if any(cell.published and cell.runs for line in table.cells for cell in line):
        parts.append("Each place: printed | our runs (ours minus printed).")
    if table.source != "published":
        parts.append(describe_runs(used))
        table.warnings += shouts(used)
        table.notes += [
            *_notes_by_method(used), *version_notes(table, used), *falling_notes(table, used), *chance.notes(table, used),
            *reference.notes(used),
        ]  # fmt: skip
    if (
        table.source != "published"
        and len({stored.record.seed for stored in used}) > 1
        and compared(table, spec.compare)
    ):
        parts.append("No mark where the distance to the next rank is within the spread of the seeds.")
    if any(row.default for row in table.rows):
        parts.append("In brackets: distance to the default row (★).")
    table.caption = " ".join(parts)


def compared(table: Table, compare: str) -> bool:
    """Whether best and second best are looked for in a table."""
    return compare != "none" and any(column.ranked for column in table.columns)


def _records_of(table: Table, records: Sequence[StoredRecord]) -> list[StoredRecord]:
    wanted = {name for row in table.cells for cell in row if cell.runs for name in cell.runs.records}
    return [stored for stored in records if stored.name in wanted]


def _all(records: Sequence[StoredRecord], get: Any) -> str:
    return " or ".join(sorted({str(get(stored.record)) for stored in records}))


def _weights(record: Any) -> str:
    checksum = record.backbone.get("sha256")
    return str(record.backbone["weights"]) + (f" (sha256 {str(checksum)[:10]})" if checksum else "")


def _commit(stored: StoredRecord) -> str:
    commit = str(stored.record.provenance.get("git_commit") or "unknown")[:10]
    return commit + ("+changes" if stored.record.provenance.get("git_dirty") else "")


def _list(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items)
