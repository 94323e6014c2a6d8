"""Run records: what one training and evaluation leaves behind, and the only input of every table.

A record is one folder `<root>/<sweep>/<run>/` with

* `record.json`   what was run: method, cell, protocol, seed, data, backbone, provenance (`RunRecord`);
* `metrics.csv`   what came out, one row per (variant, scope, dataset, category, metric);
* `history.csv`   what happened on the way: `epoch,step,metric,value`;
* `config.yaml`   the complete configuration, as the command line wrote it;
* optionally attachments, such as `heatmaps/index.csv` and the pictures that it lists (`HEATMAP_COLUMNS`).

A record is complete or absent: it is written to a hidden sibling folder, flushed, and renamed, which is atomic within
one file system, local or shared. `record.json` lists the sha256 of every other file. All scores are fractions in
[0, 1]; tables print percent. A record may come from anybody: what is wrong with it is found when it is read, by name.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from results.aggregator.names import published_name
from results.aggregator.sweep_cells import cell_key
from results.common import untrusted
from results.common.did_you_mean import did_you_mean
from results.common.files import REPLACED, restore_replaced, sync_folder
from results.common.methods import of
from results.common.pair import plain

SCHEMA = 1
LABELS_AT_TEST = "CLASS LABELS AT TEST TIME"
"""A note of a run whose method is told the class of each test image begins like this."""
SHOUTED = re.compile(r"[A-Z]{4,} [A-Z]{2,} ")
"""A run's note that begins in capitals is shouted above every table: nothing was trained, the data changed, labels given."""
LABELS_IN_TRAINING = "training labels"
"""A run's note that holds this is of a method that is given the class of each training image."""
SEVEN = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
"""The seven metrics whose mean benchmarks print as mAD."""
PROTOCOLS = ("clean", "as_released")
SETTINGS = ("unified", "per_category")
SCOPES = ("category", "mean", "pooled")
METRIC_COLUMNS = ("variant", "scope", "dataset", "category", "metric", "value", "n", "reason")
HISTORY_COLUMNS = ("epoch", "step", "metric", "value")
#: Columns of an attached `heatmaps/index.csv`; `file` is relative to `heatmaps/`, `rank` is worst, median, best or that of a
#: failure.
HEATMAP_COLUMNS = ("dataset", "category", "rank", "defect", "image_score", "file", "caption")
FILES = ("metrics.csv", "history.csv", "config.yaml")
HEATMAPS = "heatmaps/index.csv"
_NUMBERS = (
    "wall_seconds", "epochs", "seconds_per_epoch", "peak_memory_bytes", "train_seconds", "images_per_second",
)  # fmt: skip  # of the provenance, in tables
# Families whose values are fractions; a 97.3 among them is a percentage by mistake.
_FRACTION = re.compile(r"^(image|pixel|dsc|iou|pooled|seg_f1)(_|$)(?!.*threshold)")
ScoreKey: TypeAlias = tuple[str, str, str, str, str]
"""(variant, scope, dataset, category, metric)."""
NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._=,+\-]*$")
"""What a run or a sweep may be called."""


class RecordError(ValueError):
    """A record that does not follow the schema; the message names the file, the key and what is allowed."""


class DamagedRecordWarning(UserWarning):
    """A record folder that could not be read and was left out."""


