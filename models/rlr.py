"""RLR: He et al., "Learning Unified Reference Representation for Unsupervised Multi-class Anomaly Detection",
ECCV 2024, https://arxiv.org/abs/2403.11561 (released code: https://github.com/hlr7999/RLR).

One independent network per feature level, each with a learnable reference R in feature space. Every layer reads R
twice: LCA (local cross attention) takes keys and values from R inside a window, MLKA (masked learnable key attention)
takes its keys from R and its values from the input, everywhere but in that window. The two are summed, and **no
residual** carries the input past them, so a feature can only be rebuilt from the reference or from places that are not
its neighbours.

Where the released code decides something that the paper leaves open, the option's description says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import MultiHeadAttention
from models.layers.positions import integer_sine_position
from models.reconstruction import Pair, ReconstructionNetwork

BLOCKS = ("lca", "ca", "msa", "mlka", "sa")  # the order of the fusion weights' columns, as released
CROSS_BLOCKS = ("lca", "ca")  # what alpha multiplies
REFERENCE_BLOCKS = ("lca", "ca", "mlka")
DENSE_TOKENS = 1024  # grids up to this many tokens attend in one call; larger ones in blocks of rows
BLOCK_TOKENS = 512


class RLRNetwork(ReconstructionNetwork):
    """Reconstructs each feature level by its own `LevelNetwork`; levels share nothing.

    Args:
        channels: C of each level.
        sizes: (H, W) of each level's grid.
        widths: token width d of each level; the released rule is 32 * stride (`released_width`). None: that rule for
            levels of which the last has stride 16, so 512 for it and half for each doubling of the grid.
        windows: side of the square window of each level, odd. None: `window_side` of the grid.
        layers: layers per level (README command of the released code; its argparse default is 3).
        heads: attention heads, a divisor of every width.
        blocks: the parallel attentions of a layer, out of
            `lca` (Y reads R, inside the window), `mlka` (values of Y routed by keys of R, outside the window),
            `ca` (Y reads all of R), `msa` (self-attention of Y outside the window), `sa` (plain self-attention of Y).
        fusion: how the attentions are summed. `alpha`: constants, alpha for lca and ca, 1 for the rest. `theta`:
            learnable scalars per layer and attention, unconstrained, all starting at 1 (released, so it starts as
            alpha = 1). `theta_from_alpha`: the same, starting at alpha's constants. `gate_net`: softmax weights per
            sample from the layer input's mean and maximum over tokens, by a small net that the level's layers share.
        alpha: 2 in the released code; the paper's supplement gives no value. Not used by theta and gate_net.
        references: K, the number of references per level. LCA is evaluated for each and summed.
        key_reference: the reference that `mlka` and `ca` read if K > 1: `last` (released, where a loop variable
            overwrites the reference), `first`, or `mean` of the embedded references.
        pooling: average the features over 3x3 first (stride 1, padded zeros counted); input and target are the result.
        corruption: what happens to the input tokens in training mode: `jitter` (Gaussian, `feature_jitter`),
            `masking` (tokens set to zero, `token_masking`) or `none`.
        jitter_scale: the released README command's 4 (argparse default 0).
        corruption_probability: share of each sample's tokens that is jittered or masked.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        widths: Sequence[int] | None = None,
        windows: Sequence[int] | None = None,
        layers: int = 4,
        heads: int = 8,
        blocks: Sequence[Literal["lca", "ca", "msa", "mlka", "sa"]] = ("lca", "mlka"),
        fusion: Literal["alpha", "theta", "theta_from_alpha", "gate_net"] = "alpha",
        alpha: float = 2.0,
        references: int = 1,
        key_reference: Literal["last", "first", "mean"] = "last",
        pooling: bool = True,
        corruption: Literal["jitter", "masking", "none"] = "jitter",
        jitter_scale: float = 4.0,
        corruption_probability: float = 1.0,
    ) -> None:
        super().__init__()
        widths = widths or [512 >> round(math.log2(height / sizes[-1][0])) for height, _ in sizes]
        windows = windows or [window_side(size) for size in sizes]
        for name, values in (("channels", channels), ("widths", widths), ("windows", windows)):
            if len(values) != len(sizes):
                raise ValueError(
                    f"{name} has {len(values)} entries for {len(sizes)} levels, {list(values)}; give one each"
                )
        if corruption not in ("jitter", "masking", "none"):
            raise ValueError(f"corruption is {corruption!r}; choose jitter, masking or none")
        if not 0 <= corruption_probability <= 1:
            raise ValueError(f"corruption_probability is {corruption_probability}; it is a share, from 0 to 1")
        if corruption == "masking" and corruption_probability == 1:
            raise ValueError(
                "corruption masking with corruption_probability 1 zeroes every token; choose a smaller share"
            )
        self.pool = nn.AvgPool2d(3, stride=1, padding=1) if pooling else nn.Identity()
        self.corruption, self.jitter_scale, self.probability = corruption, jitter_scale, corruption_probability
        self.levels = nn.ModuleList(
            LevelNetwork(c, size, width, window, layers, heads, blocks, fusion, alpha, references, key_reference)
            for c, size, width, window in zip(channels, sizes, widths, windows, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Pair]:
        """Levels (B, C_l, H_l, W_l) float -> per level the pooled clean features and their reconstruction, as large."""
        return [self.reconstruct(network, feature) for network, feature in zip(self.levels, features, strict=True)]

    def reconstruct(self, network: LevelNetwork, feature: Tensor) -> Pair:
        """One level's network and its feature map (B, C, H, W) -> pooled clean target and reconstruction, as large."""
        target = self.pool(feature)
        tokens = target.flatten(2).transpose(1, 2)
        if self.training:
            tokens = self._corrupt(tokens)
        reconstruction = network(tokens).transpose(1, 2).reshape(target.shape)
        return Pair(target, reconstruction)

    def _corrupt(self, tokens: Tensor) -> Tensor:
        if self.corruption == "jitter":
            return feature_jitter(tokens, self.jitter_scale, self.probability)
        if self.corruption == "masking":
            return token_masking(tokens, self.probability)
        return tokens


class LevelNetwork(nn.Module):
    """RLR for one level: embedding, layers that read the reference, layer norm, projection back to C."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        width: int,
        window: int,
        layers: int = 4,
        heads: int = 8,
        blocks: Sequence[str] = ("lca", "mlka"),
        fusion: str = "alpha",
        alpha: float = 2.0,
        references: int = 1,
        key_reference: str = "last",
        block_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = tuple(name for name in BLOCKS if name in blocks)
        self._check(size, width, window, heads, blocks, fusion, references, key_reference)
        self.references, self.key_reference = references, key_reference
        self.embedding = Embedding(channels, width, size)
        self.reference: nn.Parameter | None = None
        if set(self.blocks) & set(REFERENCE_BLOCKS):
            self.reference = nn.Parameter(torch.randn(1, references * size[0] * size[1], channels))
            self.reference_embedding = Embedding(channels, width, size)
        # Masks are built once for the level; its layers share them.
        self.window = WindowAttention(size, window, inside=True, block_rows=block_rows)
        self.elsewhere = WindowAttention(size, window, inside=False, block_rows=block_rows)
        self.layers = nn.ModuleList(Layer(width, heads, self.blocks) for _ in range(layers))
        self.fusion = Fusion(fusion, self.blocks, layers, width, alpha)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L, C) float, row-major over the grid -> reconstructed tokens (B, L, C)."""
        y = self.embedding(tokens)
        references = None if self.reference is None else self.reference_embedding(self._raw_references())  # (K, L, d)
        key = None if references is None else self._key(references)  # (1, L, d)
        for index, layer in enumerate(self.layers):
            y = layer(y, references, key, self.window, self.elsewhere, self.fusion(index, y))
        return self.projection(self.norm(y))

    def _raw_references(self) -> Tensor:
        """The K references in feature space, (K, L, C)."""
        return self.reference[0].unflatten(0, (self.references, -1))

    def _key(self, references: Tensor) -> Tensor:
        if self.key_reference == "mean":
            return references.mean(0, keepdim=True)
        return references[:1] if self.key_reference == "first" else references[-1:]

    def diversity(self, normaliser: Literal["released", "pairs"] = "released") -> Tensor:
        """How alike the level's K references are: the sum over pairs of their mean cosine over tokens, on raw R.

        `released` divides by K (K - 1) and `pairs` by the number of pairs, K (K - 1) / 2, so the first is half of the
        mean over pairs. In [-1, 1]; 0 for a single reference. Supplement, section on multiple references.
        """
        if normaliser not in ("released", "pairs"):
            raise ValueError(f"normaliser is {normaliser!r}; choose released or pairs")
        count = self.references
        if count < 2:
            return self.projection.bias.new_zeros(())
        first, second = torch.triu_indices(count, count, offset=1)
        references = self._raw_references()
        cosines = F.cosine_similarity(references[first], references[second], dim=-1).mean(1)
        return cosines.sum() / (count * (count - 1)) if normaliser == "released" else cosines.mean()

    def _check(
        self,
        size: tuple[int, int],
        width: int,
        window: int,
        heads: int,
        blocks: Sequence[str],
        fusion: str,
        references: int,
        key_reference: str,
    ) -> None:
        unknown = set(blocks) - set(BLOCKS)
        if unknown or not blocks:
            raise ValueError(f"blocks is {list(blocks)}; choose one or more of {', '.join(BLOCKS)}")
        for name, value, allowed in (
            ("fusion", fusion, ("alpha", "theta", "theta_from_alpha", "gate_net")),
            ("key_reference", key_reference, ("last", "first", "mean")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of heads ({heads}) and of 4 (sine code of two axes)")
        if references < 1 or (references > 1 and "lca" not in blocks):
            raise ValueError(
                f"references is {references} with blocks {list(blocks)}; "
                "K must be at least 1, and K > 1 needs lca, the only block that reads every reference"
            )
        if window % 2 == 0 or window < 1:
            raise ValueError(f"window is {window}; it is centred on a token, so its side is odd")
        masked = [name for name in ("msa", "mlka") if name in blocks]
        if masked and all(window // 2 >= side // 2 for side in size):
            raise ValueError(
                f"a {window}x{window} window around the centre of a {size[0]}x{size[1]} grid covers all of it, so "
                f"{' and '.join(masked)} would have nothing to attend to; use a smaller window or a larger image"
            )


class Layer(nn.Module):
    """Z = LN(sum of weighted attentions), Y' = LN(Z + FFN(Z)); the attentions have no residual."""

    def __init__(self, width: int, heads: int, blocks: Sequence[str]) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: ReferenceAttention(width, heads) for name in blocks})
        self.norm1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        y: Tensor,
        references: Tensor | None,
        key: Tensor | None,
        window: WindowAttention,
        elsewhere: WindowAttention,
        weights: Tensor,
    ) -> Tensor:
        """y (B, L, d), references (K, L, d), key (1, L, d), weights (blocks,) or (blocks, B, 1, 1) -> (B, L, d)."""
        z = torch.zeros_like(y)
        for (name, attention), weight in zip(self.attention.items(), weights, strict=True):
            if name == "lca":
                out = sum(attention(y, reference, reference, window) for reference in references.split(1))
            elif name == "ca":
                out = attention(y, key, key, F.scaled_dot_product_attention)
            elif name == "msa":
                out = attention(y, y, y, elsewhere)
            elif name == "mlka":
                out = attention(y, key, y, elsewhere)
            else:
                out = attention(y, y, y, F.scaled_dot_product_attention)
            z = z + weight * out
        z = self.norm1(z)
        return self.norm2(z + self.ffn(z))


class Fusion(nn.Module):
    """The weights of a layer's attentions, in the order of `BLOCKS`: constants, learnable scalars or a softmax gate."""

    def __init__(self, kind: str, blocks: Sequence[str], layers: int, width: int, alpha: float) -> None:
        super().__init__()
        constants = torch.tensor([alpha if name in CROSS_BLOCKS else 1.0 for name in blocks])
        self.kind = kind
        if kind == "alpha":
            self.register_buffer("alpha", constants, persistent=False)
        elif kind in ("theta", "theta_from_alpha"):
            start = constants if kind == "theta_from_alpha" else torch.ones_like(constants)
            self.theta = nn.Parameter(start.repeat(layers, 1))
        else:
            self.net = nn.Sequential(
                nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(blocks)), nn.Softmax(dim=-1)
            )

    def forward(self, layer: int, y: Tensor) -> Tensor:
        """Layer index and its input (B, L, d) -> weights (blocks,), or (blocks, B, 1, 1) from the gate."""
        if self.kind == "alpha":
            return self.alpha
        if self.kind == "gate_net":
            gate = self.net(torch.cat([y.mean(1), y.amax(1)], dim=-1))
            return gate.T[:, :, None, None]
        return self.theta[layer]


