"""Table specs: one small YAML file per table under `results/tables/specs/`.

::

    title: what the table shows
    paper: UniAS, supplement, Table 4        # where it is printed; left out for our own tables
    sweep: feature_levels                    # the sweep whose runs fill it; left out: trainings outside of sweeps
    setting: unified                         # which runs count: unified or per_category
    where: {source: unias_supplement, table: "4", dataset: mvtec_ad, method: unias, category: mean}
    row_headers: [Levels]
    rows:                                    # or `rows: sweep`, the sweep's cells in its order (then see `parameters`)
      - {label: "{4}", variant: levels=4, runs: {variant: levels=4}}
      - {label: "{4,3,2,1}", variant: levels=4+3+2+1, runs: {variant: levels=4+3+2+1}, default: true}
    columns: [pixel_ap, dsc, pixel_auroc]
    details: [dsc_precision, dsc_recall]     # more columns of the tables per category alone
    compare: columns                         # rank within columns or within rows, or none
    digits: 2
    parameters:                              # rows: sweep only; labels of the sweep's parameters, in this order
      neighbor_size: {label: Size, values: {1: 1x1, 7: 7x7}}
    default: {neighbor_size: 7}              # rows: sweep only; the cell that gaps refer to
    notes: [what a reader must know]
    own_papers: 5                            # points from which a compared number is far from its method's own paper
    shares: {train/codes_in_use: codes in use}  # kind: curves only; recorded shares drawn beside the AUROCs, in percent
    x: shots                                 # kind: lines only; the parameter (of `parameters`) on the figure's axis

A row or column is a metric's name or a mapping. Its selectors (source, table, dataset, category, method, variant,
metric, setting) say what stands there; a list of values makes one row or column each, and two lists every combination,
the first one becoming the group. `runs:` holds what differs for our runs: variant, cell, sweep, method, setting;
`runs: false` says that no run of ours corresponds to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from results.aggregator import names
from results.common.did_you_mean import did_you_mean

FOLDER = Path(__file__).parents[1] / "tables" / "specs"
SELECTORS = ("source", "table", "dataset", "category", "method", "variant", "metric", "setting")
_RUNS = ("variant", "cell", "sweep", "method", "setting", "dataset")
_TOP = (
    "title", "paper", "kind", "sweep", "setting", "where", "row_headers", "rows", "columns", "compare", "digits",
    "details", "parameters", "default", "notes", "shares", "own_papers", "x",
)  # fmt: skip
_ROW = ("label", "labels", "group", "rule", "default", "runs", *SELECTORS)
_COLUMN = ("label", "group", "digits", "runs", *SELECTORS)
KINDS = ("grid", "curves", "methods", "lines")
COMPARES = ("columns", "rows", "none")


class SpecError(ValueError):
    """A table spec that cannot be understood; the message names the file, the key and what is allowed."""


@dataclass(frozen=True)
class Entry:
    """A row or a column: its labels and group, what selects its values, and what differs for our runs."""

    labels: tuple[str, ...]
    group: str = ""
    rule: bool = False
    default: bool = False
    digits: int | None = None
    apart: bool = False  # told more than the other rows: neither ranked nor marked
    where: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A table spec as read; `rows` is None for the sweep's cells."""

    name: str
    title: str
    paper: str = ""
    kind: str = "grid"
    sweep: str | None = None
    setting: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    row_headers: tuple[str, ...] = ()
    rows: tuple[Entry, ...] | None = None
    columns: tuple[Entry, ...] = ()
    details: tuple[Entry, ...] = ()
    compare: str = "columns"
    digits: int = 1
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shares: Mapping[str, str] = field(default_factory=dict)
    own_papers: float | None = None
    x: str = ""


def spec_names(folder: str | Path = FOLDER) -> list[str]:
    """Names of all specs, in a reader's order: unias_2 before unias_10."""
    stems = [path.stem for path in Path(folder).glob("*.yaml")]
    return sorted(stems, key=_split)


def _split(stem: str) -> tuple[str, int]:
    head, _, tail = stem.rpartition("_")
    return (head, int(tail)) if head and tail.isdigit() else (stem, 0)


def find_spec(name: str, folder: str | Path = FOLDER) -> Spec:
    """Read the spec of a table; SpecError with the nearest names if there is none."""
    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        raise SpecError(f"there is no table {name!r}. {did_you_mean(name, spec_names(folder))}")
    return read_spec(path)


def spec_for_sweep(sweep: str, folder: str | Path = FOLDER) -> Spec:
    """The spec of a sweep's table: the one of its name, else the first with `sweep: <name>`, else a plain one."""
    if (Path(folder) / f"{sweep}.yaml").is_file():
        return find_spec(sweep, folder)
    for name in spec_names(folder):
        spec = find_spec(name, folder)
        if spec.sweep == sweep:
            return spec
    columns = tuple(Entry((names.metric_label(m),), where={"metric": m}) for m in ("image_auroc", "pixel_auroc"))
    return Spec(sweep, sweep.replace("_", " "), sweep=sweep, columns=columns)


