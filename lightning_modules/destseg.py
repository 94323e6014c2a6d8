"""DeSTSeg: Segmentation Guided Denoising Student-Teacher for Anomaly Detection, Zhang et al., CVPR 2023,
arXiv:2211.11317."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.synthetic_anomalies import SyntheticAnomaliesModule
from models import destseg
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.reconstruction import Pair


class DeSTSeg(SyntheticAnomaliesModule):
    """DeSTSeg with the released setting as defaults: 1000 steps for the student, then 4000 for the segmentation network.

    The paper trains one model per category (`data.init_args.setting=per_category`). For one model of all categories,
    which is not in the paper, give as many steps more as there are more categories, a third of it at least. Training images
    get synthetic anomalies (`data.init_args.anomalies`), so that no features are cached.

    Both phases are one training with one optimiser: what has no gradient in a phase is not touched by it, neither by
    weight decay nor by momentum, and a resumed training is in the phase that it was in.

    Args:
        backbone: The teacher, ResNet18, levels 2 to 4 (its layers 1 to 3). Any other gives its levels without negative
            values.
        head: Of both maps: at a quarter of the image's size, then resized without aligned corners; image score = mean
            of the highest 100 of 65,536 pixels (`top_k_fraction`).
        optimizer: SGD; its learning rate is the student's. The student's loss is a sum over the images of a batch, and the
            rate belongs to 32.
        lr_scheduler: None: the learning rates are constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 32.
        denoising: Whether the student learns from corrupted images (the paper's); else from clean ones.
        student_share: Share of the training's steps that the student gets, the first ones.
        blocks_lr: Learning rates of the segmentation network's residual blocks and of its head.
        head_lr: See `blocks_lr`.
        gamma: Exponent of the focal loss.
        segmentation_loss: `focal+l1` or `focal`.
        score_distances: Also score the product of the three cosine distances, without the segmentation network, as variant
            `segmentation=off`.
        decoder: See `models.destseg.DeSTSeg`.
        widths: See `decoder`.
        stem: See `decoder`.
        segmentation_input: See `decoder`.
        segmentation_width: See `decoder`.
        dilations: See `decoder`.
    """

    method = "destseg"
    recipe = Recipe(resize="pil_bilinear", batch_size=32, max_epochs=5000, max_steps=5000, drop_last=True)
    needs_images = True
    network: destseg.DeSTSeg

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("resnet18.tv_in1k", (2, 3, 4)),
        head: HeadConfig = HeadConfig(
            distance="cosine",
            fusion="product",
            fusion_stride=4,
            align_corners=False,
            fused_align_corners=False,
            image_score="top_k",
            top_k_fraction=100 / 65536,
        ),
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.4, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        denoising: bool = True,
        student_share: float = 0.2,
        blocks_lr: float = 0.1,
        head_lr: float = 0.01,
        gamma: float = 4.0,
        segmentation_loss: Literal["focal+l1", "focal"] = "focal+l1",
        score_distances: bool = False,
        decoder: bool = True,
        widths: Sequence[int] | None = None,
        stem: int = 64,
        segmentation_input: destseg.SegmentationInput = "products",
        segmentation_width: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        if backbone.standardised:
            raise ValueError(
                "backbone.standardised: DeSTSeg's student ends in ReLUs, which cannot follow the negative half of "
                "standardised levels. Leave it out."
            )
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if not 0 < student_share < 1:
            raise ValueError(
                f"student_share is {student_share}; both phases need steps, so give a share between 0 and 1."
            )
        if segmentation_loss not in ("focal+l1", "focal"):
            raise ValueError(f"segmentation_loss is {segmentation_loss!r}; choose focal+l1 or focal.")
        if any(side % 32 for side in self.image_size):
            raise ValueError(f"image_size is {self.image_size}; DeSTSeg's student needs a multiple of 32.")
        self.network = destseg.DeSTSeg(
            self.extractor.channels,
            decoder=decoder,
            widths=widths,
            stem=stem,
            segmentation_input=segmentation_input,
            segmentation_width=segmentation_width,
            dilations=dilations,
        )
        self.map_names = ("segmentation", "level 1", "level 2", "level 3")
        self.denoising, self.student_share, self.gamma = denoising, student_share, gamma
        self.segmentation_loss, self.score_distances = segmentation_loss, score_distances
        self.blocks_lr, self.head_lr = blocks_lr, head_lr
        self.student_steps = 0

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.student_steps = max(1, round(self.student_share * self.trainer.estimated_stepping_batches))

    @property
    def trains_student(self) -> bool:
        """Whether the training is in its first phase."""
        return self.global_step < self.student_steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        self.network.student.train(self.trains_student)
        self.network.segmentation.train(not self.trains_student)
        loss = super().training_step(batch, batch_idx)
        if self.trainer.world_size > 1:  # every process must reach every parameter for the gradients to be shared
            loss = loss + 0.0 * sum(p.sum() for p in self._resting().parameters())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What rests in this phase stays as it is."""
        for parameter in self._resting().parameters():
            parameter.grad = None

    def _resting(self) -> nn.Module:
        return self.network.segmentation if self.trains_student else self.network.student

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Of the phase: the cosine distances of student and teacher, or focal and L1 of the segmentation."""
        if self.trains_student:
            clean = batch.get("clean", batch["image"])
            loss = destseg.cosine_loss(self._pairs(clean, batch["image"] if self.denoising else clean))
            self._keep("student", loss, batch)
            return loss
        with torch.no_grad():
            pairs = self._pairs(batch["image"], batch["image"])
        probability = self.network.segment(pairs)
        mask = destseg.small_mask(batch["mask"], tuple(probability.shape[-2:]))
        loss = destseg.focal_loss(probability, mask, self.gamma)
        if self.segmentation_loss == "focal+l1":
            loss = loss + (probability - mask).abs().mean()
        self._keep("segmentation", loss, batch)
        return loss

    def _keep(self, name: str, loss: Tensor, batch: Mapping[str, Any]) -> None:
        if self.training:
            self.keep({f"loss_{name}": loss.detach()}, batch)

    def _pairs(self, of_teacher: Tensor, of_student: Tensor) -> list[Pair]:
        return self.network(self.extract(of_teacher), of_student)

    def configure_optimizers(self) -> Any:
        segmentation = self.network.segmentation
        groups = [
            {"params": self.network.student.parameters()},
            {"params": segmentation.blocks.parameters(), "lr": self.blocks_lr},
            {"params": segmentation.head.parameters(), "lr": self.head_lr},
        ]
        return self._scheduled(self.optimizer_of(groups))

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.student, self.network.segmentation]

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        return self.network(self.features(batch), batch["image"])

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """The segmentation under ""; its probability and the three distances are the level maps."""
        pairs = self.reconstruct(batch)
        probability, distances = self.network.segment(pairs)[:, 0], self.head.level_maps(pairs)
        scored = self.head.score([probability], self.image_size)
        found = {"": scored._replace(level_maps=[probability, *distances])}
        if self.score_distances:
            found["segmentation=off"] = self.head.score(distances, self.image_size)
        return found
