"""The files of a prediction."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image

from datamodules.problems import number_of
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.normal_scores import p_values
from lightning_modules.metrics.sync import Group
from lightning_modules.running import refusals
from models.head import ScoredMaps
from results.common.shown import printable

LONGEST = 200
"""Bytes of an image's name that its files' names take over; file systems allow 255 in all."""


class Predictions(L.Callback):
    """Writes what `predict` finds: `scores.csv`, the raw float32 maps (`.npy`) and heat maps over the images.

    All heat maps share one colour scale, so that a normal image stays dark. `scores.csv` has a p-value beside each score
    where the run's record holds scores of normal images; an image that could not be read has no score but a `reason`.
    The files of an earlier prediction stay until all of these are written.

    Args:
        folder: Where the files go.
        scale: Ends of the colour scale; None takes median and maximum of the first batch.
        normal: Scores of normal images, see `lightning_modules.callbacks.normal_scores`.

    Attributes:
        failed: Images that could not be read, as lines for people; after the prediction.
    """

    def __init__(
        self, folder: Path, scale: tuple[float, float] | None = None, normal: pd.DataFrame | None = None
    ) -> None:
        self.folder = folder
        self.range = scale
        self.normal = normal
        self.failed: list[str] = []
        self._new = folder.with_name(f"{folder.name}.new")
        self._rows: list[tuple[int, str, float, str]] = []

    def on_predict_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        if trainer.is_global_zero:  # a broken-off prediction's files would mix with these
            shutil.rmtree(self._new, ignore_errors=True)
            self._new.mkdir(parents=True)
            height, width = module.image_size
            images = len(trainer.datamodule.predict_dataloader().dataset)
            # A pixel of a raw map has four bytes, one of a heat map about one and a half.
            refusals.room(self._new, int(5.5 * height * width) * images, f"maps of {number_of(images, 'image')}")
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
        from lightning_modules.pictures.heatmaps import overlay, to_rgb

        maps = outputs.maps.float().cpu().numpy()
        read = [n for n, error in enumerate(batch["error"]) if not error]
        if read:
            self.range = self.range or (float(np.median(maps[read])), float(maps[read].max()))
        images = to_rgb(batch["image"], trainer.datamodule.mean, trainer.datamodule.std)
        for n, (path, error) in enumerate(zip(batch["path"], batch["error"], strict=True)):
            number = int(batch["id"][n])
            self._rows.append((number, path, np.nan if error else float(outputs.image_scores[n]), error))
            if not error and module.has_map:
                name = f"{number:06d}-{os.fsdecode(os.fsencode(Path(path).stem)[:LONGEST])}"
                np.save(self._new / f"{name}.npy", maps[n])
                Image.fromarray(overlay(images[n], maps[n], *self.range)).save(self._new / f"{name}.jpg", quality=90)

    def on_predict_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        rows = [row for part in Group().gather_objects(self._rows) for row in part]
        table = pd.DataFrame(rows, columns=["id", "image", "image_score", "reason"])
        table = table.drop_duplicates("id").sort_values("id", ignore_index=True).drop(columns="id")
        failed = table[table.reason != ""]
        self.failed = [printable(reason) for reason in failed.reason]
        what = "scores, raw maps and heat maps" if module.has_map else "scores (the method has no map)"
        said = f"{number_of(len(table), 'image')}: {what} are in {self.folder}"
        if self.normal is not None:
            p = p_values(table.image_score.to_numpy(), self.normal.image_score.to_numpy())
            table.insert(2, "p_value", np.where(table.reason == "", p, np.nan))
            highest = int((table.image_score > self.normal.image_score.max()).sum())
            kind = "held-out normal" if (self.normal.split == "val").all() else "training"
            said += f"\nImages that score higher than all of the run's {len(self.normal)} {kind} images: {highest}."
            if kind == "training":
                said += (
                    " Unseen normal images score higher; a run with --data.init_args.holdout=0.1 measures by how much."
                )
        if failed.empty:
            table = table.drop(columns="reason")
        if trainer.is_global_zero:
            table.to_csv(self._new / "scores.csv", index=False, errors="surrogateescape")
            self._replace()
        rank_zero_info(said)

    def _replace(self) -> None:
        """Puts the new files into the place of the earlier ones, beside which other files may lie."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (*self.folder.glob("[0-9]" * 6 + "-*"), *self.folder.glob("scores*.csv")):
            file.unlink(missing_ok=True)
        for file in self._new.iterdir():
            file.replace(self.folder / file.name)
        self._new.rmdir()
