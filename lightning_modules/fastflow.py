"""FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows, Yu et al., arXiv:2111.07677."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Adam

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models import fastflow
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.reconstruction import Pair


class FastFlow(ReconstructionModule):
    """FastFlow with the third-party code's setting as defaults: 500 epochs, Adam 1e-3, batch 32, the last epoch's model.

    The paper trains one model per category (`data.init_args.setting=per_category`). For ResNet18 the third party has
    `conv3x3_only`. Its backbones' weights are not known for certain; here they are torchvision's.

    Args:
        backbone: WideResNet50-2, levels 2 to 4 (strides 4, 8 and 16).
        head: Mean over the levels, resized without aligned corners; image score = maximum. Its distance has no meaning here.
        optimizer: Adam with weight decay 1e-5 as an L2 term, of all parameters.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels; a trained network takes no other.
        map: `energy`, or `probability` as released, which saturates; see `models.fastflow.level_maps`.
        network: Arguments of `models.fastflow.FastFlow`.
    """

    method = "fastflow"
    recipe = Recipe(resize="pil_bilinear", batch_size=32, max_epochs=500)
    needs_packages: ClassVar[Mapping[str, str]] = {"anomalib": "make baselines", "FrEIA": "make baselines"}
    reconstructs: ClassVar[bool] = False
    network: fastflow.FastFlow

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.tv_in1k", (2, 3, 4)),
        head: HeadConfig = HeadConfig(fusion="mean", align_corners=False, image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-3, weight_decay=1e-5, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        map: fastflow.Map = "energy",
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if map not in get_args(fastflow.Map):
            raise ValueError(f'map is "{map}"; choose one of {", ".join(get_args(fastflow.Map))}.')
        self.network = fastflow.FastFlow(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
        self.map = map

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        return fastflow.negative_log_likelihood(self._flowed(batch))

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        return {"": self.head.score(fastflow.level_maps(self._flowed(batch), self.map), self.image_size)}

    def _flowed(self, batch: Mapping[str, Any]) -> list[fastflow.Flowed]:
        """In float32 also under autocast: sums of a million values overflow in half precision."""
        with torch.autocast(self.device.type, enabled=False):
            return self.network(self.features(batch))

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        raise ValueError("FastFlow reconstructs nothing: it gives likelihoods of features.")