class Embedding(nn.Module):
    """Linear C -> d plus the grid's sine code. The released code's 1x1 convolution on tokens is this linear map."""

    def __init__(self, channels: int, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.project = nn.Linear(channels, width)
        nn.init.kaiming_normal_(self.project.weight, nonlinearity="relu")
        self.register_buffer("position", integer_sine_position(width, size), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, d)."""
        return self.project(tokens) + self.position


class ReferenceAttention(MultiHeadAttention):
    """The shared attention, with a window rule instead of a mask; keys or values of batch size 1 serve every sample."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """query (B, L, d), key and value (B or 1, L, d); `attend` maps their heads (B, h, L, d / h) -> (B, L, d)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = [
            self._split(F.linear(tokens, weight, bias)).expand(query.shape[0], -1, -1, -1)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        return self.out_proj(attend(*heads).transpose(1, 2).flatten(2))


class WindowAttention(nn.Module):
    """Attention of every grid position inside its window (itself included), or everywhere but there.

    Small grids attend in one call under one dense additive mask. Larger ones attend in blocks of rows: what a block may
    see depends on row differences only, so every block's mask is a view of one strip that holds a block's queries
    against all row differences, and inside attention reads only the rows that a window reaches. Both are exact.

    Buffer `strip` (rows * W, (rows + 2 * reach) * W): 0 = may attend, -inf = may not.
    """

    strip: Tensor

    def __init__(self, size: tuple[int, int], window: int, inside: bool, block_rows: int | None = None) -> None:
        super().__init__()
        height, width = size
        half = window // 2
        if block_rows is None:
            block_rows = height if height * width <= DENSE_TOKENS else max(1, BLOCK_TOKENS // width)
        self.height, self.width, self.rows = height, width, min(block_rows, height)
        self.reach = (height - 1) // self.rows * self.rows  # how many rows before and after its own a block reads
        if inside:
            self.reach = min(half, self.reach)
        row_distance = torch.arange(self.rows)[:, None] - torch.arange(-self.reach, self.rows + self.reach)
        column_distance = torch.arange(width)[:, None] - torch.arange(width)
        near_rows, near_columns = row_distance.abs() <= half, column_distance.abs() <= half
        near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)
        strip = torch.zeros(near.shape).masked_fill(near != inside, -math.inf)
        self.register_buffer("strip", strip, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads (B, h, L, d / h) each -> (B, h, L, d / h)."""
        blocks = []
        for start in range(0, self.height, self.rows):
            stop = min(start + self.rows, self.height)
            first, last = max(0, start - self.reach), min(self.height, stop + self.reach)
            offset = first - (start - self.reach)
            rows = slice(start * self.width, stop * self.width)
            seen = slice(first * self.width, last * self.width)
            mask = self.strip[: (stop - start) * self.width, offset * self.width : (offset + last - first) * self.width]
            blocks.append(
                F.scaled_dot_product_attention(query[:, :, rows], key[:, :, seen], value[:, :, seen], attn_mask=mask)
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def released_width(stride: int) -> int:
    """Token width of a level of this stride: 128, 256, 512 at strides 4, 8, 16 (released code)."""
    return 32 * stride


def window_side(size: tuple[int, int]) -> int:
    """Odd side of the window on a grid (H, W).

    The released code knows square grids of 16, 32 and 64 only (5, 7 and 11), which is 3 + side / 8. Here the shorter
    side of any grid gives the half width 1 + side / 16, rounded to the nearest integer (halves down, so that MLKA keeps
    more keys).
    """
    return 2 * (1 + math.ceil(min(size) / 16 - 0.5)) + 1


def feature_jitter(tokens: Tensor, scale: float, probability: float) -> Tensor:
    """tokens (B, L, C) + Gaussian noise of standard deviation scale * ||token|| / C, in all but a random
    floor((1 - probability) * L) tokens of each sample (released code; `models.layers.jitter` draws once per batch instead)."""
    deviation = scale * tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
    deviation = deviation.masked_fill(_random_tokens(tokens, 1 - probability), 0)
    return tokens + deviation * torch.randn_like(tokens)


def token_masking(tokens: Tensor, probability: float) -> Tensor:
    """tokens (B, L, C) with a random floor(probability * L) tokens of each sample set to zero (released code)."""
    return tokens.masked_fill(_random_tokens(tokens, probability), 0)


def _random_tokens(tokens: Tensor, share: float) -> Tensor:
    """(B, L, 1) bool: a random floor(share * L) tokens of each sample."""
    batch, length, _ = tokens.shape
    order = torch.rand(batch, length, device=tokens.device).argsort(dim=1).argsort(dim=1)
    return (order < int(share * length))[..., None]


def level_loss(pair: Pair) -> Tensor:
    """MSE over batch, places and channels plus the mean over places of 1 - cosine over channels: a scalar."""
    target, reconstruction = pair.target.float(), pair.reconstruction.float()
    return F.mse_loss(reconstruction, target) + (1 - F.cosine_similarity(reconstruction, target, dim=1)).mean()


# The authors' parameter names of one level, and ours (see `models.released`).
_RELEASED_NAMES = (
    (r"ref_mca", "reference"),
    (r"embedding\.project_embedding\.project\.(weight|bias)", r"embedding.project.\1"),
    (r"ref_mca_embedding\.project_embedding\.project\.(weight|bias)", r"reference_embedding.project.\1"),
    (r"encoder\.encode_layers\.(\d+)\.mca\.(.+)", r"layers.\1.attention.lca.\2"),
    (r"encoder\.encode_layers\.(\d+)\.nsa\.(.+)", r"layers.\1.attention.mlka.\2"),
    (r"encoder\.encode_layers\.(\d+)\.(ca|msa|sa)\.(.+)", r"layers.\1.attention.\2.\3"),
    (r"encoder\.encode_layers\.(\d+)\.(norm[12])\.(weight|bias)", r"layers.\1.\2.\3"),
    (r"encoder\.encode_layers\.(\d+)\.ffn\.fc1\.(weight|bias)", r"layers.\1.ffn.0.\2"),
    (r"encoder\.encode_layers\.(\d+)\.ffn\.fc2\.(weight|bias)", r"layers.\1.ffn.2.\2"),
    (r"encoder\.norm\.(weight|bias)", r"norm.\1"),
    (r"encoder\.gate", "fusion.theta"),
    (r"projection\.(weight|bias)", r"projection.\1"),
)


def released_name(name: str) -> str | None:
    """The authors' name of a parameter of one level -> its name in `LevelNetwork`; behind "<level>.", in `RLRNetwork`.

    The authors save a list with one state dict per level, lowest first.
    """
    level, _, rest = name.partition(".")
    if level.isdigit():
        own = released_name(rest)
        return own and f"levels.{level}.{own}"
    for pattern, ours in _RELEASED_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None
