"""UniAD's reconstruction network.

You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022, https://arxiv.org/abs/2206.03687.
Where the paper is silent this follows the released code, and says so.

Three ideas keep the network from copying its input: each decoder layer starts from a learned query of its own
(layer-wise query), no position may look at its neighbourhood (neighbour masked attention), and it has to remove noise
(feature jitter). Each can be switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.attention import MultiHeadAttention
from models.layers.dropout import Dropout
from models.layers.jitter import FeatureJitter
from models.layers.masks import neighbor_mask
from models.layers.neck import ConcatenatedLevels
from models.layers.positions import LearnedPosition2d, SinePosition2d
from models.reconstruction import Pair
from models.released import renamed

Query = Literal["none", "first", "layerwise"]
Position = Literal["learned", "sine"]
MaskPlace = Literal["encoder", "decoder1", "decoder2"]


class UniAD(ConcatenatedLevels):
    """Levels in, one pair out: all levels resized to one grid and concatenated, and their reconstruction.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them.
        sizes: See `channels`.
        grid: (height, width) of the token grid; None = the size of the highest level given. The paper's is the image size
            divided by 16, whichever levels are used.
        d_model: channels of a token inside the transformer.
        heads: attention heads; they divide d_model.
        feedforward: width of the feed-forward part.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dropout: share dropped from attention weights, residual branches and inside the feed-forward part.
        position: `learned` row and column tables, or DETR's `sine` code; added to queries and keys only.
        query: `layerwise` (the paper's): every decoder layer starts from its own learned query and reads the memory, then
            the previous layer's output. `first`: an ordinary decoder, whose first layer starts from a learned query and
            whose layers read themselves, then the memory. `none`: the same, starting from the memory itself.
        neighbor_size: side, or (rows, columns), of the window hidden from each position; an even size acts as the next odd
            one; None or 0 = no mask.
        mask_places: where the mask acts: `encoder`; `decoder1`, each decoder layer's first attention; `decoder2`, its
            second. Empty = no mask.
        jitter_scale: see `FeatureJitter`; scale 0 = no jitter.
        jitter_probability: See `jitter_scale`.

    Raises ValueError for a window that hides everything from some position, for an unknown option, and for widths that
    do not divide.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        grid: tuple[int, int] | None = None,
        d_model: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        dropout: float = 0.1,
        position: Position = "learned",
        query: Query = "layerwise",
        neighbor_size: int | tuple[int, int] | None = 7,
        mask_places: Sequence[MaskPlace] = ("encoder", "decoder1", "decoder2"),
        jitter_scale: float = 20.0,
        jitter_probability: float = 1.0,
    ) -> None:
        super().__init__()
        _check_choice("position", position, Position)
        _check_choice("query", query, Query)
        for place in mask_places:
            _check_choice("mask_places", place, MaskPlace)
        if encoder_layers < 0 or decoder_layers < 1:
            raise ValueError(
                f"UniAD needs at least one decoder layer and no negative number of encoder layers, found "
                f"encoder_layers={encoder_layers}, decoder_layers={decoder_layers}."
            )
        height, width = grid or sizes[-1]
        self.grid = (height, width)
        width_in = sum(channels)
        self.query = query
        self.mask_places = tuple(mask_places)

        masked = neighbor_size and self.mask_places
        mask = neighbor_mask(self.grid, neighbor_size) if masked else None
        self.register_buffer("mask", mask, persistent=False)
        self.jitter = FeatureJitter(jitter_scale, jitter_probability)
        self.position = (LearnedPosition2d if position == "learned" else SinePosition2d)(d_model, self.grid)
        self.input_projection = nn.Linear(width_in, d_model)
        encoder_layer = EncoderLayer(d_model, heads, feedforward, dropout)
        query_length = height * width if query == "layerwise" else 0
        decoder_layer = DecoderLayer(d_model, heads, feedforward, dropout, query_length)
        # The released code copies one prototype, so that all layers start with equal queries and in-projections.
        self.encoder = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(copy.deepcopy(decoder_layer) for _ in range(decoder_layers))
        self.first_query = nn.Parameter(torch.randn(height * width, d_model)) if query == "first" else None
        self.norm = nn.LayerNorm(d_model)
        self.output_projection = nn.Linear(d_model, width_in)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """features: (B, C_l, H_l, W_l) per level. Returns one pair of (B, sum C_l, *grid)."""
        (target,) = self.prepare(features)
        tokens = target.flatten(2).transpose(1, 2)  # (B, L, C)
        x = self.input_projection(self.jitter(tokens))
        position = self.position()
        encoder_mask, mask1, mask2 = (self.mask if place in self.mask_places else None for place in get_args(MaskPlace))
        for layer in self.encoder:
            x = layer(x, position, encoder_mask)
        memory = x
        if self.first_query is not None:
            x = self.first_query.expand_as(memory)
        for layer in self.decoder:
            x = layer(x, memory, position, mask1, mask2)
        reconstruction = self.output_projection(self.norm(x))
        return [Pair(target, reconstruction.transpose(1, 2).unflatten(2, self.grid))]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by addition and LayerNorm (post-norm)."""

    def __init__(self, d_model: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, heads, dropout)
        self.feedforward = FeedForward(d_model, feedforward, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, L, d); position: (L, d); mask: bool (L, L), True = visible. Returns (B, L, d)."""
        attended = self.attention(x, x, x, query_position=position, key_position=position, mask=mask)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.feedforward(x)))


