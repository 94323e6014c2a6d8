"""One model per category: `fit` trains the categories one after the other and joins their results into one record.

The setting is a flag of the data module (`--data.init_args.setting=per_category`). Each category's own record stays
in the run's working folder and a finished one is not trained again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from datamodules.errors import DataError
from datamodules.problems import number_of
from datamodules.readers import list_dataset
from lightning_modules.callbacks.progress import write_progress
from lightning_modules.metrics.definitions import NOT_AVERAGED
from lightning_modules.metrics.means import mean_over_categories
from lightning_modules.running import resuming, tracking
from lightning_modules.running.methods import class_at
from lightning_modules.running.printing import print_metrics
from lightning_modules.running.settings import RunConfig, sweep_parameters
from results.aggregator.records import RunRecord, StoredRecord, read_record, write_record


class OneModelEach(Exception):
    """The configuration asks for one model per category; `run` does it."""

    def __init__(self, run: RunConfig, configuration: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        super().__init__(f"{number_of(len(parts), 'category')}, one model each")
        self.run_config, self.configuration, self.parts = run, configuration, parts

    def run(self, fit: Callable[[list[str]], Any]) -> Path | None:
        """Calls `fit` with each category's additional arguments and writes the joint record; returns its folder."""
        run, work = self.run_config, self.run_config.work
        finished = run.finished()
        if finished and not run.overwrite:
            leave_finished(run, self.configuration)
        if finished:
            for folder in ("runs", "work"):  # records and checkpoints of the run that is replaced
                shutil.rmtree(work / folder, ignore_errors=True)
        packages = class_at(self.configuration["model"]["class_path"]).needs_packages
        resuming.check(run, self.configuration, "", work / "runs", packages)
        if self.configuration["trainer"]["logger"] is not False:
            tracking.announce(run)
            tracking.open_run(run, self.configuration)
        stored = []
        for number, part in enumerate(self.parts):
            folder = work / "runs" / "categories" / part["run"]
            new = not folder.exists()
            if new:
                rank_zero_info(f"Category {number + 1} of {len(self.parts)}: {part['run']}")
                fit(
                    [
                        f"--data.init_args.datasets={json.dumps([part['dataset']])}",
                        f"--run.name={part['run']}",
                        "--run.sweep=categories",
                        f"--run.results={work}",
                        "--run.overwrite=false",
                        "--trainer.logger=false",
                    ]
                )
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()
            if not folder.exists():
                return None  # interrupted: the next call goes on here
            stored.append(read_record(folder))
            if new:
                tracking.log_history(stored[-1].history, part["run"])
            rank_zero_only(write_progress)(work / "progress.json", number + 1, len(self.parts), {})
        return self._write(stored)

    @rank_zero_only
    def _write(self, stored: list[StoredRecord]) -> Path:
        run = self.run_config
        record = join_records([s.record for s in stored], run.name, run.sweep)
        metrics = join_metrics(s.metrics for s in stored)
        history = pd.concat(
            [
                s.history.assign(metric=part["run"] + "/" + s.history.metric)
                for s, part in zip(stored, self.parts, strict=True)
            ],
            ignore_index=True,
        )
        path = write_record(
            Path(run.results) / "runs",
            record,
            metrics,
            history,
            yaml.safe_dump(
                {**self.configuration, "run": {**self.configuration["run"], "overwrite": False}}, sort_keys=False
            ),
            attachments=join_attachments([(part["run"], s.path) for s, part in zip(stored, self.parts, strict=True)]),
            overwrite=run.overwrite,
        )
        print_metrics(metrics)
        tracking.log_record(path, metrics, run.upload)
        rank_zero_info(f"Run record: {path}")
        return path


def leave_finished(run: RunConfig, configuration: dict[str, Any]) -> NoReturn:
    """Leaves a run that has its record already: with a refusal, or with success if W&B handed it out again.

    The latter run was interrupted after its record was written; what W&B may have missed is reported again.
    """
    if not tracking.handed_out(run):
        raise SystemExit(f"{run.record} is already a finished run: choose another --run.name, or --run.overwrite=true.")
    rank_zero_info(f"{run.record} was finished before the run was handed out again.")
    tracking.open_run(run, configuration)
    tracking.log_record(run.record, read_record(run.record).metrics, run.upload)
    raise SystemExit(0)


