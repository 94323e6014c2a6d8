"""UniAS: Towards Accurate Unified Anomaly Segmentation (WACV 2025, arXiv 2501.12295).

The supplement and its overview figure describe the method; the released code (github.com/Mwxinnn/UniAS) adds the
feature noise, the pyramid, the neighbour mask and the level embedding, about which the paper says nothing: they are on
by default. Where the two contradict each other the choice is an argument: `sar` and the loss's `cosine_term`.

Levels are counted 1 (finest) to L (coarsest) in the order in which the backbone gives them; with EfficientNet-B4 at
224x224 they are 24x112x112, 32x56x56, 56x28x28 and 160x14x14. Letters: B batch, L levels, w width, (h, v) token grid,
n = h * v tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.attention import MultiHeadAttention
from models.layers.blur import GaussianBlur
from models.layers.dropout import Dropout
from models.layers.jitter import FeatureJitter
from models.layers.linear_head import UpsampleConvolutions
from models.layers.masks import neighbor_mask
from models.layers.positions import normalized_sine_position
from models.reconstruction import Pair, ReconstructionNetwork
from models.released import renamed

FeatureFilter = Literal["none", "average", "gaussian", "gaussian_residual"]
SampleAwareReweighting = Literal["none", "supplement", "released", "capacity_control"]
Attention = Literal["dual", "spatial"]
Hybrid = Literal["none", "conv3", "mg_cnn", "mgg_cnn"]
CosineTerm = Literal["distance", "as_released"]


class UniAS(ReconstructionNetwork):
    """Reconstructs the filtered features of several levels from coarse to fine.

    Args:
        channels: Channels of every level, finest first.
        sizes: (height, width) of every level, finest first. The token grid is the size of the coarsest level, and every
            other size must be a whole multiple of it.
        levels: The levels that are reconstructed (supplement Table 4); None = all. Only these have a Transformer layer,
            a head and a target. The pyramid is unchanged for them, except that its levels below the lowest of
            `levels`, which reach no output, are not built.
        width: Token width (supplement: 256), a multiple of 32.
        heads: Heads of the attention over positions (supplement: 4).
        channel_heads: Heads of the attention over channels, whose tokens have n dimensions; None = the largest divisor
            of n up to `heads`.
        feedforward: Hidden width of every feed-forward block (supplement: 2048).
        dropout: In attention weights, residual branches and feed-forward blocks (released code: 0.1).
        encoder_layers: Of the encoder on top of the pyramid (released code: 3).
        neighbor_size: Side, or (height, width), of the window hidden in attention over positions (released code: 7);
            0 = nothing is hidden.
        feature_filter: What the network sees and reconstructs, see `FeatureFiltering`: `gaussian_residual`
            (supplement), `gaussian`, `average` or `none`.
        jitter_scale: Of the noise on the network's input in training (released code: 20), see `models.layers.jitter`.
        jitter_probability: Of that noise, drawn per level and batch (released code: 0.5).
        jitter_at_test: Keep the noise in evaluation, as the released code does on its path without a filter.
        sar: How the first query is made, see `SampleAwareQuery`. `released` is the default because the authors'
            checkpoints and parameter count need it; `supplement`, `none` and `capacity_control` are the others.
        attention: `dual` (supplement) or `spatial` (the released VisA configuration).
        cross_first: Cross-attention before self-attention (released configuration).
        hybrid: What follows every Transformer layer: `none`, `conv3`, `mg_cnn` or `mgg_cnn`, see `hybrid_block`.
        folded_heads: Compute the heads at the size of the token grid, with the same result, see
            `UpsampleConvolutions`; None = where it saves work.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        levels: Sequence[int] | None = None,
        width: int = 256,
        heads: int = 4,
        channel_heads: int | None = None,
        feedforward: int = 2048,
        dropout: float = 0.1,
        encoder_layers: int = 3,
        neighbor_size: int | tuple[int, int] = 7,
        feature_filter: FeatureFilter = "gaussian_residual",
        jitter_scale: float = 20.0,
        jitter_probability: float = 0.5,
        jitter_at_test: bool = False,
        sar: SampleAwareReweighting = "released",
        attention: Attention = "dual",
        cross_first: bool = True,
        hybrid: Hybrid = "mgg_cnn",
        folded_heads: bool | None = None,
    ) -> None:
        super().__init__()
        _check_choice("sar", sar, SampleAwareReweighting)
        _check_choice("attention", attention, Attention)
        if width % 32 or width % heads:
            raise ValueError(f"width must be a multiple of 32 and of heads={heads}, found {width}.")
        self.channels = [int(c) for c in channels]
        self.sizes = [(int(rows), int(columns)) for rows, columns in sizes]
        self.grid = self.sizes[-1]
        self.levels = _check_levels(levels, len(self.channels))
        self.jitter_at_test = jitter_at_test
        _check_sizes(self.channels, self.sizes)
        top, tokens = len(self.channels), self.grid[0] * self.grid[1]

        self.filter = FeatureFiltering(feature_filter)
        self.jitter = FeatureJitter(jitter_scale, jitter_probability, dim=1)
        self.pyramid = FeaturePyramid(
            [count * self.filter.expansion for count in self.channels],
            self.sizes,
            lowest=self.levels[0],
            width=width,
            heads=heads,
            feedforward=feedforward,
            dropout=dropout,
            encoder_layers=encoder_layers,
        )
        self.patch_embeddings = nn.ModuleDict(
            {str(level): PatchEmbedding(width, top - level, self._patch_size(level)) for level in self.levels}
        )
        self.level_embedding = nn.Parameter(torch.randn(len(self.levels), width))  # row 0 = the coarsest of the levels
        self.query = SampleAwareQuery(width, self.grid, sar)
        self.query_position = nn.Parameter(torch.randn(tokens, width))
        self.register_buffer("position", normalized_sine_position(width, self.grid), persistent=False)
        visible = neighbor_mask(self.grid, neighbor_size) if neighbor_size else None
        self.register_buffer("visible", visible, persistent=False)

        def per_level(build: Callable[[int], nn.Module]) -> nn.ModuleDict:
            return nn.ModuleDict({str(level): build(level) for level in self.levels})

        channel_heads = channel_heads or max(count for count in range(1, heads + 1) if tokens % count == 0)
        self.transformers = per_level(
            lambda _: DualAttentionLayer(
                width,
                tokens,
                heads,
                channel_heads,
                feedforward,
                dropout,
                channel_branch=attention == "dual",
                cross_first=cross_first,
            )
        )
        self.hybrids = per_level(lambda _: hybrid_block(hybrid, width))
        self.norm = nn.LayerNorm(width)  # one for all levels
        self.heads = per_level(
            lambda level: UpsampleConvolutions(
                width, self.channels[level - 1], self.grid, self.sizes[level - 1], folded_heads
            )
        )
        for convolutional in (self.pyramid, self.patch_embeddings):  # 3 % faster on CPUs, 6 % in bfloat16
            convolutional.to(memory_format=torch.channels_last)

    def _patch_size(self, level: int) -> tuple[int, int]:
        return self.sizes[level - 1][0] // self.grid[0], self.sizes[level - 1][1] // self.grid[1]

    def forward(self, features: Sequence[Tensor]) -> list[Pair]:
        """Pairs of `levels`, finest first, from features (B, C_l, H_l, W_l) of every level, finest first.

        Under autocast the trained layers run in its dtype; targets and reconstructions are float32 all the same.
        """
        self._check_features(features)
        lowest = self.levels[0]
        inputs, targets = self.filter(features[lowest - 1 :])
        inputs = [self.jitter(x).contiguous(memory_format=torch.channels_last) for x in inputs]
        pyramid = self.pyramid(inputs)
        embedded = {
            level: self.patch_embeddings[str(level)](pyramid[level]) + embedding
            for level, embedding in zip(reversed(self.levels), self.level_embedding, strict=True)
        }
        query = self.query(pyramid[len(self.channels)], embedded[self.levels[-1]])
        reconstructions = {}
        for level in reversed(self.levels):  # coarse to fine, supplement Fig. 1
            key = str(level)
            query = self.transformers[key](query, embedded[level], self.query_position, self.position, self.visible)
            query = _to_tokens(self.hybrids[key](_to_grid(query, self.grid)))
            reconstructions[level] = self.heads[key](_to_grid(self.norm(query), self.grid)).float()
        return [Pair(targets[level - lowest].float(), reconstructions[level]) for level in self.levels]

    def train(self, mode: bool = True) -> UniAS:
        super().train(mode)
        if self.jitter_at_test:
            self.jitter.train()
        return self

    def _check_features(self, features: Sequence[Tensor]) -> None:
        found = [tuple(level.shape[1:]) for level in features]
        expected = [(count, *size) for count, size in zip(self.channels, self.sizes, strict=True)]
        if found != expected:
            raise ValueError(
                f"UniAS was built for features (channels, height, width) {expected}, finest first, but found {found}. "
                "Give images of the size that the network was built for."
            )