class DecoderLayer(nn.Module):
    """Two attentions and feed-forward, post-norm.

    With a query of its own (`query_length` > 0) the layer starts from it; the first attention reads the memory and the
    second the previous layer's output, which enters nowhere else. Without, it is an ordinary decoder layer: it starts
    from the previous output, and reads first itself, then the memory.
    """

    def __init__(self, d_model: int, heads: int, feedforward: int, dropout: float, query_length: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(query_length, d_model)) if query_length else None
        self.attention1 = MultiHeadAttention(d_model, heads, dropout)
        self.attention2 = MultiHeadAttention(d_model, heads, dropout)
        self.feedforward = FeedForward(d_model, feedforward, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self, previous: Tensor, memory: Tensor, position: Tensor, mask1: Tensor | None, mask2: Tensor | None
    ) -> Tensor:
        """previous, memory: (B, L, d); position: (L, d); masks: bool (L, L), True = visible. Returns (B, L, d)."""
        if self.query is None:
            x, source1, source2 = previous, previous, memory
        else:
            x, source1, source2 = self.query.expand_as(memory), memory, previous
        attended = self.attention1(x, source1, source1, query_position=position, key_position=position, mask=mask1)
        x = self.norm1(x + self.dropout(attended))
        attended = self.attention2(x, source2, source2, query_position=position, key_position=position, mask=mask2)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.feedforward(x)))


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear on the last axis."""

    def __init__(self, d_model: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, hidden)
        self.linear2 = nn.Linear(hidden, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


def _check_choice(option: str, value: str, allowed: object) -> None:
    if value not in get_args(allowed):
        raise ValueError(f'{option} names "{value}"; choose from {", ".join(get_args(allowed))}.')


RELEASED_BACKBONE = "backbone."
"""Of the backbone's tensors in the authors' checkpoints."""
# The authors' names, first match wins. Their decoder's `self_attn` is in truth the attention to the encoder's memory.
_RELEASED = (
    (r"pos_embed\.", "position."),
    (r"input_proj\.", "input_projection."),
    (r"output_proj\.", "output_projection."),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.\1.attention."),
    (r"transformer\.encoder\.layers\.(\d+)\.(linear\d)\.", r"encoder.\1.feedforward.\2."),
    (r"transformer\.encoder\.layers\.(\d+)\.(norm\d)\.", r"encoder.\1.\2."),
    (r"transformer\.decoder\.layers\.(\d+)\.learned_embed\.weight$", r"decoder.\1.query"),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.", r"decoder.\1.attention1."),
    (r"transformer\.decoder\.layers\.(\d+)\.multihead_attn\.", r"decoder.\1.attention2."),
    (r"transformer\.decoder\.layers\.(\d+)\.(linear\d)\.", r"decoder.\1.feedforward.\2."),
    (r"transformer\.decoder\.layers\.(\d+)\.(norm\d)\.", r"decoder.\1.\2."),
    (r"transformer\.decoder\.norm\.", "norm."),
)


def released_name(name: str) -> str | None:
    """The name here of a parameter of the authors' reconstruction module; None if it has none."""
    return renamed(name, _RELEASED)
