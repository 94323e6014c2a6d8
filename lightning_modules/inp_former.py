"""INP-Former: Exploring Intrinsic Normal Prototypes within a Single Image, Luo et al., CVPR 2025, arXiv:2503.02424."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from lightning_modules.dinomaly import BLOCKS, group_names
from models import inp_former
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.layers.mining import mined_cosine_loss, position_distance, soft_mining_scale
from models.optimizers import StableAdamW, WarmCosine
from models.reconstruction import Pair


class INPFormer(ReconstructionModule):
    """INP-Former with the released setting as defaults: 200 epochs of batches of 16, StableAdamW 1e-3.

    Its epochs make 45,200 steps on MVTec AD, four and a half times Dinomaly's. The released evaluation calls mask pixels
    above one half anomalous and takes pixel AP and AUPRO from a histogram of 200 strips; ours are exact.

    Args:
        backbone: DINOv2 with registers, ViT-B, blocks 3 to 10, patch tokens only. Any ViT of timm.
        head: As Dinomaly's.
        optimizer: StableAdamW.
        lr_scheduler: Warm-up over 100 steps from 0, cosine to a tenth.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, which the patch divides.
        mining_gamma: Power of a position's relative distance that its gradient is multiplied by; 0 = no mining.
        coherence_weight: Weight of the mean distance of all tokens to their nearest prototype.
        score_distance: Also score the distance to the nearest prototype alone, the zero-shot map, as variant
            `map=distance`.
        network: Arguments of `models.inp_former.INPFormer`.
    """

    method = "inp_former"
    recipe = Recipe(resize="pil_bilinear", batch_size=16, max_epochs=200, gradient_clip_val=0.1, drop_last=True)
    network: inp_former.INPFormer

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vit_base_patch14_reg4_dinov2.lvd142m", BLOCKS),
        head: HeadConfig = HeadConfig(
            distance="cosine",
            fusion="mean",
            map_size=256,
            smoothing_sigma=4.0,
            smoothing_kernel=5,
            smoothing_border="zeros",
            image_score="top_k",
        ),
        optimizer: OptimizerCallable = lambda parameters: StableAdamW(parameters, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmCosine(optimizer),
        lr_interval: Interval = "step",
        image_size: ImageSize = 392,
        mining_gamma: float = 3.0,
        coherence_weight: float = 0.2,
        score_distance: bool = False,
        **network,
    ) -> None:
        if mining_gamma < 0 or coherence_weight < 0:
            raise ValueError(
                f"mining_gamma and coherence_weight must not be negative, found {mining_gamma} and {coherence_weight}."
            )
        if backbone.prefix_tokens:
            raise ValueError("INP-Former leaves class and register tokens out: set backbone.prefix_tokens=false.")
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = inp_former.INPFormer(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
        self.map_names = group_names(self.network.groups, backbone.levels)
        self.mining_gamma, self.coherence_weight = mining_gamma, coherence_weight
        self.score_distance = score_distance

    def loss(self, pairs: list[Pair]) -> Tensor:
        return mined_cosine_loss(pairs, [soft_mining_scale(position_distance(p), self.mining_gamma) for p in pairs])

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        rebuilt = self.network.rebuild(self.features(batch))
        mining, coherence = self.loss(rebuilt.pairs), rebuilt.distance.mean()
        if self.training:
            self.keep({"loss_mining": mining.detach(), "loss_coherence": coherence.detach()}, batch)
        return mining + self.coherence_weight * coherence

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        rebuilt = self.network.rebuild(self.features(batch))
        scored = {"": self.head(rebuilt.pairs, self.image_size)}
        if self.score_distance:
            scored["map=distance"] = self.head.score([rebuilt.distance], self.image_size)
        return scored

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.extractor, self.network.bottleneck, *self.network.decoder]