def reconstruction_loss(pairs: Sequence[Pair], weight: float = 10.0, cosine_term: CosineTerm = "distance") -> Tensor:
    """weight * sum over levels of (mean squared error + cosine term), a float32 scalar.

    cosine_term: `distance` = mean over positions of 1 - cos, as the overview figure says; `as_released` = mean of
        cos, the sign that the released code computes, with which a perfect reconstruction costs 1 per level.
    weight: released code, 10 for MVTec AD and 1 for VisA.
    """
    _check_choice("cosine_term", cosine_term, CosineTerm)
    total = pairs[0].target.new_zeros((), dtype=torch.float32)
    with torch.autocast(pairs[0].target.device.type, enabled=False):
        for target, reconstruction in pairs:
            target, reconstruction = target.float(), reconstruction.float()
            cosine = F.cosine_similarity(reconstruction, target, dim=1).mean()
            total = total + F.mse_loss(reconstruction, target) + (1 - cosine if cosine_term == "distance" else cosine)
    return weight * total


class FeatureFiltering(nn.Module):
    """Input X and target T of every level from its features F (supplement Table 3, columns Filter and Concat).

    `none`: X = T = F. `average`: X = T = mean over 3x3, where zeros outside count (released code). `gaussian`: X = T =
    G(F), 3x3, sigma 1, reflected border. `gaussian_residual`: T = G(F), X = [T ; F - T], twice the channels.
    """

    def __init__(self, kind: FeatureFilter = "gaussian_residual") -> None:
        super().__init__()
        _check_choice("feature_filter", kind, FeatureFilter)
        self.kind = kind
        self.expansion = 2 if kind == "gaussian_residual" else 1
        self.blur = GaussianBlur(1.0, 3, border="reflect") if kind.startswith("gaussian") else None

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(B, C_l, H_l, W_l) per level -> inputs (B, C_l or 2 C_l, H_l, W_l), targets (B, C_l, H_l, W_l)."""
        targets = [self._smooth(level) for level in features]
        if self.expansion == 1:
            return targets, targets
        return [torch.cat([t, f - t], dim=1) for f, t in zip(features, targets, strict=True)], targets

    def _smooth(self, level: Tensor) -> Tensor:
        if self.kind == "average":
            return F.avg_pool2d(level, 3, stride=1, padding=1)
        return level if self.kind == "none" else self.blur(level)

    def extra_repr(self) -> str:
        return self.kind


class FeaturePyramid(nn.Module):
    """Top-down pyramid with a Transformer encoder at its top (released code, after MaskFormer's pixel decoder).

    X_l (B, channels_l, H_l, W_l) -> {level: Y_l (B, width, H_l, W_l)}, both for the levels from `lowest` up.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        lowest: int,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        encoder_layers: int,
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.lowest, self.top = lowest, len(channels)
        self.finer = list(range(self.top - 1, lowest - 1, -1))
        self.top_projection = _kaiming(nn.Conv2d(channels[-1], width, 1))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, feedforward, dropout) for _ in range(encoder_layers))
        self.register_buffer("position", normalized_sine_position(width, sizes[-1]), persistent=False)
        self.top_output = _kaiming(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.lateral, self.output = nn.ModuleDict(), nn.ModuleDict()
        for level in self.finer:
            lateral = nn.Conv2d(channels[level - 1], width, 1, bias=False)
            output = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.lateral[str(level)] = nn.Sequential(_kaiming(lateral), nn.GroupNorm(32, width))
            self.output[str(level)] = nn.Sequential(_kaiming(output), nn.GroupNorm(32, width), nn.ReLU())

    def forward(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        tokens = _to_tokens(self.top_projection(inputs[-1]))
        for layer in self.encoder:
            tokens = layer(tokens, self.position)
        y = F.relu(self.top_output(_to_grid(tokens, self.sizes[-1])))
        outputs = {self.top: y}
        for level in self.finer:
            y = F.interpolate(y, size=self.sizes[level - 1], mode="bilinear", align_corners=False)
            y = self.output[str(level)](self.lateral[str(level)](inputs[level - self.lowest]) + y)
            outputs[level] = y
        return outputs


class EncoderLayer(nn.Module):
    """Standard post-norm encoder layer; positions are added to queries and keys. (B, n, w) -> (B, n, w)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = Residual(MultiHeadAttention(width, heads, dropout), width, dropout)
        self.feedforward = Residual(FeedForward(width, feedforward, dropout), width, dropout)
        _xavier(self)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        tokens = self.attention(tokens, tokens, tokens, query_position=position, key_position=position)
        return self.feedforward(tokens)


class PatchEmbedding(nn.Module):
    """One token per patch (supplement: patches of 8, 4, 2, 1), (B, w, H_l, W_l) -> (B, n, w).

    Args:
        steps: levels below the coarsest: the patch convolution of the levels 3, 2, 1 has 1, 1.5 and 2 times the width

    (released code); the coarsest level has none. A 1x1 convolution follows.
    """

    def __init__(self, width: int, steps: int, patch: tuple[int, int]) -> None:
        super().__init__()
        hidden = width * (steps + 1) // 2 if steps else width
        self.patches = nn.Conv2d(width, hidden, patch, stride=patch) if steps else nn.Identity()
        if steps:
            nn.init.xavier_uniform_(self.patches.weight.view(hidden, -1))
            nn.init.zeros_(self.patches.bias)
        self.projection = _kaiming(nn.Conv2d(hidden, width, 1))

    def forward(self, y: Tensor) -> Tensor:
        return _to_tokens(self.projection(self.patches(y)))


class SampleAwareQuery(nn.Module):
    """The first query (B, n, w): a learned table, reweighted for every sample (SAR).

    `none`: the table alone, the same for every sample.
    `supplement`: W_s * W_c * table; W_c = sigmoid(MLP(avg + max over positions)), W_s = sigmoid(conv7x7([avg ; max]
        over channels)) of the highest patch embedding.
    `released`: (W_c + W_s) * table of twice the size, fused by an MGG-CNN; the weights come from a 3x3 convolution of
        the pyramid's top, and the MLP is applied to avg and max apart, before they are added.
    `capacity_control`: `released` with W_c = W_s = 1: its table and fusion, but nothing about the sample.
    """

    def __init__(self, width: int, grid: tuple[int, int], sar: SampleAwareReweighting) -> None:
        super().__init__()
        self.grid, self.sar = grid, sar
        copies = 2 if sar in ("released", "capacity_control") else 1
        self.table = nn.Parameter(torch.randn(copies * grid[0] * grid[1], width))  # row r * n + p: copy r of position p
        if sar in ("supplement", "released"):
            hidden = width // 2
            self.channel_weight = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
            self.spatial_weight = nn.Conv2d(2, 1, 7, padding=3)
        if copies == 2:
            self.fusion = MultiGranularity(2 * width, width, gated=True)
        _xavier(self)
        if sar == "released":
            self.guide = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, top: Tensor, embedding: Tensor) -> Tensor:
        """top: the pyramid's coarsest output (B, w, h, v). embedding: the coarsest patch embedding (B, n, w)."""
        B, n, w = embedding.shape
        if self.sar == "none":
            return self.table.expand(B, n, w)
        if self.sar == "supplement":
            mean, peak = embedding.mean(1), embedding.amax(1)
            channel = self.channel_weight(mean + peak).sigmoid()
            return self._spatial(_to_grid(embedding, self.grid)) * channel[:, None] * self.table
        if self.sar == "released":
            guide = self.guide(top)
            mean, peak = guide.mean((2, 3)), guide.amax((2, 3))
            channel = (self.channel_weight(mean) + self.channel_weight(peak)).sigmoid()
            weight = channel[:, None] + self._spatial(guide)
        else:
            weight = self.table.new_full((B, 1, 1), 2.0)
        tables = weight[:, None] * self.table.view(2, n, w)  # (B, 2, n, w)
        return _to_tokens(self.fusion(tables.permute(0, 3, 1, 2).reshape(B, 2 * w, *self.grid)))

    def _spatial(self, guide: Tensor) -> Tensor:
        """(B, w, h, v) -> weight of every position (B, n, 1)."""
        pooled = torch.cat([guide.mean(1, keepdim=True), guide.amax(1, keepdim=True)], dim=1)
        return _to_tokens(self.spatial_weight(pooled)).sigmoid()

    def extra_repr(self) -> str:
        return f"sar={self.sar}"


class DualAttentionLayer(nn.Module):
    """Spatial attention over n tokens of w, plus channel attention over w tokens of n (supplement; released code).

    query, embedding: (B, n, w) -> (B, n, w), the sum of the two branches, without a norm. Only the spatial branch has
    a mask and a position code for its query.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        heads: int,
        channel_heads: int,
        feedforward: int,
        dropout: float,
        channel_branch: bool,
        cross_first: bool,
    ) -> None:
        super().__init__()
        self.spatial = AttentionBranch(width, heads, feedforward, dropout, cross_first)
        self.channel = (
            AttentionBranch(tokens, channel_heads, feedforward, dropout, cross_first) if channel_branch else None
        )
        _xavier(self)

    def forward(
        self, query: Tensor, embedding: Tensor, query_position: Tensor, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        spatial = self.spatial(query, embedding, query_position, position, visible)
        if self.channel is None:
            return spatial
        return spatial + self.channel(query.mT, embedding.mT, None, position.mT, None).mT


class AttentionBranch(nn.Module):
    """Cross-attention to the embedding, self-attention and feed-forward, each with a post-norm residual."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, cross_first: bool) -> None:
        super().__init__()
        self.cross_first = cross_first
        self.cross = Residual(MultiHeadAttention(width, heads, dropout), width, dropout)
        self.own = Residual(MultiHeadAttention(width, heads, dropout), width, dropout)
        self.feedforward = Residual(FeedForward(width, feedforward, dropout), width, dropout)

    def forward(
        self, query: Tensor, embedding: Tensor, query_position: Tensor | None, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        def cross(q: Tensor) -> Tensor:
            return self.cross(
                q, embedding, embedding, query_position=query_position, key_position=position, mask=visible
            )

        def own(q: Tensor) -> Tensor:
            return self.own(q, q, q, query_position=query_position, key_position=query_position, mask=visible)

        query = own(cross(query)) if self.cross_first else cross(own(query))
        return self.feedforward(query)


class Residual(nn.Module):
    """LayerNorm(x + dropout(block(x, ...)))."""

    def __init__(self, block: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.block = block
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, *args: Tensor, **positions: Tensor | None) -> Tensor:
        return self.norm(x + self.dropout(self.block(x, *args, **positions)))


class FeedForward(nn.Sequential):
    """(B, n, w) -> (B, n, w) over a hidden layer with ReLU and dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, width))


def hybrid_block(kind: Hybrid, width: int) -> nn.Module:
    """What follows a Transformer layer, (B, w, h, v) -> (B, w, h, v) (supplement Table 3, column Hybrid).

    `none`: nothing. `conv3`: one 3x3 convolution. `mg_cnn`: four branches of growing receptive field, added.
    `mgg_cnn`: each branch gated by a GELU before the sum. No block has a residual connection.
    """
    _check_choice("hybrid", kind, Hybrid)
    if kind == "none":
        return nn.Identity()
    block = (
        nn.Conv2d(width, width, 3, padding=1) if kind == "conv3" else MultiGranularity(width, width, kind == "mgg_cnn")
    )
    return _xavier(block)


class MultiGranularity(nn.Module):
    """MG-CNN and, gated, MGG-CNN: linear branches with receptive fields 1, 3, 5, 7, each with a final GELU if gated."""

    def __init__(self, in_channels: int, out_channels: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(in_channels, out_channels, 1))])
        for depth in (1, 2, 3):
            self.branches.append(
                nn.Sequential(
                    *(
                        nn.Conv2d(in_channels if step == 0 else out_channels, out_channels, 3, padding=1)
                        for step in range(depth)
                    )
                )
            )

    def forward(self, grid: Tensor) -> Tensor:
        outputs = [branch(grid) for branch in self.branches]
        return sum(F.gelu(output) for output in outputs) if self.gated else sum(outputs)

    def extra_repr(self) -> str:
        return f"gated={self.gated}"


def _to_tokens(grid: Tensor) -> Tensor:
    """(B, c, h, v) -> (B, h * v, c)."""
    return grid.flatten(2).mT


def _to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * v, c) -> (B, c, h, v)."""
    return tokens.mT.unflatten(2, grid)


def _xavier(module: nn.Module) -> nn.Module:
    """Xavier-uniform for every matrix and kernel of the module, as the released code does; biases keep their start."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(child.weight)
    return module


def _kaiming(convolution: nn.Conv2d) -> nn.Conv2d:
    """Kaiming-uniform with a = 1 and no bias to start from."""
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f'{name} is "{value}"; choose one of {", ".join(get_args(choices))}.')


def _check_levels(levels: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(1, count + 1)) if levels is None else sorted(int(level) for level in levels)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(1, count + 1)):
        raise ValueError(f"levels must be different numbers from 1 (finest) to {count} (coarsest), found {levels}.")
    return chosen


def _check_sizes(channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
    if len(channels) != len(sizes):
        raise ValueError(f"channels and sizes must name the same levels, found {len(channels)} and {len(sizes)}.")
    rows, columns = sizes[-1]
    finest_first = all(finer >= coarser for finer, coarser in pairwise(sizes))
    if not finest_first or any(height % rows or width % columns for height, width in sizes):
        raise ValueError(
            "UniAS cuts every level into as many patches as the coarsest level has pixels, so each size must be a "
            f"whole multiple of the coarsest one, finest first; found {list(sizes)}. Choose an image size that is a "
            "multiple of the coarsest level's stride (16 for EfficientNet-B4)."
        )


# The released code counts levels from the coarsest, from 0; only its pyramid counts them from the finest, from 1.
_ENCODER = r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\."
_BLOCK = r"predictor\.transformer_block\.(\d)\.(Spatial|Channel)"
_RELEASED = (
    (r"pixel_decoder\.input_proj\.", r"pyramid.top_projection."),
    (r"pixel_decoder\.layer_4\.", r"pyramid.top_output."),
    (r"pixel_decoder\.adapter_(\d)\.norm\.", r"pyramid.lateral.\1.1."),
    (r"pixel_decoder\.adapter_(\d)\.", r"pyramid.lateral.\1.0."),
    (r"pixel_decoder\.layer_(\d)\.norm\.", r"pyramid.output.\1.1."),
    (r"pixel_decoder\.layer_(\d)\.", r"pyramid.output.\1.0."),
    (_ENCODER + r"self_attn\.", r"pyramid.encoder.\1.attention.block."),
    (_ENCODER + r"norm1\.", r"pyramid.encoder.\1.attention.norm."),
    (_ENCODER + r"linear1\.", r"pyramid.encoder.\1.feedforward.block.0."),
    (_ENCODER + r"linear2\.", r"pyramid.encoder.\1.feedforward.block.3."),
    (_ENCODER + r"norm2\.", r"pyramid.encoder.\1.feedforward.norm."),
    (r"predictor\.patch_embed\.(\d)\.proj\.", r"patch_embeddings.<\1>.patches."),
    (r"predictor\.input_proj\.(\d)\.", r"patch_embeddings.<\1>.projection."),
    (r"predictor\.level_embed_src\.weight$", r"level_embedding"),
    (r"predictor\.spatial_query_feat\.weight$", r"query.table"),
    (r"predictor\.spatial_query_embed\.weight$", r"query_position"),
    (r"predictor\.feature_projector\.", r"query.guide."),
    (r"predictor\.query_processor\.channel_weight\.agg\.layers\.0\.", r"query.channel_weight.0."),
    (r"predictor\.query_processor\.channel_weight\.agg\.layers\.1\.", r"query.channel_weight.2."),
    (r"predictor\.query_processor\.channel_weight\.agg\.layers\.2\.", r"query.channel_weight.4."),
    (r"predictor\.query_processor\.spatial_weight\.conv\.", r"query.spatial_weight."),
    (r"predictor\.query_processor\.adaptor\.conv([01])\.", r"query.fusion.branches.\1.0."),
    (r"predictor\.query_processor\.adaptor\.conv([23])\.", r"query.fusion.branches.\1."),
    (r"predictor\.layer_adaptors\.(\d)\.conv([01])\.", r"hybrids.<\1>.branches.\2.0."),
    (r"predictor\.layer_adaptors\.(\d)\.conv([23])\.", r"hybrids.<\1>.branches.\2."),
    (_BLOCK + r"CrossAttnLayer\.multihead_attn\.", r"transformers.<\1>.\2.cross.block."),
    (_BLOCK + r"CrossAttnLayer\.norm\.", r"transformers.<\1>.\2.cross.norm."),
    (_BLOCK + r"SelfAttnLayer\.self_attn\.", r"transformers.<\1>.\2.own.block."),
    (_BLOCK + r"SelfAttnLayer\.norm\.", r"transformers.<\1>.\2.own.norm."),
    (_BLOCK + r"FFNLayer\.linear1\.", r"transformers.<\1>.\2.feedforward.block.0."),
    (_BLOCK + r"FFNLayer\.linear2\.", r"transformers.<\1>.\2.feedforward.block.3."),
    (_BLOCK + r"FFNLayer\.norm\.", r"transformers.<\1>.\2.feedforward.norm."),
    (r"predictor\.decoder_norm\.", r"norm."),
    (r"predictor\.out_agg\.(\d)\.1\.", r"heads.<\1>.convolutions.0."),
    (r"predictor\.out_agg\.(\d)\.2\.", r"heads.<\1>.convolutions.1."),
    (r"predictor\.out_agg\.(\d)\.3\.", r"heads.<\1>.convolutions.2."),
)


def released_name(name: str) -> str | None:
    """The name here of a parameter of the authors' pixel decoder and predictor; None if it has none."""
    own = renamed(name, _RELEASED)
    if own is None:
        return None
    own = own.replace("Spatial", "spatial").replace("Channel", "channel")
    return re.sub(r"<(\d)>", lambda index: str(4 - int(index[1])), own)