def read_spec(path: str | Path) -> Spec:
    """Read one spec file; SpecError names what is wrong with it."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise SpecError(f"{path} must be a mapping with title, rows and columns")
    _check_keys(content, _TOP, str(path))
    for key in ("title", "columns"):
        if key not in content and not (key == "columns" and content.get("kind") == "curves"):
            raise SpecError(f"{path} has no {key}")
    kind, compare = content.get("kind", "grid"), content.get("compare", "columns")
    for key, value, allowed in (("kind", kind, KINDS), ("compare", compare, COMPARES)):
        if value not in allowed:
            raise SpecError(f"{path}: {key} is {value!r}; allowed: {', '.join(allowed)}")
    if (kind == "lines") != (content.get("x") in (content.get("parameters") or {})):
        raise SpecError(f"{path}: kind lines needs x, one of its parameters, and no other kind has one")
    where = {key: str(value) for key, value in (content.get("where") or {}).items()}
    _check_keys(where, SELECTORS, f"{path}: where")
    rows = content.get("rows", "sweep")
    if rows == "sweep" and not content.get("sweep"):
        raise SpecError(f"{path}: without `sweep`, rows must be listed")
    entries = None if rows == "sweep" else _entries(rows, _ROW, f"{path}: rows", "category")
    headers = tuple(str(header) for header in content.get("row_headers", ()))
    if entries is not None and not headers:
        headers = ("",) * max(len(entry.labels) for entry in entries)
    if entries is not None:
        for entry in entries:
            if len(entry.labels) != len(headers):
                raise SpecError(f"{path}: row {entry.labels} has {len(entry.labels)} labels for {len(headers)} headers")
    return Spec(
        name=path.stem,
        title=" ".join(str(content["title"]).split()),
        paper=str(content.get("paper", "")),
        kind=kind,
        sweep=content.get("sweep"),
        setting=content.get("setting"),
        where=where,
        row_headers=headers,
        rows=entries,
        columns=_entries(content.get("columns", []), _COLUMN, f"{path}: columns", "metric"),
        details=_entries(content.get("details", []), _COLUMN, f"{path}: details", "metric"),
        compare=compare,
        digits=int(content.get("digits", 1)),
        parameters=content.get("parameters") or {},
        default=content.get("default") or {},
        notes=tuple(content.get("notes", ())),
        shares=content.get("shares") or {},
        own_papers=float(content["own_papers"]) if "own_papers" in content else None,
        x=str(content.get("x", "")),
    )


def _entries(raw: Any, allowed: Sequence[str], where: str, axis: str) -> tuple[Entry, ...]:
    """Expand the rows or columns of a spec; a bare string selects on `axis`."""
    if isinstance(raw, Mapping):
        raw = [raw]
    entries: list[Entry] = []
    for item in raw:
        if not isinstance(item, Mapping):
            item = {axis: str(item)}
        _check_keys(item, allowed, where)
        if any(isinstance(label, bool) for label in (item.get("label"), *item.get("labels", ()))):
            raise SpecError(f"{where}: {item.get('labels', item.get('label'))}: on, off, yes and no need quotes")
        if item.get("runs") is not False:
            _check_keys(item.get("runs") or {}, _RUNS, f"{where}: runs")
        entries += _expand(item)
    return tuple(entries)


def _expand(item: Mapping[str, Any]) -> list[Entry]:
    lists = {key: value for key, value in item.items() if key in SELECTORS and isinstance(value, list)}
    fixed = {key: str(value) for key, value in item.items() if key in SELECTORS and key not in lists}
    entries = []
    for combination in itertools.product(*lists.values()):
        chosen = dict(zip(lists, map(str, combination), strict=True))
        shown = [names.label(axis, value) for axis, value in chosen.items()]
        if "labels" in item:
            labels = tuple(str(part) for part in item["labels"])
        elif "label" in item:
            labels = (str(item["label"]),)
        elif shown:
            labels = (shown.pop(),)
        else:
            axis = "metric" if "metric" in fixed else next(iter(fixed), "")
            labels = (names.label(axis, fixed[axis]),)
        group = str(item["group"]) if "group" in item else " ".join(shown)
        where = fixed | chosen
        runs = {"absent": True} if item.get("runs") is False else dict(item.get("runs") or {})
        if "setting" in where:  # the papers' word for it is part of the printed variant
            setting = where.pop("setting")
            where.setdefault("variant", f"setting={setting}")
            runs.setdefault("setting", {"separate": "per_category"}.get(setting, setting))
        entries.append(
            Entry(
                labels,
                group,
                bool(item.get("rule")),
                bool(item.get("default")),
                item.get("digits"),
                where=where,
                runs=runs,
            )
        )
    return entries


def _check_keys(mapping: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise SpecError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), allowed)}")
