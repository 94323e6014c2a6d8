"""Dinomaly's and Dinomaly2's reconstruction network.

Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection", CVPR 2025,
https://arxiv.org/abs/2405.14325, and "One Dinomaly2 Detect Them All", https://arxiv.org/abs/2510.17611. Where a paper is
silent this follows the released code, and says so.

Four ideas keep the network from copying its input: dropout in the bottleneck is the noise, linear attention cannot look
at one token alone, groups of layers are compared instead of layers, and the loss does not press on what is already
well reconstructed (`models/layers/mining.py`). Dinomaly2 makes the bottleneck narrow and takes the class token off the
target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.groups import group_means, layer_groups, means_suffice
from models.layers.linear_attention import linear_attention
from models.layers.masks import neighbor_mask
from models.layers.vit import NORM_EPSILON, FeedForward, NoisyBottleneck, head_count, initialise, one_width
from models.reconstruction import Pair, ReconstructionNetwork
from models.released import renamed

Attention = Literal["linear", "softmax"]


class Dinomaly(ReconstructionNetwork):
    """ViT blocks in, one pair per group of blocks out.

    Args:
        channels: width and (height, width) of each level, all equal, as a ViT's blocks give them.
        sizes: See `channels`.
        prefix_tokens: how many class and register tokens come with each level, the class token first; 0 = patches only.
        groups: of encoder and decoder layers that are averaged before they are compared ("loose constraint"): a number of
            equal groups, 2 in the paper and as many as levels for layer to layer, or lists of positions from 0. Decoder
            outputs are counted from the last, so that the last block answers for the first level.
        heads: of the decoder's attention; None = one per 64 channels.
        attention: `linear`, or `softmax` for the ablation.
        neighbor_size: side of the window hidden from each patch; None or 0 = no mask (the paper's). Class and register
            tokens are never hidden. With softmax the hidden weights are set to 0 after it and not renormalised, as in the
            released code.
        patch_tokens_only: drop class and register tokens before the bottleneck.
        dropout: of the bottleneck: 0.2, Real-IAD and Dinomaly2 0.4; 0 = no noise.
        narrow: width of the low-rank layer in front of the bottleneck: Dinomaly2's is 256; None = Dinomaly's bottleneck.
        recenter: Dinomaly2's target: the group's patches minus the group's class token, then LayerNorm without parameters.
        attention_epsilon: added to linear attention's divisor: 0, Dinomaly2 1e-8.

    Raises ValueError for levels of different widths or sizes, groups or a window that do not fit, an unknown attention,
    `recenter` without a class token, and numbers out of range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        prefix_tokens: int = 0,
        groups: int | Sequence[Sequence[int]] = 2,
        heads: int | None = None,
        attention: Attention = "linear",
        neighbor_size: int | None = None,
        patch_tokens_only: bool = False,
        dropout: float = 0.2,
        narrow: int | None = None,
        recenter: bool = False,
        attention_epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        width, self.grid = one_width(channels, sizes, "Dinomaly")
        if attention not in get_args(Attention):
            raise ValueError(f'attention names "{attention}"; choose from {", ".join(get_args(Attention))}.')
        if attention_epsilon < 0:
            raise ValueError(f"attention_epsilon must not be negative, found {attention_epsilon}.")
        if recenter and not prefix_tokens:
            raise ValueError(
                "recenter subtracts the class token, and prefix_tokens is 0: this backbone gives none. Choose a ViT "
                "with a class token, or recenter=false."
            )
        self.groups = layer_groups(groups, len(channels))
        self.fused_apart = not means_suffice(self.groups, len(channels))
        self.prefix_tokens = prefix_tokens
        self.prefix_used = 0 if patch_tokens_only else prefix_tokens
        self.recenter = recenter
        self.preparation = (
            f"means of levels {[list(group) for group in self.groups]}"
            + (" and of all" if self.fused_apart else "")
            + f", {prefix_tokens} prefix tokens"
        )
        mask = _mask_beside_prefix(self.grid, neighbor_size, self.prefix_used) if neighbor_size else None
        self.register_buffer("mask", mask, persistent=False)
        self.bottleneck = NoisyBottleneck(width, dropout, narrow)
        heads = head_count(width, heads)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, attention, attention_epsilon) for _ in channels)
        initialise(self)

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """Group means, and where those do not give the mean over all levels, that too: what the cache keeps.

        levels: (B, C, H, W) per level, then, with prefix tokens, (B, C, 1, prefix_tokens) per level. Returns the same
        order: maps, then prefix tokens.
        """
        count = len(self.decoder)
        prepared = []
        for part in (levels[:count], levels[count:]):
            if part:
                prepared += group_means(part, self.groups)
                if self.fused_apart:
                    prepared += group_means(part, (tuple(range(count)),))
        return prepared

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """features: as `prepare` returns them. Returns one pair of (B, C, H, W) per group, lowest levels first."""
        maps, prefixes = self._split(features)
        tokens = [self._tokens(patches, prefix) for patches, prefix in zip(maps, prefixes, strict=True)]
        count = len(self.groups)
        x = tokens[-1] if self.fused_apart else torch.stack(tokens).mean(dim=0)
        x = self.bottleneck(x)
        outputs = []
        for block in self.decoder:
            x = block(x, self.mask)
            outputs.append(x)
        answers = group_means(outputs[::-1], self.groups)  # the last block answers for the first level
        pairs = []
        for patches, prefix, answer in zip(maps[:count], prefixes[:count], answers, strict=True):
            reconstruction = answer[:, self.prefix_used :].transpose(1, 2).unflatten(2, self.grid)
            pairs.append(Pair(self._target(patches, prefix), reconstruction))
        return pairs

    def _split(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Maps, and the prefix tokens that belong to each."""
        count = len(self.groups) + self.fused_apart
        wanted = count * (2 if self.prefix_tokens else 1)
        if len(features) != wanted:
            raise ValueError(
                f"Dinomaly with {len(self.groups)} groups and {self.prefix_tokens} prefix tokens reads {wanted} prepared "
                f"tensors, found {len(features)}. Are they another configuration's cached features?"
            )
        prefixes = list(features[count:]) if self.prefix_tokens else [None] * count
        return list(features[:count]), prefixes

    def _tokens(self, patches: Tensor, prefix: Tensor | None) -> Tensor:
        """(B, prefix + H * W, C): the tokens that the decoder works on."""
        tokens = patches.flatten(2).transpose(1, 2)
        if prefix is None or not self.prefix_used:
            return tokens
        return torch.cat([prefix.flatten(2).transpose(1, 2), tokens], dim=1)

    def _target(self, patches: Tensor, prefix: Tensor | None) -> Tensor:
        if not self.recenter:
            return patches
        centred = (patches - prefix[:, :, :, :1]).movedim(1, -1)
        return F.layer_norm(centred, centred.shape[-1:], eps=NORM_EPSILON).movedim(-1, 1)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); LayerNorm with epsilon 1e-8, no LayerScale, no dropout."""

    def __init__(self, width: int, heads: int, attention: Attention, epsilon: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attention = SelfAttention(width, heads, attention, epsilon)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, C); mask: bool (L, L), True = visible. Returns (B, L, C)."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Linear or softmax self-attention; queries, keys and values come from one linear layer with bias."""

    def __init__(self, width: int, heads: int, attention: Attention = "linear", epsilon: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.kind = attention
        self.epsilon = epsilon
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, C); mask: bool (L, L), True = visible. Returns (B, L, C)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "linear":
            attended = linear_attention(query, key, value, mask, self.epsilon)
        elif mask is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:  # the released code hides after the softmax, so rows no longer sum to 1
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
            attended = (weights * mask) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, attention={self.kind}"


def _mask_beside_prefix(grid: tuple[int, int], window: int, prefix: int) -> Tensor:
    """The neighbour mask of the patches, with `prefix` tokens in front that see and are seen by all; bool (L, L)."""
    return F.pad(neighbor_mask(grid, window), (prefix, 0, prefix, 0), value=True)


# The authors' names, first match wins. The bottleneck's are Dinomaly's and Dinomaly2's.
_RELEASED = (
    (r"bottleneck\.0\.0\.", "bottleneck.narrow."),
    (r"bottleneck\.(0\.fc1|1\.0)\.", "bottleneck.expand."),
    (r"bottleneck\.(0\.fc2|1\.3)\.", "bottleneck.project."),
    (r"decoder\.(\d+)\.attn\.", r"decoder.\1.attention."),
    (r"decoder\.(\d+)\.(norm\d|mlp)\.", r"decoder.\1.\2."),
)


def released_name(name: str) -> str | None:
    """The name here of a parameter of the authors' model; None if it has none, as the encoder's."""
    return renamed(name, _RELEASED)
