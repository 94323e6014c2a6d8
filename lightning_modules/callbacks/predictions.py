"""The files of a prediction."""

from __future__ import annotations

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
from models.head import ScoredMaps


class Predictions(L.Callback):
    """Writes what ``predict`` finds: ``scores.csv``, the raw float32 maps (``.npy``) and heat maps over the images.

    All heat maps share one colour scale, so that a normal image stays dark. ``scores.csv`` has a p-value beside each score
    where the run's record holds scores of normal images. The files of an earlier prediction go.

    Args:
        folder: Where the files go.
        scale: Ends of the colour scale; None takes median and maximum of the first batch.
        normal: Scores of normal images, see :mod:`lightning_modules.callbacks.normal_scores`.
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
        from lightning_modules.pictures.heatmaps import overlay, to_rgb

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
