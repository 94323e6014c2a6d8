"""Position codes of a token grid, each (L, d) with L = height * width, row-major."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LearnedPosition2d(nn.Module):
    """Learned row and column tables; the code of a token is [column part ; row part] (UniAD, released code).

    Tables are (height, d / 2) and (width, d / 2), initialised uniformly on [0, 1). `forward()` returns (L, d).
    """

    def __init__(self, d_model: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"A learned 2-D position code needs an even width, found d_model={d_model}.")
        self.grid = (int(grid[0]), int(grid[1]))
        self.row_embed = nn.Embedding(self.grid[0], d_model // 2)
        self.col_embed = nn.Embedding(self.grid[1], d_model // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> Tensor:
        height, width = self.grid
        columns = self.col_embed.weight.expand(height, -1, -1)
        rows = self.row_embed.weight[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def _interleave(angles: Tensor) -> Tensor:
    """(n, k) angles to (n, 2k): sin, cos, sin, cos, ..."""
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def normalized_sine_position(d_model: int, grid: tuple[int, int], temperature: float = 10000.0) -> Tensor:
    """DETR's sine code: coordinates 1..n divided by (n + 1e-6), times 2 pi; [row half ; column half].

    Within a half, neighbouring channels 2i and 2i + 1 are sine and cosine of the same frequency
    temperature^(-2i / (d / 2)). Returns float32 (L, d). Used by UniAD's "sine" option and by UniAS.
    """
    if d_model % 4:
        raise ValueError(f"A 2-D sine code needs d_model divisible by 4, found {d_model}.")
    height, width = grid
    half = d_model // 2
    frequencies = temperature ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)

    def axis(length: int) -> Tensor:
        coordinates = torch.arange(1, length + 1, dtype=torch.float64) / (length + 1e-6) * (2 * math.pi)
        return _interleave(coordinates[:, None] * frequencies)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def integer_sine_position(d_model: int, grid: tuple[int, int], base: float = 10000.0) -> Tensor:
    """RLR's sine code: integer coordinates from 0, not normalised; [column half ; row half].

    Within a half sine and cosine are interleaved as in `normalized_sine_position`. Returns float32 (L, d): channel 0
    along a row is sin(0), sin(1), ..., channel d / 2 the same along a column.
    """
    if d_model % 4:
        raise ValueError(f"A 2-D sine code needs d_model divisible by 4, found {d_model}.")
    height, width = grid
    half = d_model // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)

    def axis(length: int) -> Tensor:
        return _interleave(torch.arange(length, dtype=torch.float64)[:, None] * frequencies)

    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


class SinePosition2d(nn.Module):
    """A fixed code as a buffer outside the state dict, used like `LearnedPosition2d`: `forward()` returns (L, d)."""

    code: Tensor

    def __init__(self, d_model: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("code", normalized_sine_position(d_model, grid), persistent=False)

    def forward(self) -> Tensor:
        return self.code
