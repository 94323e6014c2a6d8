"""One's own trainings as the report shows them first: settings in a few words, numbers per category, curves, heat maps."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import yaml

from results.aggregator import chance, names
from results.aggregator.captions import DIRTY, shouts
from results.aggregator.history import FALLING, fall
from results.aggregator.records import StoredRecord
from results.aggregator.scores import axis_value, cost
from results.aggregator.sweep_cells import describe_cell
from results.aggregator.table import Cell, Column, Row, Table, Value
from results.common import untrusted

MAIN = (
    "image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "dsc", "iou",
)  # fmt: skip
"""Metrics of a run's first table, those of them that it has; all others stand in a folded one."""
OVERVIEW = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro", "dsc")
DECISIONS = "decisions.csv"
_DECIDED = {
    "normal_images": ("normal images", 0), "threshold": ("threshold", 4), "rate": ("promised rate [%]", 1),
    "good": ("good images", 0), "false_alarms": ("false alarms", 0), "defects": ("defects", 0), "misses": ("misses", 0),
}  # fmt: skip
DIRTY_RUN = "Made from code with uncommitted changes."
_SETTINGS = {"unified": "one model", "per_category": "one model per category"}


@dataclass
class Picture:
    """A picture of the page: data URI (empty: left out), title, text below, natural width in pixels."""

    title: str
    text: str
    source: str = ""
    width: int = 0


@dataclass
class Shown:
    """A run on the page."""

    stored: StoredRecord
    title: str
    settings: str
    warnings: list[str]
    main: Table
    rest: Table | None
    remarks: list[str]
    notes: list[str]
    decisions: list[Table] = field(default_factory=list)
    curve: Picture | None = None
    pictures: list[Picture] = field(default_factory=list)


def own(records: Sequence[StoredRecord]) -> tuple[list[StoredRecord], dict[str, int]]:
    """One's own trainings outside of sweeps, the newest first, and how many runs each sweep has beside them."""
    mine = [stored for stored in records if not stored.reference]
    single = [stored for stored in mine if not stored.record.cell]
    sweeps: dict[str, int] = {}
    for stored in mine:
        if stored.record.cell:
            sweeps[stored.record.sweep] = sweeps.get(stored.record.sweep, 0) + 1
    return sorted(single, key=_started, reverse=True), sweeps


def _started(stored: StoredRecord) -> str:
    return str(stored.record.provenance.get("started") or "")


def show(stored: StoredRecord) -> Shown:
    """A run without its pictures."""
    found = [metric for metric in MAIN if metric in set(stored.columns["metric"])]
    warnings = [text for text in shouts([stored]) if text != DIRTY]
    everything = list(dict.fromkeys(stored.columns["metric"]))
    return Shown(
        stored,
        stored.record.run if stored.record.sweep == "single" else stored.name,
        settings(stored),
        warnings,
        _per_category(stored, found or everything[:8], "run", variants=("",)),
        _per_category(stored, everything, "every-number", tuple(dict.fromkeys(stored.columns["variant"])))
        if set(everything) - set(found) or len(set(stored.columns["variant"])) > 1
        else None,
        _remarks(stored),
        [note for note in stored.record.notes if not any(note in warning for warning in warnings)],
        decisions(stored),
    )


def settings(stored: StoredRecord) -> str:
    """What was trained on what, in one sentence."""
    record, came = stored.record, stored.record.provenance
    data = "; ".join(
        f"{names.dataset_label(d['name'])} ({', '.join(map(str, d['categories']))})" for d in record.datasets
    )
    count = sum(len(d["categories"]) for d in record.datasets)
    model = _SETTINGS[record.setting] + (
        f" for {count} categories" if record.setting == "unified" and count > 1 else ""
    )
    backbone = f"{axis_value(stored, 'backbone').partition('.')[0]} ({record.backbone['weights']} weights)"
    took = cost(stored, "train_seconds") or came.get("wall_seconds")
    epochs = came.get("epochs")
    parts = [
        f"{names.method_label(record.method)}, {model}",
        data,
        f"{axis_value(stored, 'image size')} px",
        backbone,
        f"{record.profile} profile, protocol {record.protocol}, seed {record.seed}",
        ", ".join(
            filter(None, (f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else "", f"{took:.0f} s" if took else ""))
        ),
        f"started {str(came['started'])[:16].replace('T', ' ')}" if came.get("started") else "",
    ]
    if record.cell:
        parts.insert(1, describe_cell(record.cell))
    return " · ".join(filter(None, parts))


