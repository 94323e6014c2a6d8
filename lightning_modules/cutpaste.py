"""CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, Li et al., CVPR 2021, arXiv:2104.04015."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import SGD

from datamodules.anomalies.cutpaste import CutPaste as Views
from datamodules.anomalies.cutpaste import CutPasteConfig
from datamodules.dataset import TrainingViews
from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.own_trunk import OwnTrunkModule
from models import cutpaste as networks
from models.head import HeadConfig, ScoredMaps
from models.optimizers import HalfCosine
from models.trunk import build_trunk

PAPER_STEPS = 65_536
"""256 epochs of 256 steps."""


class CutPaste(OwnTrunkModule):
    """CutPaste with the paper's setting as defaults: 3-way, ResNet18 from scratch, 32 images in three versions a step.

    The paper trains one model per category (`data.init_args.setting=per_category`), and prints the mean score of five of
    them in the ensemble that UniAD's table quotes (96.1 image AUROC on MVTec AD); this is the single model (95.2).
    The trunk is trained, so no feature is cached. This is the image-level model: it has no map, and pixels are not measured.

    Args:
        head: Not used, since there is no map.
        optimizer: SGD, momentum 0.9, L2 term 3e-5 on everything.
        lr_scheduler: Half a cosine over the training's steps; as in the reimplementation its first step counts twice.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels.
        trunk: timm model whose pooled numbers are the embedding.
        start: `scratch`, or weights to start from: `imagenet` (timm's), `packaged` or a file. The paper starts from ImageNet
            only in its transfer experiment, with an EfficientNet-B4.
        frozen_steps: Steps in which the trunk's weights rest, while its batch norm does not (20 in the reimplementation
            where it starts from ImageNet).
        cutpaste: What is pasted.
        head_layers, density: See :class:`models.cutpaste.CutPasteNet`.
    """

    method = "cutpaste"
    recipe = Recipe(resize="pil_bilinear", batch_size=32, max_epochs=PAPER_STEPS, max_steps=PAPER_STEPS, drop_last=True)
    has_map = False
    network: networks.CutPasteNet

    def __init__(
        self,
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.03, momentum=0.9, weight_decay=3e-5),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: HalfCosine(optimizer),
        lr_interval: Interval = "step",
        image_size: ImageSize = 256,
        trunk: str = "resnet18",
        start: str = "scratch",
        frozen_steps: int = 0,
        cutpaste: CutPasteConfig = CutPasteConfig(),
        head_layers: Sequence[int] = (512, 128),
        density: networks.Density = "gaussian",
    ) -> None:
        if frozen_steps < 0:
            raise ValueError(f"frozen_steps must not be negative, found {frozen_steps}.")
        net, extractor = build_trunk(trunk, start)
        super().__init__(extractor, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.cutpaste, self.frozen_steps = cutpaste, frozen_steps
        self.network = networks.CutPasteNet(net, net.num_features, cutpaste.classes, head=head_layers, density=density)
        self.shrinkage = math.nan

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_views(self) -> TrainingViews:
        return Views(self.cutpaste)

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropy over the views of all images."""
        return self.network.loss([batch[name] for name in ("image", "pasted", "scar") if name in batch])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """While the trunk rests, neither weight decay nor momentum moves it."""
        if self.global_step < self.frozen_steps:
            for parameter in self.network.trunk.parameters():
                parameter.grad = None

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        self.shrinkage = self.network.fit(self.of_all_images(self.network.embed))

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """Image scores; the map is 0 everywhere, and nothing measures it."""
        images = batch["image"].float()
        with torch.autocast(images.device.type, enabled=False):
            scores = self.network.score(self.network.embed(images)).float()
        return {"": ScoredMaps(images.new_zeros(len(images), *self.image_size), scores, [])}

    def record_notes(self) -> list[str]:
        steps = f"{self.trained_steps:,} steps (the paper: {PAPER_STEPS:,})"
        return [
            self.training_views().describe(),
            f"single model, not the paper's ensemble of five; {steps}; trunk {self.extractor.provenance['name']} from "
            f"{self.extractor.provenance['weights']}",
            f"embeddings before the head, density {self.network.density}"
            + ("" if math.isnan(self.shrinkage) else f", shrinkage {self.shrinkage:.3g}"),
            "no map: image scores only",
        ]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["shrinkage"] = self.shrinkage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.shrinkage = checkpoint["shrinkage"]
