"""From run records to one number: which records answer a query, whether they may meet, and their mean over seeds."""

from __future__ import annotations

import fnmatch
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from results.aggregator.names import CONTROLS, COSTS, DATASET_CATEGORIES, PARTIAL_MEANS, dataset_label, is_percent
from results.aggregator.records import StoredRecord, data_options
from results.aggregator.sweep_cells import canonical, describe_cell
from results.aggregator.table import Value
from results.common.deciding import LIBRARIES as LIBRARIES_OF_METHODS
from results.common.deciding import SEEDS, deciding
from results.common.methods import COMPARE
from results.common.pair import plain

#: What must agree in a whole table, and what must agree among the records of one method (its recipe).
TABLE_AXES = ("protocol", "profile", "metric version", "random weights", "data")
METHOD_AXES = ("backbone", "weights", "image size", "resize", "setting")
AXES = (*TABLE_AXES, *METHOD_AXES)

LIBRARIES = ("torch", "timm")
"""Libraries whose versions are shown with every table: they may change a number in its last digits."""

#: A query's category that begins so, `of 4`, is the mean over the categories of those records that have four of them: what
#: runs on more categories reach on the same ones.
OF = "of "

_SEED_LINE = re.compile(r"^\s*(seed_everything|seed):")


class ConflictError(ValueError):
    """Records that must not stand in one table; the message names them, grouped by the value that differs."""

    def __init__(self, conflicts: Sequence[tuple[str, Mapping[str, Sequence[str]]]], where: str = "") -> None:
        self.conflicts = tuple(conflicts)
        lines = [f"these records do not belong in one table{f' in {where}' if where else ''}:"]
        for axis, groups in conflicts:
            lines.append(f"  {axis} differs:")
            for value, names in sorted(groups.items()):
                shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                lines.append(f"    {value}: {shown}")
        choices = (
            f"--{axis}={max(groups)}"
            for axis, groups in conflicts
            if axis in ("profile", "protocol", "compare", "setting")
        )
        lines.append(
            "choose with --profile, --protocol, --compare, --setting, "
            "--newest (of several runs of one cell) or --runs 'sweep/run*' (make: "
            f"ARGS={next(choices, '--newest')}), or move the runs of one kind away"
        )
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Query:
    """What one cell of a table asks for. None means "any"; `cell` None asks for trainings outside of sweeps."""

    metric: str
    dataset: str | None
    category: str = "mean"
    method: str | None = None
    sweep: str | None = None
    cell: frozenset | None = None  # as made by cell_key: what the cell must contain; empty accepts every cell
    variant: str = ""
    setting: str | None = None


