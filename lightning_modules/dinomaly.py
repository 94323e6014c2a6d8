"""Dinomaly, Guo et al., CVPR 2025, arXiv:2405.14325, and Dinomaly2, arXiv:2510.17611."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models import dinomaly
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.groups import Groups
from models.layers.mining import hard_mining_scale, mined_cosine_loss, mining_share, position_distance
from models.optimizers import StableAdamW, WarmCosine
from models.reconstruction import Pair

BLOCKS = (3, 4, 5, 6, 7, 8, 9, 10)
"""The eight middle blocks of a ViT with twelve; of one with 24: 5, 7, ..., 19."""


class Dinomaly(ReconstructionModule):
    """Dinomaly with the paper's setting on MVTec AD and VisA as defaults: 10,000 steps of 16, StableAdamW 2e-3.

    Real-IAD takes 50,000 steps and dropout 0.4. The released code warms up over 100 steps and reports the last one;
    anomalib's port steps the schedule per epoch and so hardly leaves the warm-up, has no biases in the bottleneck, and
    scores a map other than the one it returns. The published weights were trained for twice the paper's steps.

    Args:
        backbone: DINOv2 with registers, ViT-B, blocks 3 to 10, class and register tokens included. Any ViT of timm.
        head: Cosine distance, mean of the groups resized with aligned corners, resized to 256, 5x5 Gaussian with zeros
            outside; image score = mean of the highest 1 %.
        optimizer: StableAdamW.
        lr_scheduler: Warm-up over 100 steps from 0, cosine to a tenth.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, which the patch divides.
        mining_share: Share of the positions, the best reconstructed ones, whose gradient is scaled.
        mining_steps: Steps over which the share grows from 0.
        mining_factor: What their gradient is multiplied by; 1 = no mining ("loose loss" off).
        network: Arguments of `models.dinomaly.Dinomaly`.
    """

    method = "dinomaly"
    recipe = Recipe(
        resize="pil_bilinear",
        batch_size=16,
        max_epochs=100_000,
        max_steps=10_000,
        gradient_clip_val=0.1,
        drop_last=True,
    )
    network: dinomaly.Dinomaly

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vit_base_patch14_reg4_dinov2.lvd142m", BLOCKS, prefix_tokens=True),
        head: HeadConfig = HeadConfig(
            distance="cosine",
            fusion="mean",
            map_size=256,
            smoothing_sigma=4.0,
            smoothing_kernel=5,
            smoothing_border="zeros",
            image_score="top_k",
        ),
        optimizer: OptimizerCallable = lambda parameters: StableAdamW(parameters, lr=2e-3),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmCosine(optimizer),
        lr_interval: Interval = "step",
        image_size: ImageSize = 392,
        mining_share: float = 0.9,
        mining_steps: int = 1000,
        mining_factor: float = 0.1,
        **network,
    ) -> None:
        if not 0 <= mining_share <= 1 or mining_steps < 0 or mining_factor < 0:
            raise ValueError(
                "Hard mining needs a share in [0, 1], and steps and a factor that are not negative, found "
                f"mining_share={mining_share}, mining_steps={mining_steps}, mining_factor={mining_factor}."
            )
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = dinomaly.Dinomaly(
            self.extractor.channels,
            self.extractor.sizes(self.image_size),
            prefix_tokens=self.extractor.prefix_tokens,
            **network,
        )
        self.map_names = group_names(self.network.groups, backbone.levels)
        self.mining_share, self.mining_steps, self.mining_factor = mining_share, mining_steps, mining_factor

    def loss(self, pairs: list[Pair]) -> Tensor:
        share = mining_share(self.global_step, self.mining_share, self.mining_steps)
        scales = [hard_mining_scale(position_distance(pair), share, self.mining_factor) for pair in pairs]
        return mined_cosine_loss(pairs, scales)


class Dinomaly2(Dinomaly):
    """Dinomaly2 with its preview code's 2D setting: 40,000 steps of 16, constant rate after the warm-up.

    The authors warn that the preview's configuration is not in everything the paper's. What differs from Dinomaly:
    low-rank bottleneck with dropout 0.4, re-centred targets, an epsilon in linear attention, StableAdamW without AMSGrad,
    a tenth of the rate for the bottleneck's first layer, steps with a non-finite gradient left out.

    Args:
        backbone: As Dinomaly; the preview's default is ViT-S, its tables have S, B and L.
        head: As Dinomaly.
        optimizer: StableAdamW without AMSGrad.
        lr_scheduler: Warm-up over 100 steps from 0, then constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, which the patch divides.
        narrow_lr_ratio: Learning rate of the bottleneck's first layer, relative to the others'.
        narrow: See `models.dinomaly.Dinomaly`, as all others.
        dropout: Likewise.
        recenter: Likewise.
        attention_epsilon: Likewise.
        further: Other arguments of `Dinomaly`.
    """

    method = "dinomaly2"
    recipe = Recipe(
        resize="pil_bilinear",
        batch_size=16,
        max_epochs=100_000,
        max_steps=40_000,
        gradient_clip_val=0.1,
        drop_last=True,
    )

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda parameters: StableAdamW(
            parameters, lr=2e-3, amsgrad=False, skip_nonfinite=True
        ),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmCosine(optimizer, final_ratio=1.0),
        narrow_lr_ratio: float = 0.1,
        narrow: int | None = 256,
        dropout: float = 0.4,
        recenter: bool = True,
        attention_epsilon: float = 1e-8,
        **further,
    ) -> None:
        if narrow_lr_ratio < 0:
            raise ValueError(f"narrow_lr_ratio must not be negative, found {narrow_lr_ratio}.")
        super().__init__(
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            narrow=narrow,
            dropout=dropout,
            recenter=recenter,
            attention_epsilon=attention_epsilon,
            **further,
        )
        self.narrow_lr_ratio = narrow_lr_ratio

    def optimizer_of(self, parameters: Iterable[Any]) -> Optimizer:
        narrow = self.network.bottleneck.narrow
        first = [] if narrow is None else list(narrow.parameters())
        if not first:
            return super().optimizer_of(parameters)
        others = [parameter for parameter in parameters if all(parameter is not own for own in first)]
        optimizer = super().optimizer_of([{"params": others}, {"params": first}])
        optimizer.param_groups[1]["lr"] *= self.narrow_lr_ratio
        return optimizer


def group_names(groups: Groups, levels: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the groups' maps, by the numbers of the backbone's blocks."""
    return tuple("block" + "s" * (len(g) > 1) + " " + ", ".join(str(levels[layer]) for layer in g) for g in groups)
