"""Dinomaly's idea on convolutional features: dropout, a narrow token, and a short decoder that has to do without.

Not a paper's method and never reported under one's name. It takes together what others have shown: the dropout
bottleneck of Dinomaly (Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325), its low-rank form (Dinomaly2,
https://arxiv.org/abs/2510.17611; ShortcutBreaker's low-rank noisy bottleneck, https://arxiv.org/abs/2510.18342), the
thought of UniAD's feature jitter that a network which removes noise does not copy (NeurIPS 2022,
https://arxiv.org/abs/2206.03687), linear attention (Katharopoulos et al., ICML 2020, https://arxiv.org/abs/2006.16236),
and standardised feature channels (ULSAD, Algorithm 1; Uninformed Students, CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dinomaly import SelfAttention
from models.layers.dropout import Dropout
from models.layers.neck import ConcatenatedLevels
from models.layers.vit import NORM_EPSILON, FeedForward, head_count
from models.reconstruction import Pair

Attention = Literal["linear", "softmax", "none"]


class NoisyBottleneckNetwork(ConcatenatedLevels):
    """Levels in, one pair out: all levels on one grid, concatenated and standardised, and their reconstruction.

    Dropout, linear projection to `width`, an MLP with dropout on its hidden layer, a learned code for each position,
    `blocks` decoder blocks, linear projection back. Dinomaly's dropout before and after every layer was tried too: it
    learns two to three times as slowly on these features.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them.
        sizes: See `channels`.
        grid: (height, width) of the token grid; None = the size of the highest level given.
        width: of a token; with fewer than the feature channels the projection is low-rank.
        dropout: on the standardised features and on the bottleneck's hidden layer, in training only; 0 = no noise, which is
            the control that learns to copy.
        blocks: number of decoder blocks.
        attention: `linear`, `softmax`, or `none` = their MLPs alone, one token at a time.
        heads: of the attention, must divide `width`.

    The buffers `mean` and `std`, (C,), standardise each channel; they are set by `standardise` before training.
    Raises ValueError for an unknown attention, widths that do not divide, and numbers out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        grid: tuple[int, int] | None = None,
        width: int = 128,
        dropout: float = 0.4,
        blocks: int = 2,
        attention: Attention = "linear",
        heads: int = 4,
    ) -> None:
        super().__init__()
        if attention not in get_args(Attention):
            raise ValueError(f'attention names "{attention}"; choose from {", ".join(get_args(Attention))}.')
        if blocks < 0:
            raise ValueError(f"blocks must not be negative, found {blocks}.")
        rows, columns = grid or sizes[-1]
        if width < 1 or rows < 1 or columns < 1:
            raise ValueError(f"width and grid must be positive, found width={width} and grid={(rows, columns)}.")
        head_count(width, heads)
        self.grid = (rows, columns)
        width_in = sum(channels)
        self.register_buffer("mean", torch.zeros(width_in))
        self.register_buffer("std", torch.ones(width_in))
        self.register_buffer("standardised", torch.tensor(False))
        self.dropout = Dropout(dropout)
        self.input_projection = nn.Linear(width_in, width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], width))
        self.decoder = nn.ModuleList(Block(width, attention, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.output_projection = nn.Linear(width, width_in)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of each channel over the training images' prepared features, (C,) each."""
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.standardised.fill_(True)

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """features: as `prepare` returns them, or the levels. Returns one pair of (B, sum C_l, *grid)."""
        (features,) = self.prepare(features)
        target = (features - self.mean[:, None, None]) / self.std[:, None, None]
        x = self.input_projection(self.dropout(target.flatten(2).transpose(1, 2)))
        x = self.project(self.dropout(F.gelu(self.expand(x)))) + self.position
        for block in self.decoder:
            x = block(x)
        reconstruction = self.output_projection(self.norm(x))
        return [Pair(target, reconstruction.transpose(1, 2).unflatten(2, self.grid))]


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); without attention only the second."""

    def __init__(self, width: int, attention: Attention, heads: int) -> None:
        super().__init__()
        self.norm1 = None if attention == "none" else nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = None if attention == "none" else SelfAttention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to (B, L, width)."""
        if self.attention is not None:
            x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