@dataclass
class Pool:
    """The records that a table may use, and what its cells did use (for the check that they may meet)."""

    records: Sequence[StoredRecord]
    rms_std: bool = False
    used: list[tuple[Query, StoredRecord]] = field(default_factory=list)
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _index: dict[tuple, set[int]] = field(default_factory=dict)
    _checked: set[tuple] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Index the records by sweep and by each item of their cells."""
        index: dict[tuple, set[int]] = defaultdict(set)
        for number, stored in enumerate(self.records):
            index[(stored.record.sweep,)].add(number)
            if not stored.cell:
                index[(None,)].add(number)
            for item in stored.cell:
                index[(stored.record.sweep, item)].add(number)
        self._index = dict(index)

    def of_cell(self, sweep: str | None, cell: frozenset | None) -> list[StoredRecord]:
        """The sweep's records whose cell contains `cell`; without a sweep the trainings that belong to none."""
        found = [self._index.get((sweep,), set())]
        found += [self._index.get((sweep, item), set()) for item in (cell or ()) if sweep is not None]
        return [self.records[number] for number in sorted(set.intersection(*found))]

    def find(self, query: Query) -> list[StoredRecord]:
        """The records that answer a query, one or more per seed."""
        return [
            stored
            for stored in self.of_cell(query.sweep, query.cell)
            if (query.method is None or query.method in stored.methods)
            and (query.setting is None or stored.record.setting == query.setting)
            and any(query.dataset in (None, dataset["name"]) for dataset in stored.record.datasets)
        ]

    def value(self, query: Query) -> Value:
        """Mean over seeds of a query, or a value without mean that says why; never a mean over fewer categories."""
        found = self.find(query)
        if not found:
            others = sorted({stored.record.setting for stored in self.find(replace(query, setting=None))})
            told = f" with setting {query.setting} ({', '.join(others)} is there)" if others else ""
            if not others:
                of_others = self.find(replace(query, dataset=None, setting=None))
                data = sorted({dataset_label(d["name"]) for stored in of_others for d in stored.record.datasets})
                if data and query.dataset is not None:
                    told = f" on {dataset_label(query.dataset)}, only on {' and '.join(data)}"
            return Value(reason=f"no run{told}")
        key = (query.dataset, tuple(stored.name for stored in found))
        if key not in self._checked:
            check_cell(found, query)
            self._checked.add(key)
        self.used += [(query, stored) for stored in found]
        if query.metric in COSTS:
            return _cost(found, query.metric)
        if not is_percent(query.metric) and query.category.startswith(("mean", OF)):
            return Value(reason="a score's scale differs between categories, so it has no mean")
        by_seed: dict[int, list[StoredRecord]] = defaultdict(list)
        for stored in found:
            by_seed[stored.record.seed].append(stored)
        names = tuple(sorted(stored.name for stored in found))
        needed = self.needed(query)
        known = {plain(d["name"], c) for stored in found for d in stored.record.datasets for c in d["categories"]}
        if query.category.startswith(OF) and (lacking := set(needed) - known):
            return Value(reason=f"knows {len(needed) - len(lacking)} of these {len(needed)} categories", records=names)
        table: list[list[float]] = []  # seed x category
        problems: dict[str, None] = {}
        for seed in sorted(by_seed):
            values, reasons = _seed_values(by_seed[seed], query, needed, seed)
            problems.update(dict.fromkeys(reasons))
            table.append(values)
        if problems:
            return Value(reason="; ".join(problems), records=names, n=len(by_seed))
        marked = any(stored.reference for stored in found)
        scale = 100 if is_percent(query.metric) else 1
        means = [statistics.fmean(values) * scale for values in table]
        std = None
        if len(means) > 1:
            std = statistics.stdev(means)
            if self.rms_std and len(needed) > 1:
                columns = [statistics.variance(column) for column in zip(*table, strict=True)]
                std = math.sqrt(statistics.fmean(columns)) * scale
        return Value(statistics.fmean(means), std, len(means), records=names, reference=marked)

    def needed(self, query: Query) -> tuple[str, ...]:
        """The categories whose mean answers a query."""
        if query.category.startswith(OF):
            return self._of_so_many(query)
        dataset = query.dataset or ""
        partial = PARTIAL_MEANS.get((dataset, query.category))
        if query.category != "mean" and partial is None:
            return (query.category,)
        return partial or self.categories.get(dataset) or DATASET_CATEGORIES.get(dataset) or ()

    def _of_so_many(self, query: Query) -> tuple[str, ...]:
        """The categories of the records that have exactly so many of the data set; () if they are not all the same."""
        count = int(query.category.removeprefix(OF))
        found = {
            tuple(sorted(plain(dataset["name"], name) for name in dataset["categories"]))
            for stored in self.records
            for dataset in stored.record.datasets
            if dataset["name"] == query.dataset and len(dataset["categories"]) == count
        }
        return found.pop() if len(found) == 1 else ()


def seed_means(records: Iterable[StoredRecord], query: Query) -> dict[int, dict[str, float]]:
    """seed -> category -> value (fraction) of the records, undefined values left out."""
    result: dict[int, dict[str, float]] = defaultdict(dict)
    for stored in records:
        for (variant, scope, dataset, category, metric), (value, _) in stored.scores.items():
            wanted = (variant, scope, dataset, metric) == (query.variant, "category", query.dataset, query.metric)
            if wanted and not math.isnan(value):
                result[stored.record.seed][category] = value
    return dict(result)


def _seed_values(records: list[StoredRecord], query: Query, needed: Sequence[str], seed: int) -> tuple[list, list]:
    """One seed's values for the needed categories, from one record or from one per category; and what is missing."""
    values, reasons = [], []
    for category in needed:
        keys = [(query.variant, "category", query.dataset, category, query.metric)]
        if category == "pooled":  # over the data set; over all that were trained together only if that is all there is
            keys = [(query.variant, "pooled", dataset, "", query.metric) for dataset in (query.dataset, "")]
        key = next((key for key in keys if any(key in stored.scores for stored in records)), keys[0])
        hits = [(stored, stored.scores[key]) for stored in records if key in stored.scores]
        if len(hits) > 1:
            raise ConflictError(
                [(f"the run of seed {seed}", {stored.name: [stored.name] for stored, _ in hits})], "one cell"
            )
        where = records[0].name if len(records) == 1 else f"seed {seed} of {records[0].record.sweep}"
        if not hits:
            what = f"variant {query.variant!r} of " * bool(query.variant) + f"{query.metric} of {category}"
            reasons.append(f"{what} is missing in {where}")
        elif math.isnan(hits[0][1][0]):
            reasons.append(f"{query.metric} of {category} is undefined in {where}: {hits[0][1][1]}")
        else:
            values.append(hits[0][1][0])
    if not needed:
        reasons.append(f"no categories known for {query.dataset}")
    return values, reasons


