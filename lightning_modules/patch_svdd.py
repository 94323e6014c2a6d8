"""Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, Yi and Yoon, ACCV 2020, arXiv:2006.16067."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Adam

from datamodules.dataset import TrainingViews
from datamodules.patch_pairs import Clip, PatchPairs
from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.fitted import PatchStore, all_vectors
from lightning_modules.metrics.sync import Group
from lightning_modules.own_trunk import OwnTrunkModule
from models import patch_svdd
from models.head import HeadConfig, ScoredMaps
from models.trunk import NoBackbone


class PatchSVDD(OwnTrunkModule):
    """Patch SVDD with the released setting as defaults: 256 pixels, patches of 64 and 32, 299 epochs of 100 passes.

    The paper trains one model per category (`data.init_args.setting=per_category`). The encoder is trained from scratch,
    so no feature is cached. Lambda, which the paper suits to each category without saying how, is one number here; too
    large a one lets all embeddings collapse. The weights of the last epoch count; which epoch the paper printed is not known.

    Nearest neighbours are exact, and the banks are compared from their mean: embeddings nearly collapse by design, and the
    plain product of matrices would rank them at random. The released search for 32 pixels is approximate.

    Args:
        head: Of the maps of 64 and 32 pixels: their product, not smoothed; image score = maximum. `fusion=sum` is another
            released reading.
        optimizer: Adam, of encoder and classifiers together.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 16 and at least 64, so that patches cover every pixel.
        near_weight: Lambda, the weight of near patches' distance: 1e-3 in the released README, 1 in its program.
        position_clip: What becomes of a second patch that leaves the image: `kept` (moved back, released) or `redraw`.
        score_sides: Also score each patch size alone, as variants `patch_size=64` and `patch_size=32`.
        memory_gb: GB of embeddings of each size that stay in a process's memory while they are collected; more go to a file.
        dim: See `models.patch_svdd.PatchSVDD`.
        widths: See `dim`.
        hidden: See `dim`.
        last_weight: See `dim`.
    """

    method = "patch_svdd"
    recipe = Recipe(resize="pil_bilinear", batch_size=64, max_epochs=299, repeat=100)
    network: patch_svdd.PatchSVDD

    def __init__(
        self,
        head: HeadConfig = HeadConfig(fusion="product", image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        near_weight: float = 1e-3,
        position_clip: Clip = "kept",
        score_sides: bool = False,
        memory_gb: float = 8.0,
        dim: int = 64,
        widths: Sequence[int] = (32, 64, 128, 128, 64, 32, 32),
        hidden: int = 128,
        last_weight: patch_svdd.LastWeight = "fixed",
    ) -> None:
        super().__init__(NoBackbone("none (8 convolutions)"), head, optimizer, image_size, lr_scheduler, lr_interval)
        if any(side % 16 or side < 64 for side in self.image_size):
            raise ValueError(
                f"image_size is {self.image_size}; Patch SVDD's patches cover images whose sides are multiples of 16, at least "
                "64."
            )
        if near_weight < 0 or memory_gb < 0:
            raise ValueError(f"near_weight and memory_gb must not be negative, found {near_weight} and {memory_gb}.")
        self.near_weight, self.score_sides, self.memory_gb = near_weight, score_sides, memory_gb
        self.views = PatchPairs(self.image_size, patch_svdd.SIDES, position_clip)
        self.network = patch_svdd.PatchSVDD(
            self.image_size, dim=dim, widths=widths, hidden=hidden, last_weight=last_weight
        )
        self.map_names = ("64 pixels", "32 pixels")

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_views(self) -> TrainingViews:
        return self.views

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """The mean image of all training images, the same on every process."""
        self.network.to(self.device)
        if not self.network.has_mean:
            self._measure_mean()

    def _measure_mean(self) -> None:
        total, count = np.zeros((3, *self.image_size)), 0
        for batch in self.training_images():
            # Levels are whole numbers, so that the order of the images changes nothing.
            total += (self.pixels(batch["image"]) * 255).round().double().sum(0).cpu().numpy()
            count += len(batch["image"])
        group = Group()
        total, count = group.sum(total), int(group.sum(np.array([count]))[0])
        self.network.mean_image.copy_(torch.from_numpy(total / count / 255))

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropy of directions plus lambda times the distance of near patches, over both sizes."""
        directions, near = [], []
        for side in patch_svdd.SIDES:
            corners = batch[f"corners_{side}"]
            position, close = (
                self.network.centred(self.pixels(batch[f"{kind}_{side}"]), corners[:, number])
                for number, kind in enumerate(("position", "near"))
            )
            direction, distance = self.network.losses(position, batch[f"label_{side}"], close)
            directions.append(direction)
            near.append(distance)
        direction, distance = torch.stack(directions).sum(), torch.stack(near).sum()
        if self.training:
            self.keep({"loss_position": direction.detach(), "loss_near": distance.detach()}, batch)
        return direction + self.near_weight * distance

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        """Puts the embeddings of all training patches into the banks, in the order of the images' ids."""
        if not self.network.has_mean:  # imported weights
            self.network.to(self.device)
            self._measure_mean()
        group, folder = Group(), Path(self.trainer.default_root_dir)
        images = self.trainer.datamodule.training_samples
        stores: dict[int, PatchStore] = {}
        for batch in self.training_images():
            for side, vectors in self.network.embed(self.pixels(batch["image"])).items():
                patches = vectors.shape[1] * vectors.shape[2]
                if side not in stores:
                    file = folder / f"patches-{side}-{group.rank}.npy"
                    own = -(-images // group.size)
                    stores[side] = PatchStore(own, patches, self.network.dim, file, int(self.memory_gb * 1e9))
                stores[side].add(vectors.flatten(1, 2), batch["id"].tolist(), batch["category"])
        for side, bank in self.network.banks.items():
            bank.set(all_vectors(stores[side], group))
            stores[side].close()

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        images = batch["image"]
        with torch.autocast(images.device.type, enabled=False):
            maps = list(self.network(self.pixels(images)).values())
        found = {"": self.head.score(maps, self.image_size)}
        if self.score_sides:
            for number, side in enumerate(patch_svdd.SIDES):
                found[f"patch_size={side}"] = self.head.score(maps, self.image_size, selection=[number])
        return found

    def record_notes(self) -> list[str]:
        banks = " and ".join(f"{len(bank):,} of {side} pixels" for side, bank in self.network.banks.items())
        return [
            f"lambda {self.near_weight:g}; {self.trained_steps:,} steps; last epoch; second patches beyond the border: "
            f"{self.views.clip}; last classifier weight: {self.network.cls_64.last_weight}",
            f"exact nearest neighbours among all training patches ({banks}); mean image of all training images; maps fused "
            f"by {self.head.config.fusion}",
        ]
