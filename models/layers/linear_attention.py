"""Attention without a softmax: ELU + 1 of queries and keys, normalised by the sum over the keys.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", ICML 2020,
https://arxiv.org/abs/2006.16236, in the form of Dinomaly (CVPR 2025): no epsilon and no 1 / sqrt(d). It cannot put its
whole weight on one token, which is what copying an input takes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """sum_j (q'_i . k'_j) v_j / (sum_j q'_i . k'_j + epsilon) with x' = ELU(x) + 1.

    query: (B, heads, Lq, d); key, value: (B, heads, Lk, d); returns (B, heads, Lq, d). Time and memory grow with
    Lq + Lk. mask: bool (Lq, Lk), True = may attend; with it the Lq x Lk matrix is built, and hidden keys enter neither
    sum. epsilon: Dinomaly 0, Dinomaly2 1e-8.
    """
    query, key = F.elu(query) + 1, F.elu(key) + 1
    if mask is not None:
        weights = (query @ key.transpose(-2, -1)) * mask
        return weights @ value / (weights.sum(dim=-1, keepdim=True) + epsilon)
    summary = key.transpose(-2, -1) @ value  # (B, heads, d, d)
    total = query @ key.sum(dim=-2).unsqueeze(-1)  # (B, heads, Lq, 1)
    return query @ summary / (total + epsilon)