def _cost(records: Sequence[StoredRecord], metric: str) -> Value:
    """Mean over seeds of a cost that the records state."""
    stated = [(stored.name, cost(stored, metric)) for stored in records]
    names = tuple(sorted(name for name, _ in stated))
    values = [value for _, value in stated if value is not None]
    if silent := [name for name, value in stated if value is None]:
        return Value(reason=f"{metric} is not recorded in {', '.join(silent[:3])}", records=names)
    std = statistics.stdev(values) if len(values) > 1 and metric != "parameters" else None
    marked = any(stored.reference for stored in records)
    return Value(statistics.fmean(values), std, len(values), records=names, reference=marked)


def cost(stored: StoredRecord, metric: str) -> float | None:
    """A cost in its printed unit: million parameters, seconds, MiB; None if the record does not state it."""
    provenance = stored.record.provenance
    if metric == "parameters":
        count = stored.record.parameters.get("trainable")
        return None if count is None else count / 1e6
    if metric == "seconds_per_epoch":
        if provenance.get("seconds_per_epoch") is not None:
            return float(provenance["seconds_per_epoch"])
        if provenance.get("wall_seconds") and provenance.get("epochs"):
            return provenance["wall_seconds"] / provenance["epochs"]
        return None
    if metric == "peak_memory":
        peak = provenance.get("peak_memory_bytes")
        return None if peak is None else peak / 2**20
    return provenance.get(metric)


def select(
    records: Iterable[StoredRecord],
    profile: str | None = None,
    protocol: str | None = None,
    runs: Sequence[str] = (),
    compare: str | None = None,
    setting: str | None = None,
) -> list[StoredRecord]:
    """The records of a profile and protocol whose `sweep/run` fits one of the patterns (shell style).

    compare, setting: Of the sweep `methods` only the cells of this experiment, and only records of this setting.
    """
    return [
        stored
        for stored in records
        if (profile is None or stored.record.profile == profile)
        and (protocol is None or stored.record.protocol == protocol)
        and (compare is None or stored.record.cell.get(COMPARE) in (None, compare))
        and (setting is None or stored.record.setting == setting)
        and (not runs or any(fnmatch.fnmatchcase(stored.name, pattern) for pattern in runs))
    ]


def newest(records: Iterable[StoredRecord]) -> list[StoredRecord]:
    """Of the runs of a sweep that differ in nothing but the code that made them only the one started last."""
    last: dict[tuple, StoredRecord] = {}
    for stored in sorted(records, key=lambda stored: str(stored.record.provenance.get("started") or "")):
        record = stored.record
        data = tuple(
            (dataset["name"], str(dataset["fingerprint"]), data_options(dataset)) for dataset in record.datasets
        )
        same = (record.sweep, stored.cell, record.seed, record.profile, record.protocol, record.setting, data)
        last[(*same, axis_value(stored, "weights")) if stored.cell else (stored.name,)] = stored
    return sorted(last.values(), key=lambda stored: stored.name)


def distinct(records: Iterable[StoredRecord]) -> list[StoredRecord]:
    """Of runs that are the same experiment with the same seed, and the same numbers to the last digit, only the first.

    They come from two runners, such as an agent and this machine, and say one thing twice.
    """
    groups: dict[tuple, list[StoredRecord]] = {}
    for stored in sorted(records, key=lambda stored: (str(stored.record.provenance.get("started") or ""), stored.name)):
        record = stored.record
        same = (record.sweep, stored.cell, record.method, record.seed, record.profile, record.protocol, record.setting)
        numbers = stored.files.get("metrics.csv")
        groups.setdefault((*same, data_of(stored), numbers) if stored.cell and numbers else (stored.name,), []).append(
            stored
        )
    kept = []
    for group in groups.values():
        kept += [stored for n, stored in enumerate(group) if n == 0 or _config_conflicts([group[0], stored])]
    return sorted(kept, key=lambda stored: stored.name)


