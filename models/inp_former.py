"""INP-Former's reconstruction network.

Luo et al., "Exploring Intrinsic Normal Prototypes within a Single Image for Universal Anomaly Detection", CVPR 2025,
https://arxiv.org/abs/2503.02424. Where the paper is silent this follows the released code, and says so.

A few learned tokens read the image and become its intrinsic normal prototypes (INPs). The decoder then rebuilds every
patch from these alone: no residual leads around its attention, so that what a patch was is gone and only its relation
to the prototypes remains. The bottleneck is the rank, not noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.groups import group_means, layer_groups, means_suffice
from models.layers.vit import NORM_EPSILON, FeedForward, NoisyBottleneck, head_count, initialise, one_width
from models.reconstruction import Pair, ReconstructionNetwork
from models.released import renamed

Attention = Literal["relu", "softmax"]


class Rebuilt(NamedTuple):
    """pairs: one per group. prototypes: the image's INPs, (B, M, C). distance: of each patch's mean feature to its
    nearest INP, 1 - cosine, (B, H, W); its mean is the coherence loss, itself the zero-shot map."""

    pairs: list[Pair]
    prototypes: Tensor
    distance: Tensor


class INPFormer(ReconstructionNetwork):
    """ViT blocks in, one pair per group of blocks out. Class and register tokens are not used.

    Args:
        channels: width and (height, width) of each level, all equal, as a ViT's blocks give them.
        sizes: See `channels`.
        prototypes: number of INPs, 6 in the paper.
        groups: as in `models.dinomaly.Dinomaly`.
        heads: See `groups`.
        attention: of the decoder: `relu` of the scaled cosine similarities, not normalised, or `softmax` of them, for the
            ablation.
        residual: add each block's input to what its attention gives; the paper has no such path.
        dropout: of the bottleneck; 0 in the paper, 0.2 is Dinomaly's noise on top.

    Raises ValueError for levels of different widths or sizes, groups that do not fit, and an unknown attention.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        prototypes: int = 6,
        groups: int | Sequence[Sequence[int]] = 2,
        heads: int | None = None,
        attention: Attention = "relu",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width, self.grid = one_width(channels, sizes, "INP-Former")
        if attention not in get_args(Attention):
            raise ValueError(f'attention names "{attention}"; choose from {", ".join(get_args(Attention))}.')
        if prototypes < 1:
            raise ValueError(f"INP-Former needs at least one prototype, found prototypes={prototypes}.")
        self.groups = layer_groups(groups, len(channels))
        self.fused_apart = not means_suffice(self.groups, len(channels))
        self.preparation = f"means of levels {[list(group) for group in self.groups]}" + (
            " and of all" if self.fused_apart else ""
        )
        heads = head_count(width, heads)
        self.prototypes = nn.Parameter(torch.empty(prototypes, width))
        self.extractor = PrototypeExtractor(width, heads)
        self.bottleneck = NoisyBottleneck(width, dropout)
        self.decoder = nn.ModuleList(PrototypeBlock(width, heads, attention, residual) for _ in channels)
        initialise(self)
        nn.init.normal_(self.prototypes)

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """Group means of the levels (B, C, H, W), and where those do not give the mean over all levels, that too."""
        means = group_means(levels, self.groups)
        return means + (group_means(levels, (tuple(range(len(levels))),)) if self.fused_apart else [])

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """features: as `prepare` returns them. Returns one pair of (B, C, H, W) per group, lowest levels first."""
        return self.rebuild(features).pairs

    def rebuild(self, features: list[Tensor]) -> Rebuilt:
        """As `forward`, with the prototypes and the distances to them."""
        targets = features[: len(self.groups)]
        fused = features[-1] if self.fused_apart else torch.stack(features).mean(dim=0)
        tokens = fused.flatten(2).transpose(1, 2)  # (B, L, C)
        prototypes = self.extractor(self.prototypes.expand(tokens.shape[0], -1, -1), tokens)
        distance = nearest_distance(tokens, prototypes).unflatten(1, self.grid)
        x = self.bottleneck(tokens)
        outputs = []
        for block in self.decoder:
            x = block(x, prototypes)
            outputs.append(x)
        answers = group_means(outputs[::-1], self.groups)  # the last block answers for the first level
        reconstructions = (answer.transpose(1, 2).unflatten(2, self.grid) for answer in answers)
        pairs = [Pair(target, answer) for target, answer in zip(targets, reconstructions, strict=True)]
        return Rebuilt(pairs, prototypes, distance)


