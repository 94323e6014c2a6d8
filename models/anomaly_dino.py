"""AnomalyDINO: cosine nearest neighbours of a vision transformer's patch tokens; nothing is trained.

Damm, Laszkiewicz, Lederer and Fischer, "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV
2025, https://arxiv.org/abs/2405.14529. Details follow the authors' code: distance = 1 - cosine, half the squared distance of
unit vectors; image score = mean of the highest 1 % of the patch distances, before any enlarging or smoothing.

Left out: the masks of the background and the rotated copies of the few reference images, which the authors' code switches on
and off per category. The authors read DINOv2's last block after its final norm; a backbone's level here is the block's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers.nearest import MemoryBank
from models.layers.neck import resize_concatenate
from models.patchcore import PatchScores
from models.reconstruction import FeatureNetwork


class AnomalyDINONetwork(FeatureNetwork):
    """`prepare` makes unit vectors, `bank` holds those of normal patches, `forward` measures distances.

    Args:
        channels: channels and (height, width) of each level. The paper uses one level, the last block; several are
            concatenated on the lowest one's grid.
        sizes: See `channels`.
        neighbors: a patch's distance is the mean of that many smallest ones (1).
        top_fraction: share of an image's patches whose mean distance is its score (0.01), at least one patch.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        neighbors: int = 1,
        top_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, found {neighbors}.")
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must lie in (0, 1], found {top_fraction}.")
        self.neighbors, self.top_fraction = neighbors, top_fraction
        self.grid, self.width = (*sizes[0],), sum(channels)
        self.bank = MemoryBank(self.width)

    @property
    def preparation(self) -> str:
        """What `prepare` does, in words that change whenever it does."""
        return "levels concatenated at the finest grid without aligned corners, unit length"

    def prepare(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C_l, H_l, W_l) -> [vectors of length 1, (B, sum C_l, H, W)], float32."""
        with torch.autocast(levels[0].device.type, enabled=False):
            joined = resize_concatenate([level.float() for level in levels], self.grid, align_corners=False)
            return [F.normalize(joined, dim=1)]

    def forward(self, features: list[Tensor]) -> PatchScores:
        """[Unit vectors (B, C, H, W)] -> cosine distances (B, H, W), in [0, 2], and image scores (B,)."""
        (embedding,) = features
        B, _, H, W = embedding.shape
        queries = embedding.float().flatten(2).transpose(1, 2).flatten(0, 1)
        squared, _ = self.bank(queries, min(self.neighbors, len(self.bank) or 1))
        distances = squared.mean(dim=1).view(B, H * W) / 2
        top = max(1, int(H * W * self.top_fraction))
        return PatchScores(distances.view(B, H, W), distances.topk(top, dim=1).values.mean(dim=1))
