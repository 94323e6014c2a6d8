"""What stands above and below a table: its conditions, what must be seen first, notes, what a dash stands for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from results.aggregator import chance, names, reference
from results.aggregator.history import FALLING, fall
from results.aggregator.records import SHOUTED, RecordError, StoredRecord, data_options
from results.aggregator.scores import Pool, axis_value, versions
from results.aggregator.spec import Spec
from results.aggregator.table import Row, Table, mark_values
from results.common.methods import METHOD

UNUSED = "unused in the file"
"""A run's note that holds this lists parts of a weights file that the backbone has no use for; its record keeps it."""
NO_RUN = "No run fits this table yet."
DIRTY = "Some runs were made from code with uncommitted changes."


def describe_runs(records: Sequence[StoredRecord]) -> str:
    """What a reader needs to judge numbers from runs: protocol, seeds, backbone, weights, data, versions, commit."""
    if not records:
        return NO_RUN
    seeds = sorted({stored.record.seed for stored in records})
    spread = f"± sample standard deviation over seeds {listed(seeds)} (n = {len(seeds)} unless stated)"
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
    parts += [f"{listed(methods)}: {recipe}." for recipe, methods in recipes.items()]
    for dataset in sorted({d["name"] for stored in records for d in stored.record.datasets}):
        found = sorted(found_categories(records)[dataset])
        known = names.DATASET_CATEGORIES.get(dataset, ())
        part = f"{len(found)} of {len(known)} categories: {listed(found)}" if 0 < len(found) < len(known) else ""
        noun = "category" if len(found) == 1 else "categories"
        prints = sorted(
            {str(d["fingerprint"])[:10] for s in records for d in s.record.datasets if d["name"] == dataset}
        )
        count = f"{len(prints)} fingerprints" if len(prints) > 3 else f"fingerprint {listed(prints)}"
        options = {data_options(d) for s in records for d in s.record.datasets if d["name"] == dataset}
        ways = sorted((text[2:] or "all images" for text in options), key=lambda text: (len(text), text))
        told = f"; trained with {' or '.join(ways)}" if options != {""} else ""
        parts.append(f"Data: {names.dataset_label(dataset)} ({part or f'{len(found)} {noun}'}, {count}{told}).")
    commits = sorted({_commit(stored) for stored in records})
    libraries = " or ".join(sorted({versions(stored) for stored in records}))
    parts.append(
        f"Metrics version {_all(records, lambda r: str(r.metrics['version']))}; {libraries}; commit {listed(commits)}."
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
    groups = "; ".join(f"{version}: {listed(list(titles))}" for version, titles in sorted(rows.items()))
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
        f"{listed(rows)}. Longer trainings may change the order."
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
    ends = {label: [re.sub(r"(?<!\.)\.$", "", note) for note in said] for label, said in quiet.items() if said}
    return [f"{label}: {'; '.join(said)}." for label, said in ends.items()]


def missing_values(table: Table) -> list[str]:
    """The dashes of our runs: one line per reason for columns that are missing in every row, else one per row."""
    names_of = [f"{column.group} {column.label}".strip() for column in table.columns]
    whole: dict[str, list[str]] = {}
    for j, name in enumerate(names_of):
        ours = [value for line in table.cells if (value := line[j].runs) is not None]
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


def finish(table: Table, spec: Spec, pool: Pool) -> None:
    """Marks, list of what is missing, caption."""
    mark_values(table, spec.compare)
    table.missing += missing_values(table)
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
        if used and any(column.metric in names.TIMES for column in table.columns):
            parts.append("Times are of each run's machine and of what else it did.")
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


def found_categories(records: Sequence[StoredRecord]) -> dict[str, tuple[str, ...]]:
    """data set -> the categories that any of the records declares, in the records' order."""
    found: dict[str, dict[str, None]] = {}
    for stored in records:
        for dataset, category in stored.record.category_keys:
            found.setdefault(dataset, {})[category] = None
    return {dataset: tuple(categories) for dataset, categories in found.items()}


def _all(records: Sequence[StoredRecord], get: Any) -> str:
    return " or ".join(sorted({str(get(stored.record)) for stored in records}))


def _weights(record: Any) -> str:
    checksum = record.backbone.get("sha256")
    return str(record.backbone["weights"]) + (f" (sha256 {str(checksum)[:10]})" if checksum else "")


def _commit(stored: StoredRecord) -> str:
    commit = str(stored.record.provenance.get("git_commit") or "unknown")[:10]
    return commit + ("+changes" if stored.record.provenance.get("git_dirty") else "")


def listed(items: Sequence[Any]) -> str:
    """Items with commas."""
    return ", ".join(str(item) for item in items)
