"""What differs while `torch.export` traces a graph: it can neither look at numbers nor loop over a batch of unknown size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tracing() -> bool:
    """Whether a graph is being traced."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # the former is not in torch 2.6


def in_parts(values: Tensor, rows: int) -> Sequence[Tensor]:
    """values (N, ...) in parts of at most so many rows, which bounds memory; the whole while a graph is traced."""
    return (values,) if tracing() else values.split(rows)
