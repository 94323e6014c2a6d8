"""Small companions of a training: its history, its progress file, the files of a prediction."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image

from datamodules.problems import number_of
from lightning_modules.base import ReconstructionModule
from lightning_modules.normal_scores import p_values
from models.head import ScoredMaps


class EpochSeed(L.Callback):
    """Draws dropout, noise and masks of an epoch from (seed, epoch, process) alone.

    A resumed run then equals an uninterrupted one, and nothing that happens between epochs (a curve, the building of a
    cache) changes the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        place = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))


class Compile(L.Callback):
    """Compiles what a method computes in every step, as soon as it is built.

    Args:
        mode: Of ``torch.compile``; None is its default.
    """

    def __init__(self, mode: str | None = None) -> None:
        self.mode = mode

    def on_fit_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        for part in module.compiled_parts():
            part.compile(mode=self.mode)


class History(L.Callback):
    """Keeps every metric logged at the end of an epoch; survives a resume through the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, str, float]] = []
        self.epochs_seen = 0

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.epochs_seen += 1
        for name, value in trainer.callback_metrics.items():
            self.add(trainer, name, float(value))

    def add(self, trainer: L.Trainer, name: str, value: float) -> None:
        """Adds one point of a curve at the present epoch."""
        self.rows.append((trainer.current_epoch, trainer.global_step, name, value))

    def table(self) -> pd.DataFrame:
        """Long table: epoch (from 0), step (optimiser steps), metric, value."""
        return pd.DataFrame(self.rows, columns=["epoch", "step", "metric", "value"])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state["rows"]]


class Progress(L.Callback):
    """Writes ``{"epoch": done, "epochs": all, "metrics": {...}}`` to a file after every epoch, for the sweep runner."""

    def __init__(self, path: Path, history: History) -> None:
        self.path = path
        self.history = history

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {name: value for _, _, name, value in self.history.rows}
        write_progress(self.path, trainer.current_epoch + 1, trainer.max_epochs, metrics)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and self.path.is_file():
            run = self.path.parent.name
            rank_zero_info(f"Interrupted. The same options and --run.name={run} (make: RUN={run}) go on from here.")


class PlainProgress(L.Callback):
    """Where there is no terminal for a progress bar: a line on the first epoch, on the last, and every `seconds` between."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._begun = self._printed = 0.0
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        now, done = time.monotonic(), trainer.current_epoch + 1
        if now - self._printed < self.seconds and done < trainer.max_epochs:
            return
        self._printed = now
        seconds = round((now - self._begun) / (done - self._first) * (trainer.max_epochs - done))
        time_left = f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
        left = f"  about {time_left} left" if done < trainer.max_epochs else ""
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f"  train/loss {float(loss):.4g}"
        rank_zero_info(f"epoch {done} of {trainer.max_epochs}{shown}{left}")


def write_progress(path: Path, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
    """Writes the progress file of the sweep runner."""
    write_json(path, {"epoch": epoch, "epochs": epochs, "metrics": dict(metrics)})


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


class Predictions(L.Callback):
    """Writes what ``predict`` finds: ``scores.csv``, the raw float32 maps (``.npy``) and heat maps over the images.

    All heat maps share one colour scale, so that a normal image stays dark. ``scores.csv`` has a p-value beside each score
    where the run's record holds scores of normal images. The files of an earlier prediction go.

    Args:
        folder: Where the files go.
        scale: Ends of the colour scale; None takes median and maximum of the first batch.
        normal: Scores of normal images, see :mod:`lightning_modules.normal_scores`.
    """

    def __init__(
        self, folder: Path, scale: tuple[float, float] | None = None, normal: pd.DataFrame | None = None
    ) -> None:
        self.folder = folder
        self.range = scale
        self.normal = normal
        self._scores: list[tuple[str, float]] = []

    def on_predict_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        if trainer.is_global_zero:  # an earlier prediction's files would mix with these
            for file in (*self.folder.glob("[0-9]" * 6 + "-*"), *self.folder.glob("scores*.csv")):
                file.unlink(missing_ok=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        module: ReconstructionModule,
        outputs: ScoredMaps,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        from lightning_modules.heatmaps import overlay, to_rgb

        maps = outputs.maps.float().cpu().numpy()
        self.range = self.range or (float(np.median(maps)), float(maps.max()))
        images = to_rgb(batch["image"], trainer.datamodule.mean, trainer.datamodule.std)
        self.folder.mkdir(parents=True, exist_ok=True)
        for n, path in enumerate(batch["path"]):
            name = f"{int(batch['id'][n]):06d}-{Path(path).stem}"
            np.save(self.folder / f"{name}.npy", maps[n])
            Image.fromarray(overlay(images[n], maps[n], *self.range)).save(self.folder / f"{name}.jpg", quality=90)
            self._scores.append((path, float(outputs.image_scores[n])))

    def on_predict_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        table = pd.DataFrame(self._scores, columns=["image", "image_score"])
        said = f"{number_of(len(table), 'image')}: scores, raw maps and heat maps are in {self.folder}"
        if self.normal is not None:
            table["p_value"] = p_values(table.image_score.to_numpy(), self.normal.image_score.to_numpy())
            highest = int((table.image_score > self.normal.image_score.max()).sum())
            kind = "held-out normal" if (self.normal.split == "val").all() else "training"
            said += f"\nThose that score higher than each of the run's {len(self.normal)} {kind} images: {highest}."
            if kind == "training":
                said += " Unseen normal images score higher; a run with --data.init_args.holdout=0.1 knows by how much."
        table.to_csv(self.folder / f"scores{suffix}.csv", index=False)
        rank_zero_info(said)
