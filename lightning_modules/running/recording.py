"""What a finished run leaves: its record, with scores, normal scores and heat maps beside the numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules import UnifiedDataModule
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.curve import EvaluationCurve
from lightning_modules.callbacks.history import History
from lightning_modules.callbacks.normal_scores import NormalScores
from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.decisions import POOLED, pixels
from lightning_modules.pictures import failures, heatmaps
from lightning_modules.running import checkpoints, decisions, normalisation, refusals, tracking
from lightning_modules.running.settings import RunConfig, provenance, sweep_parameters
from results.aggregator.records import RunRecord, StoredRecord, read_record, write_record

NOTHING_TO_MEASURE = (
    "No test image, so nothing is measured; normal images are scored instead, for predict to compare with."
)
SAME = 1e-6
"""Metrics that differ by less are the same: another order of sums makes as much."""
COLOUR_SCALE = "colour_scale.json"
"""In records of earlier versions: the ends of one colour scale for all categories; see `lightning_modules.decisions.pixels`."""


@dataclass(frozen=True)
class Outcome:
    """A run whose test set is scored.

    Args:
        run: Its name, place and protocol.
        subcommand: `fit`, or `test`, which scores a training's weights again.
        config: The subcommand's complete configuration.
        model, data, trainer: What ran.
        evaluation, normal_scores, history, curve: The callbacks that watched it; no curve unless one was asked for.
        started: When the program did.
        training_seconds: How long the training took, in this process; 0 without one.
        images_per_second: Scored from image files; None if nothing was timed.
    """

    run: RunConfig
    subcommand: str
    config: Any
    model: ReconstructionModule
    data: UnifiedDataModule
    trainer: L.Trainer
    evaluation: Evaluation
    normal_scores: NormalScores
    history: History
    curve: EvaluationCurve | None
    started: datetime
    training_seconds: float
    images_per_second: float | None


def write(outcome: Outcome, dump: Callable[[Any], str]) -> Path:
    """Writes the run's record and tells W&B; returns the record's folder.

    Args:
        outcome: The run.
        dump: Turns a configuration into YAML.
    """
    run, table = outcome.run, outcome.evaluation.result.table
    decided = decisions.judge(
        outcome.normal_scores,
        outcome.evaluation.image_scores,
        run,
        outcome.data.has_test_images,
        outcome.data.fold is not None,
    )
    attachments = _attachments(outcome, decided)
    config_text = dump(_configuration(outcome))
    before = _scored_before(outcome)
    path = write_record(
        Path(run.results) / "runs",
        describe(outcome, before, decided.notes),
        table,
        outcome.history.table() if before is None else before.history,
        config_text,
        attachments=attachments,
        overwrite=run.overwrite,
    )
    if outcome.subcommand == "fit":
        checkpoints.note_recorded(run.work / "checkpoints" / "last.ckpt")
    if outcome.trainer.logger is not None:
        tracking.log_record(path, table, run.upload)
    rank_zero_info(f"Run record: {path}")
    return path


def _attachments(outcome: Outcome, decided: decisions.Judged) -> dict[str, bytes | str]:
    """Scores of test and normal images, failures, anomaly ratios, decisions, and heat maps if they are wanted."""
    scores = outcome.evaluation.image_scores
    failed = failures.find(scores, outcome.data.table)
    attachments: dict[str, bytes | str] = {
        "image_scores.csv": scores.to_csv(index=False),
        failures.FILE: failed.to_csv(index=False, errors="surrogateescape"),
        "anomaly_ratio.csv": outcome.evaluation.anomaly_ratios.to_csv(index=False),
    }
    attachments |= decided.attachments
    if outcome.run.heatmaps and outcome.model.has_map:
        outcome.model.eval().to(outcome.trainer.strategy.root_device)  # the trainer has moved it off the device
        files, index = heatmaps.draw(
            outcome.model,
            outcome.data,
            heatmaps.beside(heatmaps.choose(scores), scores),
            scores,
            decided.scales,
        )
        more, further = failures.draw(outcome.model, outcome.data, failed, decided.scales)
        attachments |= files | more | {"heatmaps/index.csv": heatmaps.index_of(index + further)}
    return attachments


def _configuration(outcome: Outcome) -> Any:
    """The run's configuration, as `test` and `predict` go on from it."""
    config = outcome.config
    config.pop("verbose", None)  # an option of `test` that `predict` does not have
    config.run.overwrite = False  # whoever starts from the record's configuration shall not replace the record
    depths = set(outcome.data.bit_depths.values())
    if len(depths) == 1:  # as inferred from the training images, for those of `predict`
        config.data.init_args.bit_depth = depths.pop()
    return config


def _scored_before(outcome: Outcome) -> StoredRecord | None:
    """The record of the training whose weights `test` scores again, which keeps how they came about."""
    record = outcome.run.record
    return read_record(record) if outcome.subcommand == "test" and record.exists() else None


