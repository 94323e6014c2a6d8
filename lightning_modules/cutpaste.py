"""CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, Li et al., CVPR 2021, arXiv:2104.04015."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import SGD

from datamodules.anomalies.cutpaste import CutPaste as Views
from datamodules.anomalies.cutpaste import CutPasteConfig
from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.metrics.sync import Group
from lightning_modules.own_trunk import OwnTrunkModule
from models import cutpaste as networks
from models.head import HeadConfig, ScoredMaps
from models.layers.gaussian import Moments, merged, moments
from models.layers.receptive import Reception, spread
from models.layers.tracing import in_parts
from models.optimizers import HalfCosine
from models.trunk import build_trunk

PAPER_STEPS = 65_536
"""256 epochs of 256 steps."""
WINDOWS = 512
"""Windows that go through the network at a time."""


class CutPaste(OwnTrunkModule):
    """CutPaste with the paper's setting as defaults: 3-way, ResNet18 from scratch, 32 images in three versions a step.

    The paper trains one model per category (`data.init_args.setting=per_category`), and prints the mean score of five of
    them in the ensemble that UniAD's table quotes (96.1 image AUROC on MVTec AD); this is the single model (95.2).
    The trunk is trained, so no feature is cached. The default is the image-level model: it has no map, and pixels are not
    measured. The paper's patch model, `localisation=patches`, is trained on random crops and scores every window of that size;
    nothing of it was released. Its map takes a Gaussian over each window, whose sigma the paper does not name, divided by
    that of ones; its image score is the highest window's.

    Args:
        head: Smoothing of the patch model's map, none by default.
        optimizer: SGD, momentum 0.9, L2 term 3e-5 on everything.
        lr_scheduler: Half a cosine over the training's steps; as in the reimplementation its first step counts twice.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels.
        trunk: timm model whose pooled numbers are the embedding; the tag after its dot matters for `start=imagenet`.
        start: `scratch`, or weights to start from: `imagenet` (timm's), `packaged` or a file. The paper starts from ImageNet
            only in its transfer experiment, with an EfficientNet-B4.
        frozen_steps: Steps in which the trunk's weights rest, while its batch norm does not (20 in the reimplementation
            where it starts from ImageNet).
        cutpaste: What is pasted.
        localisation: `none`, the image-level model, or `patches`.
        patch_side: Of the patch model's windows, in pixels: 2,401 of them at 256 pixels.
        patch_stride: See `patch_side`.
        upsampling_std: Of the Gaussian that makes the patch model's map, in pixels.
        head_layers: See `models.cutpaste.CutPasteNet`.
        density: See `head_layers`.
    """

    method = "cutpaste"
    recipe = Recipe(resize="pil_bilinear", batch_size=32, max_epochs=PAPER_STEPS, max_steps=PAPER_STEPS, drop_last=True)
    has_map = False
    network: networks.CutPasteNet

    def __init__(
        self,
        head: HeadConfig = HeadConfig(image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.03, momentum=0.9, weight_decay=3e-5),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: HalfCosine(optimizer),
        lr_interval: Interval = "step",
        image_size: ImageSize = 256,
        trunk: str = "resnet18.tv_in1k",
        start: str = "scratch",
        frozen_steps: int = 0,
        cutpaste: CutPasteConfig = CutPasteConfig(),
        head_layers: Sequence[int] = (512, 128),
        density: networks.Density = "gaussian",
        localisation: Literal["none", "patches"] = "none",
        patch_side: int = 64,
        patch_stride: int = 4,
        upsampling_std: float = 12.0,
    ) -> None:
        if localisation not in ("none", "patches"):
            raise ValueError(f'localisation is "{localisation}"; choose none or patches.')
        if localisation == "patches" and density == "kernels":
            raise ValueError(
                "density=kernels would keep the embedding of every window of every training image: with localisation=patches "
                "use density=gaussian."
            )
        if patch_side < 1 or patch_stride < 1 or upsampling_std <= 0:
            raise ValueError(
                f"patch_side, patch_stride and upsampling_std must be positive, found {patch_side}, {patch_stride} and "
                f"{upsampling_std}."
            )
        if frozen_steps < 0:
            raise ValueError(f"frozen_steps must not be negative, found {frozen_steps}.")
        net, extractor = build_trunk(trunk, start)
        super().__init__(extractor, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.cutpaste, self.frozen_steps = cutpaste, frozen_steps
        self.network = networks.CutPasteNet(net, net.num_features, cutpaste.classes, head=head_layers, density=density)
        self.shrinkage = math.nan
        self.localisation, self.has_map = localisation, localisation == "patches"
        self.untiled = "localisation=patches scores windows of whole images already" if self.has_map else ""
        self.reception, self.upsampling_std = Reception(patch_stride, patch_side, (patch_side - 1) / 2), upsampling_std
        if self.has_map and min(self.image_size) < patch_side:
            raise ValueError(f"patch_side is {patch_side}, but images are {self.image_size}: give smaller patches.")

    @classmethod
    def starts_from(cls, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
        return None if arguments["start"] == "scratch" else (arguments["trunk"], arguments["start"])

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_views(self) -> Views:
        return Views(self.cutpaste, self.reception.field if self.has_map else None)

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
        if self.has_map:
            self._fit_windows()
        else:
            self.shrinkage = self.network.fit(self.of_all_images(self.network.embed))

    def _windows(self, images: Tensor) -> Tensor:
        """Embeddings of all windows of images, float64 (B, I, J, C), one by one: padding makes the whole image another."""
        stride, side, _ = self.reception
        windows = images.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)
        found = [self.network.embed(part) for part in in_parts(windows.flatten(0, 2), WINDOWS)]
        return torch.cat(found).view(*windows.shape[:3], -1)

    def _fit_windows(self) -> None:
        """One Gaussian of the windows of all training images, summed up around those of the first one."""
        data, group = self.trainer.datamodule, Group()
        first = int(data.table[data.table["split"] == "train"].id.min())
        centre = self._windows(data.image_batch([first])["image"].to(self.device)).flatten(0, 2).mean(0)
        parts = [moments(centre[None][:0], centre)]
        for batch in self.training_images():
            for image in batch["image"].float().split(1):
                parts = [merged(parts[0], moments(self._windows(image).flatten(0, 2), centre))]
        summed = Moments(*(torch.from_numpy(group.sum(part.cpu().numpy())).to(self.device) for part in parts[0]))
        self.shrinkage = self.network.set_gaussian(summed, centre)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """Image scores; the image-level model's map is 0 everywhere, and nothing measures it."""
        images = batch["image"].float()
        with torch.autocast(images.device.type, enabled=False):
            if self.has_map:
                embeddings = torch.cat([self._windows(part) for part in in_parts(images, 1)])
                cells = self.network.score(embeddings.flatten(0, 2)).view(embeddings.shape[:3]).float()
                maps = spread(cells, self.image_size, self.reception, self.upsampling_std, normalised=True)
                scored = self.head.score([maps], self.image_size)
                return {"": scored._replace(image_scores=cells.flatten(1).amax(1), level_maps=[cells])}
            scores = self.network.score(self.network.embed(images)).float()
        return {"": ScoredMaps(images.new_zeros(images.shape[0], *self.image_size), scores, [])}

    def record_notes(self) -> list[str]:
        steps = f"{self.trained_steps:,} steps (the paper: {PAPER_STEPS:,})"
        return [
            self.training_views().describe(),
            f"single model, not the paper's ensemble of five; {steps}; trunk {self.extractor.provenance['name']} from "
            f"{self.extractor.provenance['weights']}",
            f"embeddings before the head, density {self.network.density}"
            + ("" if math.isnan(self.shrinkage) else f", shrinkage {self.shrinkage:.3g}"),
            f"patch model, windows of {self.reception.field} pixels every {self.reception.jump}, Gaussian upsampling of std "
            f"{self.upsampling_std:g}, divided by that of ones"
            if self.has_map
            else "no map: image scores only",
        ]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["shrinkage"] = self.shrinkage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.shrinkage = checkpoint["shrinkage"]