def _remarks(stored: StoredRecord) -> list[str]:
    """What a reader should know of the run before using its numbers."""
    remarks = [DIRTY_RUN] if stored.record.provenance.get("git_dirty") else []
    share = fall(stored)
    if share is not None and share > FALLING:
        remarks.append(
            f"The training loss was still falling at the end (by {100 * share:.0f} % over the last tenth of the epochs): "
            "a longer training may do better."
        )
    if near := chance.remark(stored):
        remarks.append(near)
    return remarks


def overview(runs: Sequence[StoredRecord]) -> Table:
    """A row per run: means over categories, per data set."""
    pairs = [
        (stored, dataset) for stored in runs for dataset in dict.fromkeys(d["name"] for d in stored.record.datasets)
    ]
    wanted = [m for m in OVERVIEW if any((("", "mean", d, "", m) in stored.scores) for stored, d in pairs)]
    columns = [Column(names.metric_label(metric), "", metric) for metric in wanted]
    rows, cells = [], []
    for stored, dataset in pairs:
        record = stored.record
        labels = (
            record.run if record.sweep == "single" else stored.name,
            names.method_label(record.method),
            names.dataset_label(dataset),
            f"{axis_value(stored, 'backbone').partition('.')[0]}, {axis_value(stored, 'image size')}",
            str(record.seed),
        )
        rows.append(Row(labels))
        cells.append([_cell(stored, ("", "mean", dataset, "", metric), metric) for metric in wanted])
    return Table(
        "own-runs", "Overview", "runs", ("Run", "Method", "Data", "Backbone, images", "Seed"), rows, columns, cells,
        "Percent, mean over the categories of the data set; nothing is marked, because these runs may differ in data, "
        "backbone or length. make compare A=<run> B=<run> pairs two of them.",
        missing=_missing(rows, columns, cells),
    )  # fmt: skip


def _per_category(stored: StoredRecord, metrics: Sequence[str], name: str, variants: Sequence[str]) -> Table:
    """A row per category, then means and pooled numbers, as recorded; a column per metric."""
    rows, cells = [], []
    columns = [
        Column(names.metric_label(metric), "", metric, 3 if not names.is_percent(metric) else 1) for metric in metrics
    ]
    for variant in variants:
        one = len(stored.record.datasets) == 1  # then "over all data sets" repeats it
        places = dict.fromkeys(key[1:4] for key in stored.scores if key[0] == variant and (key[2] or not one))
        for scope in ("category", "mean", "pooled"):
            for number, place in enumerate(p for p in places if p[0] == scope):
                _, dataset, category = place
                several = len(stored.record.datasets) > 1 and dataset
                label = names.category_label(category) if scope == "category" else scope.capitalize()
                label += f" of {names.dataset_label(dataset)}" if several and scope != "category" else ""
                group = " · ".join(filter(None, (names.dataset_label(dataset) if several else "", variant)))
                rows.append(Row((label,), group, rule=scope != "category" and number == 0))
                cells.append([_cell(stored, (variant, *place, metric), metric) for metric in metrics])
    title = "Per category" if name == "run" else "Every number of the run"
    table = Table(f"{name}-{stored.name}", title, "runs", ("Category",), rows, columns, cells, "Percent.")
    if any(not names.is_percent(metric) for metric in metrics):
        table.caption = "Percent; thresholds are scores of the anomaly map."
    table.missing = _missing(rows, columns, cells)
    return table