def compared(record: Path, table: pd.DataFrame) -> str:
    """What a run's weights, scored again, give beside the numbers of its record, which stays as it is; a sentence.

    Args:
        record: The record's folder.
        table: The metrics found now, as in `metrics.csv`.
    """
    keys = ["variant", "scope", "dataset", "category", "metric"]
    both = (
        read_record(record).metrics.merge(table, on=keys, suffixes=("", "_now")).dropna(subset=["value", "value_now"])
    )
    change = (both["value_now"] - both["value"]).abs()
    if both.empty:
        found = "none of them is among the numbers found now"
    elif change.max() < SAME:
        found = f"all {len(both)} numbers that both have are the same"
    else:
        worst = both.loc[change.idxmax()]
        found = (
            f"{int((change >= SAME).sum())} of {len(both)} numbers that both have differ, the most {worst['metric']} of "
            f"{worst['category'] or worst['dataset'] or worst['scope']}: {worst['value']:.6g} in the record, "
            f"{worst['value_now']:.6g} now"
        )
    return f"The record {record} stays as it is: {found}. --run.overwrite=true writes it again."


def describe(outcome: Outcome, before: StoredRecord | None, decided: Sequence[str] = ()) -> RunRecord:
    """What the run was; `before`: the record of the training whose weights were scored again; `decided`: notes on decisions."""
    run, model, data = outcome.run, outcome.model, outcome.data
    result = outcome.evaluation.result
    came_about = _came_about(outcome)
    if before is not None:
        came_about = before.record.provenance | {"scored_again": came_about}
    return RunRecord(
        run=run.name,
        sweep=run.sweep,
        cell=sweep_parameters(),
        method=model.method,
        profile=os.environ.get("PROFILE") or "custom",
        protocol=run.protocol,
        setting=data.setting,
        seed=outcome.config.seed_everything,
        image_size=model.image_size,
        resize=data.resizing,
        backbone=model.extractor.provenance,
        datasets=data.provenance(),
        metrics={"version": result.version, "definitions": result.definitions},
        parameters={"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)},
        provenance=came_about,
        notes=[*_notes(outcome, trained_here=before is None), *decided],
    )


def _notes(outcome: Outcome, trained_here: bool) -> list[str]:
    """What the numbers must be read with."""
    model, data, curve = outcome.model, outcome.data, outcome.curve
    notes = [f"backbone: {note}"] if (note := model.extractor.provenance.get("note")) else []
    notes += normalisation.notes(model, data) + ([model.origin] if model.origin else []) + model.record_notes()
    notes += data.remarks() + outcome.evaluation.notes()
    if trained_here:
        notes += refusals.notes(outcome.config.trainer, outcome.history.batches_seen, model.trained_epochs)
        notes += data.changed_since(outcome.started.timestamp())
    if model.needs_packages:
        versions = (f"{package} {importlib.metadata.version(package)}" for package in model.needs_packages)
        notes.append(f"networks of {', '.join(versions)}")
    if model.standardisation is not None:
        notes.append("feature channels standardised over the training images")
    if model.has_backbone and model.extractor.config.rectified:
        notes.append("levels of the backbone without their negative values")
    if not data.has_test_images:
        notes.append(NOTHING_TO_MEASURE)
    if data.left_out:
        notes.append(f"test_subset {data.test_subset}: {len(data.left_out)} test images are not evaluated")
    if curve is not None and curve.best is not None:
        notes.append(f"weights of epoch index {curve.best[1]}, chosen on the test set by {curve.select}")
    return notes


def _came_about(outcome: Outcome) -> dict[str, Any]:
    """Where, when and how the run's numbers came about."""
    trainer, epochs = outcome.trainer, outcome.history.epochs_seen
    device = trainer.strategy.root_device
    return provenance(device, outcome.model.needs_packages) | {
        "started": outcome.started.isoformat(timespec="seconds"),
        "wall_seconds": round((datetime.now().astimezone() - outcome.started).total_seconds(), 1),
        "epochs": outcome.model.trained_epochs,
        "seconds_per_epoch": round(outcome.training_seconds / max(1, epochs), 3),
        "train_seconds": round(outcome.training_seconds, 1),
        "images_per_second": outcome.images_per_second and round(outcome.images_per_second, 2),
        "peak_memory_bytes": _peak_memory(device),
        "world_size": trainer.world_size,
        "effective_batch_size": outcome.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
    }


def colour_scale(record: Path) -> tuple[float, float] | None:
    """Ends of one colour scale for all categories of a run; None if the run has no record, or its method no map."""
    kept = pixels.read(record)
    if (found := kept.get(POOLED) or (next(iter(kept.values())) if len(kept) == 1 else None)) is not None:
        return found.low, found.high
    file = record / COLOUR_SCALE
    return tuple(json.loads(file.read_text())) if file.is_file() else None


def _peak_memory(device: torch.device) -> int:
    """Largest memory use so far in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