@dataclass(frozen=True)
class RunRecord:
    """What one run was. Everything that decides whether two numbers may stand in one table is in here.

    `cell` maps sweep parameters (the command line's dotted keys) to their values; `image_size` is (height, width) in
    pixels; `backbone` needs at least `name` and `weights`; every entry of `datasets` needs `name`, `fingerprint` and
    `categories`; `metrics` needs `version`. `parameters` counts (`trainable`). `provenance` is free, but tables read
    these keys of it: `git_commit`, `git_dirty`, `versions`, `device`, `started`, `wall_seconds`, `epochs`,
    `seconds_per_epoch`, `train_seconds` (on cached features, where they are cached), `images_per_second` (scoring, backbone
    included), `peak_memory_bytes`, `command`, `world_size`, `effective_batch_size`.
    """

    run: str
    sweep: str
    cell: dict[str, Any]
    method: str
    profile: str
    protocol: str
    setting: str
    seed: int
    image_size: tuple[int, int]
    resize: str
    backbone: dict[str, Any]
    datasets: list[dict[str, Any]]
    metrics: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check every field that tables rely on; raises `RecordError` with the key and the allowed values."""
        if self.schema != SCHEMA:
            raise RecordError(f"schema is {self.schema!r}; this version of UniRecon reads and writes schema {SCHEMA}")
        for key in ("run", "sweep"):
            _check_name(key, getattr(self, key))
        for key in ("method", "profile", "resize"):
            _check_text(key, getattr(self, key))
        _check_choice("protocol", self.protocol, PROTOCOLS)
        _check_choice("setting", self.setting, SETTINGS)
        if not _is_whole(self.seed):
            raise RecordError(f"seed is {self.seed!r}; it must be an integer")
        size = self.image_size
        pair = isinstance(size, (tuple, list)) and len(size) == 2
        if not pair or not all(_is_whole(side) and side > 0 for side in size):
            raise RecordError(f"image_size is {size!r}; it must be (height, width) in pixels")
        object.__setattr__(self, "image_size", (int(size[0]), int(size[1])))
        object.__setattr__(self, "seed", int(self.seed))
        for key in ("cell", "backbone", "metrics", "parameters", "provenance"):
            if not isinstance(getattr(self, key), dict):
                raise RecordError(f"{key} is {type(getattr(self, key)).__name__}; it must be a mapping")
        if not isinstance(self.notes, list) or not all(isinstance(note, str) for note in self.notes):
            raise RecordError(f"notes is {str(self.notes)[:60]}; it must be a list of texts")
        _check_keys("backbone", self.backbone, ("name", "weights"))
        _check_text("backbone name", self.backbone["name"])
        _check_keys("metrics", self.metrics, ("version",))
        _check_text("metrics version", str(self.metrics["version"] or ""))
        _check_kinds("metrics", self.metrics, dict, ("definitions",))
        _check_kinds("parameters", self.parameters, (int, float, np.number), self.parameters)
        _check_kinds("provenance", self.provenance, (int, float, np.number), _NUMBERS)
        _check_kinds("provenance", self.provenance, dict, ("versions",))
        if not isinstance(self.datasets, list) or not self.datasets:
            raise RecordError(f"datasets is {self.datasets!r}; it must be a non-empty list")
        for position, dataset in enumerate(self.datasets):
            where = f"datasets[{position}]"
            if not isinstance(dataset, dict):
                raise RecordError(f"{where} is {dataset!r}; it must be a mapping")
            _check_keys(where, dataset, ("name", "fingerprint", "categories"))
            for key in ("name", "fingerprint"):
                _check_text(f"{where} {key}", dataset[key])
            if not dataset["categories"]:
                raise RecordError(f"{where} ({dataset['name']}) lists no categories")
            if not isinstance(dataset["categories"], (list, tuple)):
                raise RecordError(
                    f"{where} ({dataset['name']}): categories must be a list; found {dataset['categories']!r}"
                )
            for category in dataset["categories"]:
                _check_text(f"{where} category", category)

    @property
    def random_weights(self) -> bool:
        """Whether the frozen backbone had random weights, which every table must shout."""
        return str(self.backbone["weights"]).lower() == "random"

    @property
    def category_keys(self) -> list[tuple[str, str]]:
        """The (dataset, category) pairs that a complete record has category rows for, in the record's order."""
        return [(d["name"], plain(d["name"], c)) for d in self.datasets for c in d["categories"]]