def decisions(stored: StoredRecord) -> list[Table]:
    """What thresholds of normal images would have done on the test set: by the run's own rule, then by all others.

    Empty for a record without `decisions.csv` (an earlier version's, or a run that was not tested).
    """
    try:
        text = untrusted.file_inside(stored.path, DECISIONS).read_text(encoding="utf-8", errors="surrogateescape")
        lines = list(csv.DictReader(text.splitlines()))
        asked = (yaml.safe_load(stored.config_text) or {}).get("run") or {}
    except (untrusted.UntrustedError, OSError, csv.Error):
        return []
    own_rule = asked.get("rule") or ("max" if asked.get("alpha") is None else "conformal")
    mine = [line for line in lines if line.get("rule") == own_rule and line.get("level") == "image"]
    others = [line for line in lines if line not in mine]
    tables = []
    if mine:
        tables.append(_decided(stored, f"Decisions, rule {own_rule}", "decisions", mine))
    if others:
        tables.append(_decided(stored, "Decisions by other rules, and of pixels", "other-decisions", others))
    return tables


def _decided(stored: StoredRecord, title: str, name: str, lines: Sequence[dict[str, str]]) -> Table:
    columns = [Column(label, "", "threshold", digits) for label, digits in _DECIDED.values()]
    rows, cells = [], []
    for line in lines:
        group = "" if name == "decisions" else f"{line['rule']}, {line['level']}"
        scope = line["category"].rpartition("/")[2]
        rows.append(Row((names.category_label(scope) if scope else "one threshold for all", line["basis"]), group))
        cells.append([_decided_cell(stored, line, key) for key in _DECIDED])
    caption = (
        "A false alarm is a good test image above the threshold, a miss a defect that is not. The promised rate is of false "
        "alarms on images like the held-out ones."
    )
    if any(line["basis"] == "cross validation" for line in lines):
        caption += " Thresholds of a cross-validation promise no rate: models of the other folds scored the images."
    if any(line["basis"].startswith("training") for line in lines):
        caption += " Thresholds of training images are optimistic: unseen good images score higher."
    return Table(f"{name}-{stored.name}", title, "runs", ("Category", "Thresholds from"), rows, columns, cells, caption)


def _decided_cell(stored: StoredRecord, line: dict[str, str], key: str) -> Cell:
    try:
        value = float(line[key])
    except (KeyError, ValueError):
        value = math.nan
    if key == "rate":
        value *= 100 if line.get("basis") == "held-out" else math.nan
    reason = "no rate is promised" if key == "rate" else "not recorded"
    known = Value(reason=reason) if math.isnan(value) else Value(value, n=1)
    return Cell(runs=replace(known, records=(stored.name,)))


def _cell(stored: StoredRecord, key: tuple[str, str, str, str, str], metric: str) -> Cell:
    value, reason = stored.scores.get(key, (math.nan, "not recorded"))
    if math.isnan(value):
        return Cell(runs=Value(reason=reason, records=(stored.name,)))
    return Cell(runs=Value(value * (100 if names.is_percent(metric) else 1), n=1, records=(stored.name,)))


def _missing(rows: Sequence[Row], columns: Sequence[Column], cells: Sequence[Sequence[Cell]]) -> list[str]:
    """Why dashes stand in a table, once per row and reason; what is not recorded of means and pooled numbers needs none."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row, line in zip(rows, cells, strict=True):
        for column, cell in zip(columns, line, strict=True):
            if cell.main.mean is None and cell.main.reason != "not recorded":
                title = " / ".join(filter(None, (row.group, *row.labels)))
                lines.setdefault((title, cell.main.reason), []).append(column.label)
    return [f"{title}: {', '.join(labels)}: {reason}" for (title, reason), labels in lines.items()]
