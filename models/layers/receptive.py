"""Cells of a grid -> a map of pixels, by a Gaussian over each cell's receptive field (FCDD, ICLR 2021, released code)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reception(NamedTuple):
    """jump: pixels from one cell's centre to the next; field: side of a cell's receptive field; start: the first centre."""

    jump: int
    field: int
    start: float


def spreading(cells: int, pixels: int, reception: Reception, std: float) -> Tensor:
    """float32 (pixels, cells): what a cell adds to each pixel along one axis.

    A Gaussian around the cell's centre, cut to its receptive field. Its peak is 1, and 1/2 for a field of even side, whose two
    middle pixels are equal; it is not normalised, so that maps are darker at the border.
    """
    y = torch.arange(pixels, dtype=torch.float64)[:, None]
    away = (y - (reception.jump * torch.arange(cells, dtype=torch.float64) + reception.start)).abs()
    even = reception.field % 2 == 0
    distance = (away - 0.5).clamp_min(0) if even else away
    weights = (0.5 if even else 1.0) * torch.exp(-distance.square() / (2 * std**2))
    return torch.where(away <= (reception.field - 1) / 2, weights, 0.0).float()


def spread(cells: Tensor, size: tuple[int, int], reception: Reception, std: float, normalised: bool = False) -> Tensor:
    """Cells (B, h, w) -> (B, H, W), the released Gaussian upsampling as two products of matrices.

    normalised: divided by what a map of ones would become.
    """
    rows, columns = (
        spreading(count, pixels, reception, std).to(cells.device)
        for count, pixels in zip(cells.shape[-2:], size, strict=True)
    )
    if normalised:
        rows, columns = (part / part.sum(1, keepdim=True).clamp_min(1e-12) for part in (rows, columns))
    return rows @ cells @ columns.T