def kinds(records: Sequence[StoredRecord], compared: bool = False) -> list[tuple[str, Sequence[StoredRecord]]]:
    """The records by profile and protocol, which no table mixes; the name is empty if there is only one kind.

    Where reference records or controls are among them, also by data, if one name of a data set stands for several.

    compared: Keep apart the experiments of the sweep `methods` and their settings, too (unified first). Their tables
        have names of their own, so these names do not tell them.
    """
    found: dict[tuple[str, str], dict[tuple[str, ...], list[StoredRecord]]] = {}
    for stored in records:
        group = found.setdefault((stored.record.profile, stored.record.protocol), {})
        group.setdefault(experiment_of(stored) if compared else (), []).append(stored)
    several = len(found) > 1
    return [
        (".".join(filter(None, (".".join(kind) * several, name))), part)
        for kind, experiments in sorted(found.items())
        for _, mine in sorted(experiments.items(), reverse=True)
        for name, part in by_data(mine)
    ]


def by_data(records: Sequence[StoredRecord]) -> list[tuple[str, Sequence[StoredRecord]]]:
    """The records by data, each with a name for it, if reference records or controls have several data sets of one name.

    Otherwise they are one group without a name. Data that a sweep varies (shots, categories) differ on purpose.
    """
    given: dict[str, set[str]] = {}
    for stored in records:
        for key, value in stored.record.cell.items():
            if key.startswith("data.init_args."):
                given.setdefault(key, set()).add(canonical(value))
    apart = any(stored.reference or stored.record.sweep in CONTROLS for stored in records)
    if not apart or any(len(values) > 1 for values in given.values()):
        return [("", records)]
    groups: dict[tuple, list[StoredRecord]] = {}
    for stored in records:
        groups.setdefault(data_of(stored), []).append(stored)
    names = [name for data in groups for name in {name for name, _, _ in data}]
    if len(names) == len(set(names)):
        return [("", records)]
    titles = ["-".join(f"{name}-{print_[:6]}" for name, _, print_ in data) for data in groups]
    return list(zip(titles, groups.values(), strict=True))


def data_of(stored: StoredRecord) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Names, categories and fingerprints of a record's data sets."""
    sets = (
        (d["name"], tuple(sorted(map(str, d["categories"]))), f"{d['fingerprint']}{data_options(d)}")
        for d in stored.record.datasets
    )
    return tuple(sorted(sets))


def experiment_of(stored: StoredRecord) -> tuple[str, ...]:
    """Experiment and setting of a cell of the sweep `methods`, which no table mixes; () of any other record."""
    compare = stored.record.cell.get(COMPARE)
    return (str(compare), stored.record.setting) if compare else ()


def axis_value(stored: StoredRecord, axis: str, dataset: str = "") -> str:
    """A record's value on one of the axes on which records must agree, as shown in messages."""
    record = stored.record
    if axis == "protocol":
        return record.protocol
    if axis == "profile":
        return record.profile
    if axis == "metric version":
        return str(record.metrics["version"])
    if axis == "random weights":
        return "random backbone weights" if record.random_weights else "pretrained backbone weights"
    if axis == "setting":
        return record.setting
    if axis == "backbone":
        padding = record.backbone.get("padding")
        return str(record.backbone["name"]) + (f" (padding {padding})" if padding not in (None, "default") else "")
    if axis == "weights":
        checksum = record.backbone.get("sha256")
        return str(record.backbone["weights"]) + (f" (sha256 {str(checksum)[:10]})" if checksum else "")
    if axis == "image size":
        return "x".join(str(side) for side in record.image_size)
    if axis == "resize":
        return record.resize
    together = [d for d in record.datasets if record.setting == "unified" or d["name"] == dataset]
    return "; ".join(
        f"{d['name']} ({_few(d['categories'])}), fingerprint {str(d['fingerprint'])[:10]}{data_options(d)}"
        for d in together
    )


def versions(stored: StoredRecord) -> str:
    """The versions of `LIBRARIES` that a record was made with, such as `torch 2.6.0, timm 1.0.9`."""
    found = stored.record.provenance.get("versions") or {}
    known = [f"{library} {found[library]}" for library in LIBRARIES if library in found]
    return ", ".join(known) or f"{' and '.join(LIBRARIES)} of unknown version"


def _few(categories: Sequence[str]) -> str:
    count = "1 category" if len(categories) == 1 else f"{len(categories)} categories"
    return f"{count}: {', '.join(categories)}" if len(categories) <= 3 else count


