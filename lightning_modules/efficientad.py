"""EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies, Batzner et al., WACV 2024, arXiv:2303.14535."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam

from datamodules.anomalies.sources import photographs
from datamodules.errors import DataError
from datamodules.images import read_image, resize_image
from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.metrics.sync import Group
from lightning_modules.own_trunk import OwnTrunkModule
from models import efficientad
from models.head import HeadConfig, ScoredMaps
from models.optimizers import Drops
from models.trunk import NoBackbone
from models.weight_files import file_sha256, read_state_dict

GREY = 0.3
"""Probability of a penalty image to lose its colours."""


class EfficientAD(OwnTrunkModule):
    """EfficientAD with the paper's setting as defaults: 70,000 steps of one image, Adam 1e-4, a tenth of it for the last 5 %.

    The paper trains one model per category (`data.init_args.setting=per_category`); 70,000 steps are 19 passes over all of
    MVTec AD. anomalib's schedule goes on once per epoch, so that its rate never falls; here it goes on per step.

    Without a teacher there is no EfficientAD, and its weights are no one's to draw: give the file. The record names its hash, and
    says when there are no penalty images.

    Args:
        teacher: File of the teacher's weights, of the same size: anomalib's release page (`efficientad_pretrained_weights`) and
            the third party's repository (`models/teacher_small.pth`) have them. Needed for training alone.
        penalty: Folder of images on which the student is to say nothing, searched recursively: ImageNet in the paper, Imagenette
            in anomalib. None trains without, which the third party allows.
        head: Mean of both maps, resized without aligned corners; image score = maximum.
        optimizer: Adam with weight decay 1e-5 as an L2 term, of student and autoencoder.
        lr_scheduler: See above; by the share of steps.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, at least 256.
        size: `small` or `medium`, of teacher and student.
    """

    method = "efficientad"
    recipe = Recipe(resize="pil_bilinear", batch_size=1, max_epochs=70_000, max_steps=70_000)
    needs_packages: ClassVar[Mapping[str, str]] = {"anomalib": "make baselines"}
    needs_files: ClassVar[tuple[str, ...]] = ("teacher",)
    uncached = "teacher, student and autoencoder read pixels"
    map_names = efficientad.BRANCHES
    network: efficientad.EfficientAD

    def __init__(
        self,
        teacher: str | None = None,
        penalty: str | None = None,
        head: HeadConfig = HeadConfig(fusion="mean", align_corners=False, image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, weight_decay=1e-5, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: Drops(
            optimizer, first=0.95, second=1.0, ratio=0.1
        ),
        lr_interval: Interval = "step",
        image_size: ImageSize = 256,
        size: efficientad.Size = "small",
    ) -> None:
        super().__init__(
            NoBackbone("none (patch description network)"), head, optimizer, image_size, lr_scheduler, lr_interval
        )
        if teacher is None:
            raise ValueError(
                "EfficientAD needs a trained teacher, and no file of its weights is named: give --model.init_args.teacher=<path> "
                "(teacher_small.pth or teacher_medium.pth of nelson1425/EfficientAD, or anomalib's)."
            )
        if min(self.image_size) < efficientad.SMALLEST:
            raise ValueError(
                f"image_size is {self.image_size}; EfficientAD's autoencoder needs images of at least 256 pixels a side."
            )
        self.network = efficientad.EfficientAD(size=size)
        self.teacher, self.penalty = teacher, penalty
        self.notes = {"teacher": "", "penalty": "", "quantiles": ""}
        self._others: list[str] = []

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._others = photographs(self.penalty) if self.penalty is not None else []
        self.notes["penalty"] = (
            f"penalty on {len(self._others)} images of a folder" if self._others else "no penalty on ImageNet images"
        )
        if self.network.statistics.groups:
            return  # resumed: teacher and statistics came with the checkpoint
        try:
            self.network.load_teacher(read_state_dict(self.teacher), f"The teacher's file {self.teacher}")
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error
        self.notes["teacher"] = f"teacher from a file (sha256 {file_sha256(self.teacher)[:12]})"
        teacher, statistics = self.network.teacher.to(self.device), self.network.statistics
        with torch.autocast(self.device.type, enabled=False):
            for batch in self.training_images():
                features = teacher(self.pixels(batch["image"]))
                statistics.update(features, ["all"] * len(features))
        parts = Group().gather_objects(statistics.moments())
        statistics.reset()
        for part in parts:
            statistics.merge(part)
        statistics.finish()

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            losses = self.network.losses(self.pixels(batch["image"]), self._penalty_images(len(batch["label"])))
        self.keep({f"loss_{name}": loss.detach() for name, loss in losses.items()}, batch)
        return torch.stack(list(losses.values())).sum()

    def _penalty_images(self, count: int) -> Tensor | None:
        """Random penalty images, (count, 3, H, W) in [0, 1]: the centre of twice the size, a third of them grey."""
        if not self._others:
            return None
        height, width = self.image_size
        images = []
        for number in torch.randint(len(self._others), (count,)).tolist():
            image = resize_image(read_image(self._others[number]), (2 * height, 2 * width), "pil_bilinear")
            image = image[height // 2 : height // 2 + height, width // 2 : width // 2 + width]
            if torch.rand(()) < GREY:
                grey = image @ np.array([0.299, 0.587, 0.114])
                image = np.repeat(grey[..., None], 3, axis=2)
            images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255))
        return torch.stack(images).to(self.device)

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.teacher, self.network.student, self.network.autoencoder]

    # ---- scale and score ---------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        """Quantiles of both maps over held-out normal images; over the training images if none are held out."""
        data = self.trainer.datamodule
        held_out = data.normal_split == "val"
        own: dict[int, list[Tensor]] = {}
        for batch in data.val_dataloader() if held_out else data.train_images():
            batch = self.trainer.strategy.batch_to_device(batch)
            maps = [part.cpu() for part in self.network(self.pixels(batch["image"]))]
            own |= dict(zip(batch["id"].tolist(), zip(*maps, strict=True), strict=True))
        images = {number: maps for part in Group().gather_objects(own) for number, maps in part.items()}
        values = {
            branch: np.concatenate([images[number][place].numpy().ravel() for number in sorted(images)])
            for place, branch in enumerate(efficientad.BRANCHES)
        }
        found = {
            branch: {q: float(np.quantile(numbers, q)) for q in efficientad.QUANTILES}
            for branch, numbers in values.items()
        }
        self.network.quantiles.set({"all": found})
        kind = "held-out normal images" if held_out else "training images, none being held out"
        self.notes["quantiles"] = f"maps on the scale of {len(images)} {kind}"

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        with torch.autocast(self.device.type, enabled=False):
            maps = self.network(self.pixels(batch["image"]))
        affine = tuple(part.to(maps[0]) for part in self.network.scale())
        padded = [efficientad.padded(part) for part in maps]
        return {"": self.head.score(padded, self.image_size, level_affine=affine)._replace(level_maps=maps)}

    def record_notes(self) -> list[str]:
        return [note for note in self.notes.values() if note]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["efficientad"] = dict(self.notes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.notes = dict(checkpoint["efficientad"])
