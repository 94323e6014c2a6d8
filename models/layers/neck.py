"""From feature levels to one feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.reconstruction import ReconstructionNetwork


def resize(features: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, *size) without antialiasing; the same tensor if it already fits."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=align_corners)


def resize_concatenate(features: Sequence[Tensor], size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """Resize every level to one grid and concatenate along the channels, lowest level first.

    features: (B, C_l, H_l, W_l) per level; size: (height, width) of the grid. Returns (B, sum C_l, *size).
    UniAD's neck is `align_corners=True`: the large maps are sampled sparsely at i * (H_l - 1) / (H - 1), not pooled,
    and that aliasing is part of the method. ULSAD's is `align_corners=False`.
    """
    if not features:
        raise ValueError("resize_concatenate got no feature level; it needs at least one tensor (B, C, H, W).")
    return torch.cat([resize(level, size, align_corners) for level in features], dim=1)


class ConcatenatedLevels(ReconstructionNetwork):
    """A network behind UniAD's neck: all levels resized to one grid and concatenated.

    grid: (height, width), set by the subclass.
    """

    grid: tuple[int, int]

    @property
    def preparation(self) -> str:
        return f"levels resized to {self.grid[0]}x{self.grid[1]} with aligned corners, concatenated"

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """(B, C_l, H_l, W_l) per level -> [(B, sum C_l, *grid)]; what is prepared already stays as it is."""
        return [resize_concatenate(levels, self.grid, align_corners=True)]