@dataclass(frozen=True)
class StoredRecord:
    """A record as read from disk: `record`, its folder `path`, and the three tables, made on first use."""

    record: RunRecord
    path: Path
    columns: dict[str, list]  # the raw columns of metrics.csv; values are floats, NaN where undefined
    files: dict[str, str] = field(default_factory=dict)  # sha256 of every file, as record.json lists them
    unchecked: tuple[str, ...] = ()  # files beside them that an older version wrote without checksums
    reference: bool = False  # one of those that come with the project, see results.aggregator.reference

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Long table with `METRIC_COLUMNS`; `value` float64 in [0, 1] or NaN, then `reason` says why."""
        return pd.DataFrame(self.columns, columns=list(METRIC_COLUMNS))

    @cached_property
    def scores(self) -> dict[ScoreKey, tuple[float, str]]:
        """(variant, scope, dataset, category, metric) -> (value, reason); `dataset/` before a category is cut."""
        columns = self.columns
        keys = zip(*(columns[name] for name in METRIC_COLUMNS[:5]), strict=True)
        pairs = zip(columns["value"], columns["reason"], strict=True)
        found = {(v, s, d, plain(d, c), m): pair for (v, s, d, c, m), pair in zip(keys, pairs, strict=True)}
        return found | _means_of_seven(found)

    @cached_property
    def name(self) -> str:
        """`sweep/run`, by which messages and tables name a record."""
        return f"{self.record.sweep}/{self.record.run}"

    @property
    def labels(self) -> str:
        """What the run was told of the images' classes: `test`, `training` or nothing."""
        notes = self.record.notes
        if any(note.startswith(LABELS_AT_TEST) for note in notes):
            return "test"
        return "training" if any(LABELS_IN_TRAINING in note for note in notes) else ""

    @cached_property
    def methods(self) -> frozenset[str]:
        """The names under which the run's method may be asked for: its own and the published one of its size.

        A cell of the sweep `methods` is asked for by its profile, which may be another method's control.
        """
        of_sweep = of(self.record.cell)
        own = of_sweep[0] if of_sweep else self.record.method
        return frozenset((own, published_name(own, str(self.record.backbone["name"]))))

    @cached_property
    def cell(self) -> frozenset:
        """Identity of the record's cell, the seed left out; see `results.aggregator.sweep_cells.cell_key`."""
        return cell_key(self.record.cell)

    @cached_property
    def history(self) -> pd.DataFrame:
        """Long table with `HISTORY_COLUMNS`, in the order it was logged."""
        kinds = {"metric": str, "value": float}
        try:
            table = pd.read_csv(
                self.path / "history.csv", dtype=kinds, keep_default_na=False, na_values={"value": [""]}
            )
            table["epoch"] = pd.to_numeric(table["epoch"])
        except (ValueError, KeyError, OverflowError) as error:
            raise RecordError(f"{self.path / 'history.csv'} cannot be read: {error}") from None
        return _checked_columns(table, HISTORY_COLUMNS, f"history of {self.name}")

    @cached_property
    def config_text(self) -> str:
        """The run's complete configuration as YAML text."""
        return (self.path / "config.yaml").read_text(encoding="utf-8")

    @cached_property
    def heatmaps(self) -> pd.DataFrame:
        """The attached pictures (`HEATMAP_COLUMNS` and `path`), empty if the run kept none."""
        if not (self.path / HEATMAPS).exists():
            return pd.DataFrame(columns=[*HEATMAP_COLUMNS, "path"])
        table = pd.DataFrame(_heatmap_index(self.path, self.files), columns=list(HEATMAP_COLUMNS))
        table["path"] = [str(self.path / "heatmaps" / name) for name in table["file"]]
        return table

    def picture(self, file: str) -> bytes:
        """A picture that `heatmaps` lists under `file`; RecordError if it is not what the run wrote."""
        name = f"heatmaps/{file}"
        try:
            content = untrusted.file_inside(self.path, name).read_bytes()
        except (untrusted.UntrustedError, OSError) as error:
            raise RecordError(f"{self.name}: {error}") from None
        if hashlib.sha256(content).hexdigest() != self.files.get(name, hashlib.sha256(content).hexdigest()):
            raise RecordError(f"{self.name}: {name} is not what the run wrote (checksum differs)")
        return content


