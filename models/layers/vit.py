"""Pieces of the ViT-like networks that Dinomaly and INP-Former put behind a frozen ViT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.dropout import Dropout

NORM_EPSILON = 1e-8


class FeedForward(nn.Module):
    """Linear width -> hidden, GELU (exact), linear back, on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class NoisyBottleneck(nn.Module):
    """An MLP with dropout around every layer: Dinomaly's noise, which a network that copies its input cannot pass on.

    Dropout, linear to 4 * width, GELU, dropout, linear back, dropout; with biases, without norm and residual. The first
    dropout acts on the input itself. narrow: Dinomaly2's low-rank form, a linear layer to `narrow` channels in front of
    the first dropout. dropout: probability, in training only.
    """

    def __init__(self, width: int, dropout: float, narrow: int | None = None) -> None:
        super().__init__()
        if narrow is not None and narrow < 1:
            raise ValueError(f"narrow is a number of channels, 1 or more, or null for no such layer; found {narrow}.")
        self.narrow = None if narrow is None else nn.Linear(width, narrow)
        self.expand = nn.Linear(width if narrow is None else narrow, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        x = self.dropout(x if self.narrow is None else self.narrow(x))
        x = self.dropout(F.gelu(self.expand(x)))
        return self.dropout(self.project(x))


def one_width(channels: Sequence[int], sizes: Sequence[tuple[int, int]], method: str) -> tuple[int, tuple[int, int]]:
    """Width and token grid that all levels share, as a ViT's blocks do. Raises ValueError if they do not."""
    if len(set(channels)) != 1 or len({tuple(size) for size in sizes}) != 1:
        raise ValueError(
            f"{method} averages its levels, so they need one width and one size, as the blocks of a ViT have; found "
            f"{list(channels)} channels and sizes {[tuple(size) for size in sizes]}. Choose a ViT, for example "
            "vit_base_patch14_reg4_dinov2.lvd142m with levels 3 to 10."
        )
    height, width = sizes[0]
    return channels[0], (height, width)


def head_count(width: int, heads: int | None) -> int:
    """heads, or one for every 64 channels as in DINOv2; ValueError if they do not divide the width."""
    chosen = max(1, width // 64) if heads is None else heads
    if chosen < 1 or width % chosen:
        raise ValueError(f"The number of heads must divide the token width {width}, found {chosen}. Give `heads`.")
    return chosen


def initialise(network: nn.Module) -> None:
    """Released start: linear weights from a normal of deviation 0.01 cut at 0.03, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
            nn.init.zeros_(module.bias)
