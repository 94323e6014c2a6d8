"""UniAS: Towards Accurate Unified Anomaly Segmentation, WACV 2025, arXiv:2501.12295."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from lightning_modules.running.schedules import Drops
from models import unias
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.reconstruction import Pair


class UniAS(ReconstructionModule):
    """UniAS with the released recipe as defaults: 1000 epochs of AdamW, 1e-4, a tenth from epoch index 401 and 801.

    The released schedule is stepped with the epoch's index after the epoch, so its drops at 400 and 800 act one later.
    In mixed precision (`--trainer.precision=bf16-mixed`) the loss, the maps and the scores stay in float32.

    Args:
        backbone: EfficientNet-B4, levels 1 to 4, with the released code's padding. `levels` of the network counts
            the backbone's levels from 1, the finest.
        head: Cosine distance of every level, at half the image's size, blurred by a kernel of 9, 7, 5 or 3 pixels from
            the finest level to the coarsest, and multiplied; image score = maximum. The released evaluator also reports
            `std`. Blurs are given for all levels of the backbone; those of `levels` are used.
        optimizer: AdamW with weight decay 1e-4 on every trainable tensor.
        lr_scheduler: A tenth from epoch index 401 and again from 801.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels; each side a multiple of the coarsest level's stride.
        loss_weight: Of the whole loss (released: 10 on MVTec AD, 1 on VisA).
        cosine_term: `distance` (1 - cos, the paper's figure) or `as_released` (its opposite sign).
        select: Subsets of levels, as `4+3`, whose maps are also multiplied and scored at test: variants of the one
            training. A subset with a level that is not reconstructed is left out, so that one list serves all rows of
            an ablation of `levels`.
        network: Arguments of `models.unias.UniAS`.
    """

    method = "unias"
    recipe = Recipe(
        resize="pil_bilinear",
        batch_size=64,
        max_epochs=1000,
        gradient_clip_val=0.1,
        best_on_test=("pixel_auroc", 10),
    )

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), padding="released"),
        head: HeadConfig = HeadConfig(
            distance="cosine",
            fusion="product",
            fusion_stride=2,
            align_corners=False,
            level_sigmas=(3.0, 7 / 3, 5 / 3, 1.0),
            level_kernels=(9, 7, 5, 3),
            image_score="max",
        ),
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: Drops(optimizer, first=401, second=801),
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 224,
        loss_weight: float = 10.0,
        cosine_term: unias.CosineTerm = "distance",
        select: Sequence[str] = (),
        **network,
    ) -> None:
        levels = sorted(network.get("levels") or range(1, len(backbone.levels) + 1))
        head = _of_levels(head, levels, len(backbone.levels))
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = unias.UniAS(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
        self.map_names = tuple(f"level {level}" for level in reversed(levels))
        self.loss_weight, self.cosine_term = loss_weight, cosine_term
        wanted = {subset: _subset(subset, len(backbone.levels)) for subset in select}
        self.subsets = {
            f"levels={subset}": sorted(levels.index(level) for level in chosen)
            for subset, chosen in wanted.items()
            if set(chosen) <= set(levels)
        }

    def loss(self, pairs: list[Pair]) -> Tensor:
        """Mean squared error plus cosine term, summed over the levels."""
        return unias.reconstruction_loss(pairs, self.loss_weight, self.cosine_term)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """The product of all levels' maps under "", and that of every subset of `select` under its name.

        `level_maps` go from the coarsest level to the finest, as the supplement's Fig. 3 shows them.
        """
        level_maps = self.head.level_maps(self.reconstruct(batch))
        scored = {
            name: self.head.score(level_maps, self.image_size, selection=positions)
            for name, positions in {"": None, **self.subsets}.items()
        }
        return {name: each._replace(level_maps=level_maps[::-1]) for name, each in scored.items()}


def _of_levels(head: HeadConfig, levels: Sequence[int], count: int) -> HeadConfig:
    """The head with the blurs of the reconstructed levels, out of those given for all."""
    chosen: dict[str, Any] = {}
    for name in ("level_sigmas", "level_kernels"):
        values = getattr(head, name)
        if len(values) not in (0, count):
            raise ValueError(
                f"head.{name} has {len(values)} values but the backbone gives {count} levels: give one per level of "
                "the backbone, finest first, or none."
            )
        chosen[name] = tuple(values[level - 1] for level in levels if values)
    return replace(head, **chosen)


def _subset(text: str, count: int) -> list[int]:
    """The levels of a subset written as `4+3`, out of 1 to `count`."""
    parts = text.split("+")
    if len(set(parts)) != len(parts) or any(part not in map(str, range(1, count + 1)) for part in parts):
        raise ValueError(
            f"select has the subset {text!r}; write different levels from 1 to {count} with a plus between them, for "
            "example 4+3."
        )
    return [int(part) for part in parts]