@dataclass(frozen=True)
class DamagedRecord:
    """A folder that looks like a record and is not one: where, and what is wrong with it."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}".encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class RecordSet(Sequence[StoredRecord]):
    """Readable records sorted by sweep and run name, and the damaged ones beside them."""

    records: tuple[StoredRecord, ...]
    damaged: tuple[DamagedRecord, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StoredRecord]:
        return iter(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]


def _means_of_seven(scores: Mapping[ScoreKey, tuple[float, str]]) -> dict[ScoreKey, tuple[float, str]]:
    """The mean of the seven metrics of every category, where a record has them all; undefined where one is."""
    means = {}
    for key in [key for key in scores if key[1] == "category" and key[4] == SEVEN[0]]:
        values = [scores[(*key[:4], metric)] for metric in SEVEN if (*key[:4], metric) in scores]
        if len(values) == len(SEVEN):
            reason = next((reason for value, reason in values if math.isnan(value)), "")
            means[(*key[:4], "mean_of_seven")] = (math.fsum(value for value, _ in values) / len(SEVEN), reason)
    return means


def data_options(dataset: Mapping[str, Any]) -> str:
    """How a record's data set was thinned or dirtied for training, as `, shots 4, contamination 0.1`; else nothing."""
    options = ("shots", "contamination", "contamination_reserved")
    return "".join(f", {name.replace('_', ' ')} {dataset[name]:g}" for name in options if dataset.get(name))


def record_path(root: str | Path, sweep: str, run: str) -> Path:
    """Folder of a run's record; it exists exactly if the run is complete."""
    _check_name("sweep", sweep)
    _check_name("run", run)
    return Path(root) / sweep / run


