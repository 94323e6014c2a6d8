"""PaDiM: a Patch Distribution Modeling Framework, Defard et al., ICPR 2020 workshops, arXiv:2011.08785."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import ImageSize, Recipe
from lightning_modules.fitted import FittedModule
from lightning_modules.metrics.sync import Group
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.padim import POSITIONS, PaDiMNetwork


class PaDiM(FittedModule):
    """PaDiM at the paper's setting: WideResNet50-2, 550 of 1792 channels, epsilon 0.01; see `models.padim`.

    The paper trains one model per category (`data.init_args.setting=per_category`). One Gaussian per position for all
    categories is poor by its nature: UniAD's paper prints 84.2 image AUROC on MVTec AD for it, against 95.5.

    Args:
        backbone: Levels 2, 3 and 4 (strides 4, 8 and 16).
        head: Resized without aligned corners, smoothed with sigma 4; image score = maximum. Its distance has no meaning here.
        image_size: Input size in pixels. The paper resizes to 256 and crops 224; here nothing is cropped.
        kept: Channels that are kept; None: the paper's number for its backbones.
        channel_seed: Of the draw of channels; None: the run's seed.
        epsilon: Added to the diagonal of every covariance.
    """

    method = "padim"
    recipe = Recipe(resize="pil_bilinear", batch_size=32, max_epochs=1)
    network: PaDiMNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.tv_in1k", (2, 3, 4)),
        head: HeadConfig = HeadConfig(
            align_corners=False, smoothing_sigma=4.0, smoothing_border="symmetric", image_score="max"
        ),
        image_size: ImageSize = 224,
        kept: int | None = None,
        channel_seed: int | None = None,
        epsilon: float = 0.01,
    ) -> None:
        super().__init__(backbone, head, image_size)
        self.channel_seed = channel_seed
        self.network = PaDiMNetwork(
            self.extractor.channels,
            self.extractor.sizes(self.image_size),
            kept=kept,
            epsilon=epsilon,
            generator=torch.Generator().manual_seed(self.fit_seed if channel_seed is None else channel_seed),
        )

    def begin(self, images: int) -> None:
        positions = self.network.grid[0] * self.network.grid[1]
        self.announce(f"{positions:,} Gaussians of {self.network.kept} channels", self.network.state_bytes)
        self.network.reset()

    def collect(self, features: list[Tensor], ids: Sequence[int], categories: Sequence[str]) -> None:
        self.network.update(features)

    def fit_network(self) -> None:
        group, network = Group(), self.network
        if group.size > 1:
            parts = group.gather_objects((network.count, network.mean.cpu()))
            for first in range(0, len(network.factor), POSITIONS):
                part = network.factor[first : first + POSITIONS]
                part.copy_(torch.from_numpy(group.sum(part.cpu().numpy())))
            network.merge(parts)
        network.finish()

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        return {"": self.head.score([self.network(self.features(batch))], self.image_size)}

    def avoid_solves(self) -> None:
        self.network.invert()

    def record_notes(self) -> list[str]:
        network = self.network
        drawn = "the run's seed" if self.channel_seed is None else f"seed {self.channel_seed}"
        first = ", ".join(map(str, network.chosen[:5].tolist()))
        return [f"{network.kept} of {sum(network.channels)} channels, drawn by {drawn}: {first}, ..."]
