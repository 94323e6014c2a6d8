"""RAD: Is Training Necessary for Anomaly Detection?, 2026, arXiv:2601.22763."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.base import ImageSize, Recipe
from lightning_modules.fitted import FittedModule, PatchStore
from lightning_modules.metrics.sync import Group
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.rad import RADNetwork


class RAD(FittedModule):
    """RAD with the released rule: 150 retrieved images, patches within one position, four blocks; see `models.rad`.

    Args:
        backbone: DINOv3 ViT-B/16, the blocks with the indices 3, 6, 9 and 11, which are levels 4, 7, 10 and 12.
        head: Mean of the levels' maps, resized without aligned corners, smoothed by 5x5 taps of sigma 1; image score = mean of
            the highest 1 % of pixels. Its distance has no meaning here.
        image_size: Input size in pixels, a multiple of 16. The released code resizes to 512 and crops 448; here nothing is
            cropped.
        network: Arguments of `models.rad.RADNetwork`.
    """

    method = "rad"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1)
    network: RADNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vit_base_patch16_dinov3.lvd1689m", (4, 7, 10, 12)),
        head: HeadConfig = HeadConfig(
            fusion="mean",
            align_corners=False,
            smoothing_sigma=1.0,
            smoothing_kernel=5,
            image_score="top_k",
            top_k_fraction=0.01,
        ),
        image_size: ImageSize = 448,
        **network,
    ) -> None:
        super().__init__(backbone, head, image_size)
        self.network = RADNetwork(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
        self._stores: list[PatchStore] = []

    def begin(self, images: int) -> None:
        needed = images * self.network.bank_bytes_per_image
        self.announce(f"a bank of all patches of {images:,} images", 2 * needed)  # collected, then arranged
        own = -(-images // self.trainer.world_size)
        self._stores = [
            PatchStore(own, bank.shape[0], bank.shape[2], Path(), memory_bytes=needed) for bank in self.network.banks
        ]

    def collect(self, features: list[Tensor], ids: Sequence[int], categories: Sequence[str]) -> None:
        for store, level in zip(self._stores, features, strict=True):
            store.add(level.flatten(2).transpose(1, 2), ids, categories)

    def fit_network(self) -> None:
        group, levels = Group(), []
        for store, size in zip(self._stores, self.network.sizes, strict=True):
            places = store.places(group)
            whole = np.zeros((len(places), *store.vectors.shape[1:]), dtype=np.float32)
            for number, place in enumerate(places):
                if place.rank == group.rank:
                    whole[number] = store.vectors[place.row].numpy()
            store.close()
            levels.append(torch.from_numpy(group.sum(whole)).transpose(1, 2).unflatten(2, size))
        self._stores = []
        self.network.set_banks(levels)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        return {"": self.head.score(self.network(self.features(batch)), self.image_size)}

    def record_notes(self) -> list[str]:
        return [
            f"patches of {len(self.network.descriptors):,} normal images; retrieved by the mean patch, not the class token"
        ]