def write_record(
    root: str | Path,
    record: RunRecord,
    metrics: pd.DataFrame,
    history: pd.DataFrame,
    config_text: str,
    attachments: Mapping[str, bytes | str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a record so that a reader sees all of it or nothing, and return its folder.

    Args:
        root: usually `results/runs`.
        record: what was run.
        metrics: long table with the columns `METRIC_COLUMNS`.
        history: long table with the columns `HISTORY_COLUMNS`; may be empty.
        config_text: the complete configuration as YAML.
        attachments: other files, relative path -> content (bytes, text, or the path of a file to copy).
        overwrite: replace an existing record; the old one disappears only when the new one is in place.

    Raises:
        RecordError: a value, column or key breaks the schema.
        FileExistsError: the record exists and `overwrite` is False.
    """
    target = record_path(root, record.sweep, record.run)
    restore_replaced(target.parent)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is already a record; remove it, choose another run name, or allow overwriting")
    label = f"{record.sweep}/{record.run}"
    contents: dict[str, bytes] = {
        "metrics.csv": _csv_bytes(check_metrics(metrics, where=f"metrics of {label}")),
        "history.csv": _csv_bytes(_checked_columns(history, HISTORY_COLUMNS, f"history of {label}")),
        "config.yaml": config_text.encode(),
    }
    for name, content in (attachments or {}).items():
        relative = Path(name)
        if relative.is_absolute() or "\\" in name or ".." in relative.parts or name in (*FILES, "record.json"):
            raise RecordError(f"attachment {name!r} must be a path inside the record and not one of its own files")
        if isinstance(content, Path):
            content = content.read_bytes()
        contents[name] = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    description = asdict(record)
    description["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    try:
        contents["record.json"] = (json.dumps(description, indent=1, allow_nan=False, default=_plain) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise RecordError(f"record of {label} cannot be written as JSON: {error}") from error

    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = target.parent / f".{record.run}.{unique}.tmp"
    try:
        for name, content in contents.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        _rename(temporary, target, unique, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(target.parent)
    return target


def read_record(path: str | Path, pictures: bool = False) -> StoredRecord:
    """Read one record folder; raises `RecordError` naming the file and what is wrong with it.

    Args:
        path: The record's folder.
        pictures: Compare the checksums of pictures too, which else happens when they are shown.
    """
    path = Path(path)
    try:
        return _read(path, pictures)
    except untrusted.UntrustedError as error:
        raise RecordError(f"{path}: {error}") from None


def _read(path: Path, pictures: bool) -> StoredRecord:
    raw = untrusted.read_mapping(path, "record.json")
    files = untrusted.checksums(raw)
    raw.pop("files", None)
    known = {item.name for item in fields(RunRecord)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise RecordError(f"{path / 'record.json'} has unknown keys {', '.join(unknown)}")
    try:
        record = RunRecord(**raw)
    except (TypeError, RecordError) as error:
        raise RecordError(f"{path / 'record.json'}: {str(error).replace('RunRecord.__init__() ', '')}") from None
    for name in FILES:
        untrusted.file_inside(path, name)
    content = (path / "metrics.csv").read_bytes()
    untrusted.check_files(path, files, pictures)
    columns = _parse_metrics(content, path / "metrics.csv")
    _check_columns(columns, str(path / "metrics.csv"))
    try:
        untrusted.check_yaml((path / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path / 'config.yaml'} is not UTF-8: {error}") from None
    if (path / HEATMAPS).exists():
        _heatmap_index(path, files)
    unchecked: tuple[str, ...] = ()
    if set(files) <= set(FILES):  # written before attachments had checksums, or there are none
        unchecked = tuple(sorted({entry.name for entry in os.scandir(path)} - {*FILES, "record.json"}))
    return StoredRecord(record, path, columns, files, unchecked)


def _heatmap_index(path: Path, files: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The rows of an attached `heatmaps/index.csv`; RecordError if one names a file that is not the record's."""
    index = path / HEATMAPS
    try:
        rows = list(csv.reader(io.StringIO(untrusted.file_inside(path, HEATMAPS).read_text(encoding="utf-8"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{index} is not a CSV file: {error}") from None
    head = rows[0] if rows else []
    missing = [name for name in HEATMAP_COLUMNS if name not in head]
    if missing:
        raise RecordError(f"{index} has no column {', '.join(missing)}; it needs {', '.join(HEATMAP_COLUMNS)}")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(head):
            raise RecordError(f"{index} line {number} has {len(row)} of {len(head)} fields")
        line = dict(zip(head, row, strict=True))
        try:
            untrusted.file_inside(path, f"heatmaps/{line['file']}")
            float(line["image_score"])
        except ValueError as error:
            raise RecordError(f"{index} line {number}: {error}") from None
        if set(files) - set(FILES) and f"heatmaps/{line['file']}" not in files:
            raise RecordError(f"{index} line {number}: {line['file']!r} is not among the files that the run wrote")
        found.append(tuple(line[name] for name in HEATMAP_COLUMNS))
    return found


def read_records(root: str | Path, sweep: str | None = None, warn: bool = True) -> RecordSet:
    """Read all records of a root folder, or of one sweep, sorted by name.

    A damaged record is left out, kept in `RecordSet.damaged`, and (unless `warn` is False, for callers that print it
    themselves) announced with a `DamagedRecordWarning` each. Hidden folders are unfinished writes, not records.

    Raises:
        FileNotFoundError: the root, or the sweep's folder in it, does not exist; suggests the nearest existing name.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist: no run has left a record there yet")
    if sweep is None:
        folders = [root / name for name in _visible_folders(root)]
    else:
        folders = [root / sweep]
        if not folders[0].is_dir():
            known = did_you_mean(sweep, _visible_folders(root))
            raise FileNotFoundError(f"{root} holds no records of sweep {sweep!r}. {known}")
    records: list[StoredRecord] = []
    damaged: list[DamagedRecord] = []
    for folder in folders:
        try:
            restore_replaced(folder)
            runs = _visible_folders(folder)
        except OSError as error:
            damaged.append(DamagedRecord(folder, f"cannot be read: {error.strerror}"))
            continue
        for run in runs:
            try:
                stored = read_record(folder / run)
                if (stored.record.sweep, stored.record.run) != (folder.name, run):
                    found = f"{stored.record.sweep}/{stored.record.run}"
                    raise RecordError(f"{folder / run} is a copy or was renamed: record.json says {found}")
                records.append(stored)
            except Exception as error:  # whatever one folder holds, the others are read
                kind = "" if isinstance(error, (RecordError, OSError)) else f"{type(error).__name__}: "
                problem = kind + str(error).removeprefix(f"{folder / run}").lstrip(":/ ")
                damaged.append(DamagedRecord(folder / run, problem))
    if warn:
        for item in damaged:
            warnings.warn(f"damaged record left out: {item}", DamagedRecordWarning, stacklevel=2)
    return RecordSet(tuple(records), tuple(damaged))


def _visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def check_metrics(metrics: pd.DataFrame, where: str = "metrics") -> pd.DataFrame:
    """Return the table with exactly `METRIC_COLUMNS`; raises `RecordError` naming the first bad row."""
    table = _checked_columns(metrics, METRIC_COLUMNS, where)
    if table.empty:
        raise RecordError(f"{where}: no rows; a run without any metric is not a result")
    for name in ("variant", "scope", "dataset", "category", "metric", "reason"):
        table[name] = table[name].fillna("").astype(str)
    try:
        table["value"] = table["value"].astype(float)
        table["n"] = table["n"].astype(int)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where}: value must be a number or empty and n an integer: {error}") from None
    for row in table.itertuples(index=False):
        _check_row(row.scope, row.dataset, row.category, row.metric, row.value, row.reason, where)
    keys = list(METRIC_COLUMNS[:5])
    twice = table[table.duplicated(keys, keep=False)]
    if len(twice):
        raise RecordError(f"{where}: two rows for {', '.join(f'{key}={twice.iloc[0][key]!r}' for key in keys)}")
    return table


def _check_columns(columns: Mapping[str, Sequence[Any]], where: str) -> None:
    """What `check_metrics` checks, at the speed that thousands of records need; RecordError names the row."""
    places = list(zip(*(columns[name] for name in ("scope", "dataset", "category", "metric")), strict=True))
    for scope, dataset, category, metric in set(places):
        _check_row(scope, dataset, category, metric, 0.0, "", where)
    for position, value in enumerate(columns["value"]):
        if not 0.0 <= value <= 1.0:  # also NaN
            scope, dataset, category, metric = places[position]
            _check_row(scope, dataset, category, metric, value, columns["reason"][position], where)
    if min(columns["n"]) < 0:
        raise RecordError(f"{where}: n is {min(columns['n'])}; it counts images or categories")
    keys = list(zip(columns["variant"], places, strict=True))
    if len(set(keys)) < len(keys):
        seen: set[Any] = set()
        variant, place = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        row = dict(zip(("scope", "dataset", "category", "metric"), place, strict=True))
        raise RecordError(
            f"{where}: two rows for variant={variant!r}, {', '.join(f'{k}={v!r}' for k, v in row.items())}"
        )


def _check_row(scope: str, dataset: str, category: str, metric: str, value: Any, reason: str, where: str) -> None:
    place = f"{where}: {metric} of {dataset or 'all datasets'}/{category or scope}"
    if scope not in SCOPES:
        raise RecordError(f"{place}: unknown scope {scope!r}. {did_you_mean(scope, SCOPES)}")
    if scope == "category" and not (dataset and category):
        raise RecordError(f"{place}: a category row needs a dataset and a category")
    if not metric:
        raise RecordError(f"{place}: a row without a metric name")
    if value is None or math.isnan(value):
        if not reason:
            raise RecordError(f"{place} has neither a value nor a reason for its absence")
    elif math.isinf(value):
        raise RecordError(f"{place} is infinite")
    elif _is_fraction(metric) and not -1e-9 <= value <= 1 + 1e-9:
        raise RecordError(f"{place} is {value!r}; scores are fractions in [0, 1]")


def _parse_metrics(content: bytes, file: Path) -> dict[str, list]:
    """Columns of metrics.csv. The csv module, not pandas: ten times faster on thousands of small files."""
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"))))
    except csv.Error as error:
        raise RecordError(f"{file} is not a CSV file: {error}") from None
    if not rows or tuple(rows[0]) != METRIC_COLUMNS:
        raise RecordError(f"{file} has the columns {rows[0] if rows else 'none'}; it needs {', '.join(METRIC_COLUMNS)}")
    width = len(METRIC_COLUMNS)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != width:
            raise RecordError(f"{file} line {number} has {len(row)} of {width} fields: the file is cut off or damaged")
    if len(rows) == 1:
        raise RecordError(f"{file} holds no metrics")
    transposed = zip(*rows[1:], strict=True)
    columns: dict[str, list] = {
        name: list(map(sys.intern, column)) for name, column in zip(METRIC_COLUMNS, transposed, strict=True)
    }
    try:
        columns["value"] = [float(value) if value else math.nan for value in columns["value"]]
        columns["n"] = [int(value) for value in columns["n"]]
    except ValueError as error:
        raise RecordError(f"{file}: {error}") from None
    return columns


def _rename(temporary: Path, target: Path, unique: str, overwrite: bool) -> None:
    """Put the finished folder in place; a rename onto a non-empty folder fails, so two writers cannot mix."""
    while overwrite and target.exists():
        old = target.parent / f".{target.name}.{unique}{REPLACED}"
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.exists():
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another process has filled the gap; its record is replaced in turn
            continue
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.rename(temporary, target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(f"{target} was written by another process in the meantime") from error
        raise


def _checked_columns(table: pd.DataFrame, names: Sequence[str], where: str) -> pd.DataFrame:
    missing = [name for name in names if name not in table.columns]
    extra = [str(name) for name in table.columns if name not in names]
    if missing or extra:
        found = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(extra)}"] * bool(extra)
        raise RecordError(f"{where}: columns {'; '.join(found)}; needed are exactly {', '.join(names)}")
    return table.loc[:, list(names)].copy()


def _csv_bytes(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode("utf-8", "surrogateescape")


def _plain(value: Any) -> Any:
    """JSON for the NumPy scalars, paths and tuples that configurations hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} ({value!r})")


@functools.lru_cache(maxsize=4096)
def _is_fraction(metric: str) -> bool:
    return bool(_FRACTION.match(metric))


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_text(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise RecordError(f"{key} is {str(value)[:60]!r}; it must be a text that is not empty")


def _check_kinds(where: str, mapping: Mapping[str, Any], kind: Any, keys: Iterable[str]) -> None:
    """RecordError unless the values under the keys are of the kind, or None; booleans do not count as numbers."""
    for key in keys:
        value = mapping.get(key)
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool) and finite):
            continue
        wanted = "a mapping" if kind is dict else "a finite number"
        raise RecordError(f"{where}: {key} is {str(value)[:60]!r}; it must be {wanted}")


def _check_name(key: str, name: Any) -> None:
    if not isinstance(name, str) or not NAME.match(name):
        raise RecordError(f"{key} is {name!r}; allowed are letters, digits and . _ = , + -, starting with no sign")


def _check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise RecordError(f"{key} is {value!r}. {did_you_mean(str(value), allowed)}")


def _check_keys(where: str, mapping: Mapping[str, Any], needed: Sequence[str]) -> None:
    missing = [key for key in needed if key not in mapping]
    if missing:
        raise RecordError(f"{where} has no {', '.join(missing)}; it needs {', '.join(needed)}")