def split(subcommand: str, config: Any) -> None:
    """Raises `OneModelEach` if the configuration's datasets have more than one category; else does nothing.

    Raises:
        SystemExit: the data cannot be read, or another subcommand than `fit` is given the joint record; the message names
            the records of the categories.
    """
    if subcommand != "fit":  # needs no data: a record may stand where its images do not
        _refuse_joint(subcommand, RunConfig(**config.run.as_dict()).work / "runs" / "categories")
        if subcommand == "predict":
            return
    parts = []
    for dataset in config.data.init_args.datasets:
        label = dataset.label or dataset.name
        try:
            listing = list_dataset(dataset.name, dataset.root, dataset.categories or None, dataset.label)
        except DataError as error:
            raise SystemExit(str(error)) from error
        for category in dict.fromkeys(listing.table["category"]):
            entry = {"name": dataset.name, "root": str(dataset.root), "categories": [category], "label": label}
            parts.append({"run": category, "dataset": entry})
    if len(parts) <= 1:
        return
    if len({part["dataset"]["label"] for part in parts}) > 1:
        parts = [{**part, "run": f"{part['dataset']['label']}-{part['run']}"} for part in parts]
    names = run_names([part["run"] for part in parts])
    parts = [{**part, "run": name} for part, name in zip(parts, names, strict=True)]
    if subcommand != "fit":
        raise SystemExit(
            f"setting per_category: {subcommand} works on one model, but {len(parts)} categories are named and none has been "
            "trained here: fit comes first."
        )
    plain = json.loads(json.dumps(config.as_dict(), default=str))
    raise OneModelEach(RunConfig(**plain["run"]), plain, parts)


def _refuse_joint(subcommand: str, folder: Path) -> None:
    """Refuses a run that holds one model per category, and names their records."""
    names = sorted(path.parent.name for path in folder.glob("*/record.json"))
    if names:
        named = "name a category (--category, CATEGORY= with make), or " if subcommand == "predict" else ""
        there = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        raise SystemExit(
            f"setting per_category: {subcommand} works on one model, so {named}give the configuration of one category's record "
            f"(there are {there}): --config {folder / names[0]}/config.yaml (make: RUN={folder / names[0]})."
        )


def run_names(names: list[str]) -> list[str]:
    """The names as names of runs, all different: what these may not hold becomes `_`.

    A name that the command line would take for a number or for nothing (01, null) gets a word before it.
    """
    plain = [re.sub(r"^[^A-Za-z0-9_]|[^A-Za-z0-9._=,+-]", "_", name) for name in names]
    plain = [name if isinstance(yaml.safe_load(name), str) else f"category_{name}" for name in plain]
    return [name if plain.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(plain)]


def join_records(records: list[RunRecord], run: str, sweep: str) -> RunRecord:
    """The record of all categories together; what differs between them (time, memory) is added up or the largest."""
    first = records[0]
    datasets: dict[str, dict[str, Any]] = {}
    for record in records:
        for entry in record.datasets:
            known = datasets.setdefault(entry["name"], {**entry, "categories": [], "fingerprint": []})
            known["categories"] += entry["categories"]
            known["fingerprint"].append(entry["fingerprint"])
    for entry in datasets.values():
        entry["fingerprint"] = hashlib.sha256("".join(entry["fingerprint"]).encode()).hexdigest()
    provenance = dict(first.provenance)
    rules: dict[str, Callable[[list[Any]], Any]] = {
        "wall_seconds": sum,
        "seconds_per_epoch": sum,
        "train_seconds": sum,
        "images_per_second": statistics.fmean,
        "peak_memory_bytes": max,
    }
    for key, rule in rules.items():
        values = [record.provenance[key] for record in records if record.provenance.get(key) is not None]
        if values:
            provenance[key] = rule(values)
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    return replace(
        first,
        run=run,
        sweep=sweep,
        cell=sweep_parameters(),
        setting="per_category",
        datasets=list(datasets.values()),
        provenance=provenance,
        notes=[*notes, f"{len(records)} models, one per category; parameters are those of one model"],
    )


def join_metrics(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Category rows of all tables and their unweighted means; nothing is pooled over different models.

    tables: one per category, with the columns of metrics.csv. A mean says in `reason` which categories it misses; `n`
    counts those that it has.
    """
    parts = [table[table.scope == "category"] for table in tables]
    categories = pd.concat(parts, ignore_index=True)
    names = list(dict.fromkeys(categories.dataset))
    rows = []
    for dataset in dict.fromkeys([*names, ""]):
        chosen = categories if dataset == "" else categories[categories.dataset == dataset]
        for (variant, metric), group in chosen.groupby(["variant", "metric"], sort=False):
            if metric in NOT_AVERAGED:
                continue
            mean = mean_over_categories(zip(group.category, group.value, strict=True))
            rows.append((variant, "mean", dataset, "", metric, *mean))
    return pd.concat([categories, pd.DataFrame(rows, columns=categories.columns)], ignore_index=True)


def join_attachments(folders: Iterable[tuple[str, Path]]) -> dict[str, bytes | str]:
    """The attachments of several records in one: CSV files one below the other, pictures side by side."""
    tables: dict[str, list[pd.DataFrame]] = {}
    files: dict[str, bytes | str] = {}
    for name, folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder).as_posix()
            if relative in ("record.json", "metrics.csv", "history.csv", "config.yaml"):
                continue
            if path.suffix == ".csv":
                tables.setdefault(relative, []).append(pd.read_csv(path, dtype=str, keep_default_na=False))
            else:
                files[f"{Path(relative).parent}/{name}-{path.name}" if relative in files else relative] = (
                    path.read_bytes()
                )
    for relative, parts in tables.items():
        buffer = io.StringIO()
        pd.concat(parts, ignore_index=True).to_csv(buffer, index=False)
        files[relative] = buffer.getvalue()
    return files