def check_table(used: Sequence[tuple[Query, StoredRecord]], varies: Iterable[str] = (), where: str = "") -> None:
    """Raise ConflictError unless the records agree on everything that makes numbers comparable.

    `varies` names axes that the table compares on purpose (a sweep over backbones).
    """
    seen: dict[str, dict[tuple, dict[str, dict[str, None]]]] = {
        axis: defaultdict(lambda: defaultdict(dict)) for axis in AXES if axis not in set(varies)
    }
    done: set[tuple] = set()
    for query, stored in used:
        if (stored.name, query.dataset, query.setting) in done:
            continue
        done.add((stored.name, query.dataset, query.setting))
        record = stored.record
        for axis, groups in seen.items():
            group: tuple = ()
            if axis in METHOD_AXES:
                group = (record.method, query.setting if axis == "setting" else None)
            if axis == "data":
                group = (query.dataset, tuple(record.category_keys) if record.setting == "per_category" else ())
            groups[group][axis_value(stored, axis, query.dataset or "")][stored.name] = None
    conflicts = [
        (axis, {value: list(names) for value, names in values.items()})
        for axis, groups in seen.items()
        for values in groups.values()
        if len(values) > 1
    ]
    if conflicts:
        raise ConflictError(conflicts, where)


def check_cell(records: Sequence[StoredRecord], query: Query) -> None:
    """Raise ConflictError unless the records are one experiment but for the seed (or the category, one model each)."""
    if len(records) < 2:
        return
    check_table([(query, stored) for stored in records], where="one cell")
    conflicts: list[tuple[str, dict[str, list[str]]]] = []
    for title, values in (
        ("method", [stored.record.method for stored in records]),
        (COMPARE, [str(stored.record.cell.get(COMPARE)) for stored in records]),
        ("cell", [describe_cell({k: v for k, v in s.record.cell.items() if k != COMPARE}) for s in records]),
        *(("version of " + name, [_version_of(s, name) for s in records]) for name in LIBRARIES_OF_METHODS),
    ):
        if len(set(values)) > 1:
            conflicts.append((title, _grouped(values, records)))
    unified = [stored for stored in records if stored.record.setting == "unified"]
    by_seed = defaultdict(list)
    for stored in unified:
        by_seed[stored.record.seed].append(stored.name)
    for seed, names in by_seed.items():
        if len(names) > 1:
            conflicts.append((f"the run of seed {seed}", _grouped([_origin(s) for s in unified], unified, names)))
    conflicts += _config_conflicts(records)
    if conflicts:
        raise ConflictError(conflicts, "one cell")


def _version_of(stored: StoredRecord, library: str) -> str:
    return str((stored.record.provenance.get("versions") or {}).get(library, "none"))


def _grouped(
    values: Sequence[str], records: Sequence[StoredRecord], names: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """The records' names, all or those in `names`, by value."""
    groups: dict[str, list[str]] = defaultdict(list)
    for value, stored in zip(values, records, strict=True):
        if names is None or stored.name in names:
            groups[value].append(stored.name)
    return groups


def _origin(stored: StoredRecord) -> str:
    """The code that made a record, and when."""
    provenance = stored.record.provenance
    changed = " with changes" if provenance.get("git_dirty") else ""
    return f"commit {str(provenance.get('git_commit'))[:10]}{changed}, started {provenance.get('started')}"


def _config_conflicts(records: Sequence[StoredRecord]) -> list[tuple[str, dict[str, list[str]]]]:
    """Configuration keys that differ between records of one cell, the free ones (seed, names, machine) left out."""
    if len({_bare_text(stored) for stored in records}) == 1:
        return []
    configs = [_config(stored.path, stored.path.stat().st_mtime_ns) for stored in records]
    conflicts = []
    for key in sorted(set().union(*configs)):
        values = [repr(config.get(key, "not set")) for config in configs]
        if len(set(values)) > 1:
            conflicts.append((f"configuration {key}", _grouped(values, records)))
    return conflicts[:8]


def _bare_text(stored: StoredRecord) -> str:
    """The configuration's text without the seed and the run's name: equal texts need no parsing."""
    run = stored.record.run
    lines = stored.config_text.splitlines()
    return "\n".join(line for line in lines if not (_SEED_LINE.match(line) or line.endswith(f" {run}")))


def options_of(stored: StoredRecord) -> dict[str, Any]:
    """The options that decide a record's result, by dotted key, the seed left out."""
    return _options(stored.path, stored.path.stat().st_mtime_ns)


@lru_cache(maxsize=20000)
def _config(path: Path, modified: int) -> dict[str, Any]:
    return {key: canonical(value) for key, value in _options(path, modified).items()}


@lru_cache(maxsize=20000)
def _options(path: Path, _modified: int) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load((path / "config.yaml").read_text(encoding="utf-8"), Loader=loader)
    return deciding(content, beside=SEEDS)
