"""Nearest neighbours: the distance of a position's features to the closest ones of normal images; nothing is trained.

The control beside every table here, no method of a paper: whatever a reconstruction network learns should beat a plain look-up
of the same features. Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences" (SPADE), 2020,
https://arxiv.org/abs/2005.02357, is close; it retrieves similar images first and averages over more neighbours.

    levels -> one grid, concatenated -> Euclidean distance to the nearest normal vector = map -> its largest value = image score
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.layers.nearest import MemoryBank
from models.layers.neck import resize_concatenate
from models.patchcore import PatchScores
from models.reconstruction import FeatureNetwork


class NearestNeighboursNetwork(FeatureNetwork):
    """`prepare` brings the levels to one grid, `bank` holds the vectors of normal images, `forward` measures distances.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them.
        sizes: See `channels`.
        grid: side of the grid that the levels are resized to, or None for the lowest level's own: the finest, and the
            slowest. A reconstruction method is compared at its own grid, on which it sees no more than this.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[tuple[int, int]], *, grid: int | None = None) -> None:
        super().__init__()
        if grid is not None and grid < 1:
            raise ValueError(
                f"grid is the positive side of a map of vectors, or null for the finest level's; found {grid}."
            )
        self.grid = (*sizes[0],) if grid is None else (grid, grid)
        self.width = sum(channels)
        self.bank = MemoryBank(self.width)

    @property
    def preparation(self) -> str:
        """What `prepare` does, in words that change whenever it does."""
        return f"levels resized to {self.grid[0]}x{self.grid[1]} without aligned corners, concatenated"

    def prepare(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C_l, H_l, W_l) -> [vectors (B, sum C_l, *grid)], float32."""
        with torch.autocast(levels[0].device.type, enabled=False):
            return [resize_concatenate([level.float() for level in levels], self.grid, align_corners=False)]

    def forward(self, features: list[Tensor]) -> PatchScores:
        """[Vectors (B, C, H, W)] -> distances (B, H, W), at least 0, and the largest of each image (B,)."""
        (vectors,) = features
        B, _, H, W = vectors.shape
        squared, _ = self.bank(vectors.float().flatten(2).transpose(1, 2).flatten(0, 1))
        maps = squared.sqrt().view(B, H, W)
        return PatchScores(maps, maps.flatten(1).amax(dim=1))
