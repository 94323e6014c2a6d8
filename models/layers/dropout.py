"""Dropout whose random numbers do not cost a quarter of a training step on a CPU.

On a CPU torch draws one number of its Mersenne Twister per element; here one 64-bit draw decides four. On other devices,
and while compiling, this is torch's own dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEPS = 1 << 16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zeros each element with `probability` (on a CPU rounded to a multiple of 1/65536) and scales the rest up.

    The expectation stays exact. Draws from torch's global generator; any shape and floating dtype.
    """
    hidden = round(probability * _STEPS)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < hidden < _STEPS:
        return F.dropout(x, probability)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    uniform = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = uniform >= hidden - _STEPS // 2
    return x * (keep.to(x.dtype) * (_STEPS / (_STEPS - hidden)))


class Dropout(nn.Module):
    """`dropout` in training mode, the identity in eval mode."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"A dropout probability lies in [0, 1], found {probability}.")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.probability) if self.training and self.probability else x

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
