"""Thresholds where images are few: every normal image is scored by a model that has not seen it, and the final model sees all.

`run.folds=K` trains K models first, each on all but a K-th of each category's normal images (`data.fold`), and keeps the
scores of those left out; then the run itself trains on all of them, and its thresholds rest on the K models' scores
(cross-conformal: Vovk, Annals of Mathematics and Artificial Intelligence 74, 2015; for anomaly detectors Hennhöfer and
Preisach, arXiv 2402.16388). That costs the training about K times more, and no image is lost to thresholds.

What is promised is less than of held-out images. The k-th highest of n scores makes about k / (n + 1) false alarms as long as a
K-th of the images more changes scores little, and nothing is promised. Without that condition there is a bound only for deciding
by all K models together (CV+: Barber et al., Annals of Statistics 49, 2021): 2 k / (n + 1) plus the smaller of
2 (1 - 1 / K) / (n / K + 1) and (1 - K / n) / (K + 1). The final model alone has none, so none is printed.

A finished fold is not trained again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_modules.decisions import normal, pixels
from lightning_modules.metrics.thresholds import PixelStatistics
from lightning_modules.running import resuming
from lightning_modules.running.settings import RunConfig
from results.common.deciding import deciding
from results.common.files import read_json, write_json

SWEEP = "folds"


class FoldsFirst(Exception):
    """The configuration asks for the scores of folds that are not there yet; `run` makes them, then the run itself."""

    def __init__(self, run: RunConfig, configuration: dict[str, Any]) -> None:
        super().__init__(f"{run.folds} folds first")
        self.run_config, self.configuration = run, configuration

    def run(self, fit: Callable[[list[str]], Any]) -> None:
        """Calls `fit` with the additional arguments of each missing fold, then with none for the run itself."""
        run = self.run_config
        folders = _folders(run)
        for folder in _outdated(run):
            _remove(run, folder)
        rank_zero_only(write_json)(_file(run), _decides(self.configuration))
        rank_zero_info(
            f"{run.folds} folds: {run.folds} models of {run.folds - 1}/{run.folds} of the normal images each, for thresholds, "
            f"then the run's own of all of them: about {run.folds} trainings more than without."
        )
        for number, folder in enumerate(folders, 1):
            if not folder.exists():
                rank_zero_info(f"Fold {number} of {run.folds}")
                fit(
                    [
                        f"--data.init_args.fold=[{number},{run.folds}]",
                        f"--run.name={folder.name}",
                        f"--run.sweep={SWEEP}",
                        f"--run.results={run.work}",
                        "--run.folds=null",
                        "--run.heatmaps=false",
                        "--run.overwrite=false",
                        "--trainer.logger=false",
                    ]
                )
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()
            if not folder.exists():
                return  # interrupted: the next call goes on here
        rank_zero_info("All folds are scored; now the run itself")
        fit([])


def split(subcommand: str, config: Any) -> None:
    """Raises `FoldsFirst` if the run wants folds that have no scores yet; the run itself then holds no image out.

    Raises:
        SystemExit: options that folds cannot go together with.
    """
    run = RunConfig(**config.run.as_dict())
    if run.folds is None or subcommand != "fit":
        return
    data = config.data.init_args
    if data.holdout:
        raise SystemExit(
            f"error: run.folds={run.folds} scores every normal image by a model that has not seen it, so none is held out "
            f"besides: leave data.init_args.holdout={data.holdout:g} out, or the folds."
        )
    data.holdout = 0.0
    if data.get("fold") is not None:
        raise SystemExit("error: data.init_args.fold trains one fold, run.folds all of them: give one of them.")
    configuration = json.loads(json.dumps(config.as_dict(), default=str))
    _same(run, configuration)
    if not all(folder.exists() for folder in _folders(run)) or _outdated(run):
        raise FoldsFirst(run, configuration)


def _same(run: RunConfig, configuration: Mapping[str, Any]) -> None:
    """Refuses folds of an interrupted run that was otherwise configured; with `overwrite` they are removed."""
    there = [folder for folder in _folders(run) if folder.exists()]
    then, now = read_json(_file(run)), _decides(configuration)
    keys = sorted(key for key in then | now if then.get(key) != now.get(key)) if then else []
    if there and keys and not run.overwrite:
        lines = [f"  {key}: {then.get(key)} then, {now.get(key)} now" for key in keys[:6]]
        raise SystemExit(
            "\n".join([f"error: the folds in {_file(run).parent} were trained otherwise:", *lines])
            + "\nGo on with what they began with, choose another --run.name, or begin anew with --run.overwrite=true."
        )
    for folder in there if keys else ():
        _remove(run, folder)


def check_data(run: RunConfig, fingerprints: Mapping[str, str]) -> None:
    """Refuses folds that were trained on other data, before the next of them or the run itself is trained.

    Args:
        run: One with folds, or one of the folds.
        fingerprints: Of its data, by dataset.

    Raises:
        SystemExit: names the folds' folder.
    """
    place = run.record.parent if run.sweep == SWEEP else _file(run).parent
    folders = sorted(place.glob("fold*of*")) if run.sweep == SWEEP else _folders(run)
    for folder in folders:
        then = {one["name"]: one["fingerprint"] for one in read_json(folder / "record.json").get("datasets", [])}
        if then and then != dict(fingerprints):
            raise SystemExit(
                f"error: {folder} was trained before the data changed. Put the images back, choose another --run.name, or remove "
                f"{place.parent.parent} to train all folds anew."
            )


def kept(run: RunConfig) -> tuple[pd.DataFrame, dict[str, PixelStatistics]]:
    """What the folds found: normal scores as in `normal_scores.csv`, in the order of their ids, and statistics of pixels.

    Raises:
        FileNotFoundError: a fold's record is not there.
    """
    folders = _folders(run)
    for folder in folders:
        if not (folder / normal.FILE).is_file():
            raise FileNotFoundError(
                f"{folder} is not there: the thresholds of this run rest on it. Train the run again."
            )
    table = pd.concat([normal.read(folder) for folder in folders], ignore_index=True)
    parts = [{name: one.statistics for name, one in pixels.read(folder).items()} for folder in folders]
    return table.sort_values("id", ignore_index=True), joined(parts)


def joined(parts: Sequence[Mapping[str, PixelStatistics]]) -> dict[str, PixelStatistics]:
    """Statistics of the pixels of all folds together; percentiles are the folds' means, weighted by their pixels."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        mine = [part[name] for part in parts if name in part]
        counts = np.array([one.count for one in mine], dtype=np.float64)
        rows = np.array([dataclasses.astuple(one)[1:] for one in mine])  # mean, sd, p95, p99, highest
        mean, square, p95, p99 = (
            float(np.average(values, weights=counts))
            for values in (rows[:, 0], rows[:, 0] ** 2 + rows[:, 1] ** 2, rows[:, 2], rows[:, 3])
        )
        sd = max(0.0, square - mean**2) ** 0.5
        found[name] = PixelStatistics(int(counts.sum()), mean, sd, p95, p99, float(rows[:, 4].max()))
    return found


def _folders(run: RunConfig) -> list[Path]:
    """The records of the folds."""
    return [run.work / "runs" / SWEEP / f"fold{number}of{run.folds}" for number in range(1, (run.folds or 0) + 1)]


def _file(run: RunConfig) -> Path:
    return run.work / "runs" / SWEEP / resuming.BEGAN_AS


def _decides(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in deciding(configuration).items() if key != "data.init_args.fold"}


def _remove(run: RunConfig, folder: Path) -> None:
    """A fold's record and its checkpoints."""
    for replaced in (folder, run.work / "work" / SWEEP / folder.name):
        shutil.rmtree(replaced, ignore_errors=True)


def _outdated(run: RunConfig) -> list[Path]:
    """Folds that belong to a finished run which is to be replaced."""
    file = run.record / "record.json"
    if not (run.overwrite and file.is_file()):
        return []
    finished = file.stat().st_mtime
    return [f for f in _folders(run) if f.exists() and (f / "record.json").stat().st_mtime < finished]