def nearest_distance(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """1 - cosine of each token (B, L, C) to the nearest of the prototypes (B, M, C), float32 (B, L)."""
    with torch.autocast(tokens.device.type, enabled=False):
        similarity = F.normalize(tokens.float(), dim=-1) @ F.normalize(prototypes.float(), dim=-1).transpose(1, 2)
    return 1 - similarity.amax(dim=-1)


class PrototypeExtractor(nn.Module):
    """Cross-attention from the prototypes to the tokens, then an MLP, each with a residual; one LayerNorm for both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, prototypes: Tensor, tokens: Tensor) -> Tensor:
        """prototypes: (B, M, C); tokens: (B, L, C). Returns (B, M, C)."""
        query, key, value = self.attention.heads_of(self.norm1(prototypes), self.norm1(tokens))
        x = prototypes + self.attention.join(F.scaled_dot_product_attention(query, key, value))
        return x + self.mlp(self.norm2(x))


class PrototypeBlock(nn.Module):
    """Tokens become combinations of the prototypes' values, then pass an MLP with residual; one LayerNorm for both."""

    def __init__(self, width: int, heads: int, attention: Attention, residual: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = CrossAttention(width, heads)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = FeedForward(width, 4 * width)
        self.kind = attention
        self.residual = residual

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """x: (B, L, C); prototypes: (B, M, C). Returns (B, L, C)."""
        query, key, value = self.attention.heads_of(self.norm1(x), self.norm1(prototypes))
        similarity = F.normalize(query.float(), dim=-1) @ F.normalize(key.float(), dim=-1).transpose(-2, -1)
        similarity = self.scale * similarity
        weights = F.relu(similarity) if self.kind == "relu" else similarity.softmax(dim=-1)
        rebuilt = self.attention.join(weights.to(value.dtype) @ value)
        x = x + rebuilt if self.residual else rebuilt
        return x + self.mlp(self.norm2(x))

    def extra_repr(self) -> str:
        return f"attention={self.kind}, residual={self.residual}"


class CrossAttention(nn.Module):
    """The linear layers around an attention from one set of tokens to another; what is between is the caller's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, heads, Lq, d), key and value (B, heads, Lk, d) of tokens (B, Lq, C) and (B, Lk, C)."""
        query = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(keys).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def join(self, attended: Tensor) -> Tensor:
        """(B, heads, Lq, d) to (B, Lq, C)."""
        return self.proj(attended.transpose(1, 2).flatten(2))


# The authors' names, first match wins.
_RELEASED = (
    (r"prototype_token$", "prototypes"),
    (r"bottleneck\.0\.fc1\.", "bottleneck.expand."),
    (r"bottleneck\.0\.fc2\.", "bottleneck.project."),
    (r"aggregation\.0\.attn\.", "extractor.attention."),
    (r"aggregation\.0\.(norm\d|mlp)\.", r"extractor.\1."),
    (r"decoder\.(\d+)\.attn\.learn_scale$", r"decoder.\1.scale"),
    (r"decoder\.(\d+)\.attn\.", r"decoder.\1.attention."),
    (r"decoder\.(\d+)\.(norm\d|mlp)\.", r"decoder.\1.\2."),
)


def released_name(name: str) -> str | None:
    """The name here of a parameter of the authors' model; None if it has none, as the encoder's."""
    return renamed(name, _RELEASED)
