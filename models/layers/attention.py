"""Multi-head attention whose position codes are given apart from the content."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.dropout import dropout


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_probability: float) -> Tensor:
    """softmax(QK'/sqrt(d)) V with dropout on the weights: (B, heads, Lq, d) from (B, heads, Lq, d) and (B, heads, Lk, d).

    mask: bool, True = may attend; every query must see a key. With dropout on a CPU the steps are written out, because
    there `scaled_dot_product_attention` does just that, with a dropout that takes as long as all its products.
    """
    if dropout_probability == 0.0 or query.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_probability)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(dim=-1), dropout_probability) @ value


class MultiHeadAttention(nn.Module):
    """Attention on tokens (B, L, d), with positions added to queries and keys and never to values.

    Parameters are named and packed as in `torch.nn.MultiheadAttention` (`in_proj_weight` (3d, d), `in_proj_bias`,
    `out_proj.weight`, `out_proj.bias`) and start from its initialisation, so that the authors' checkpoints can be
    imported; the attention itself runs through `scaled_dot_product_attention`.

    d_model: token width; heads: must divide it; dropout: probability on the attention weights, in training only.
    """

    def __init__(self, d_model: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(
                f"The number of heads must divide the token width, found d_model={d_model}, heads={heads}."
            )
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_position: Tensor | None = None,
        key_position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, Lq, d).

        query: (B, Lq, d); key, value: (B, Lk, d). Positions: broadcastable to the tensor they are added to, for
        example (L, d). mask: bool, True = may attend, broadcastable to (B, heads, Lq, Lk), for example (Lq, Lk).
        """
        query = query if query_position is None else query + query_position
        key = key if key_position is None else key + key_position
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        attended = attention(
            self._split(F.linear(query, q_weight, q_bias)),
            self._split(F.linear(key, k_weight, k_bias)),
            self._split(F.linear(value, v_weight, v_bias)),
            mask,
            self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, L, d) to (B, heads, L, d / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"d_model={self.out_proj.in_features}, heads={self.heads}, dropout={self.dropout}"
