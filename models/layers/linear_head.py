"""Up-sampling followed by convolutions without activations, computed at the resolution of its input.

UniAS ends every level in a bilinear up-sampling (by 8 at the finest level) and three 3x3 convolutions with nothing
between them (released code). All four steps are linear, so they are one linear map of the small token grid, and most
of the work done at the large resolution is redundant: at 112x112 the three convolutions cost 15.1 GMAC an image, the
same map computed below 0.4 GMAC an image and 0.8 GMAC a batch, and no 256-channel tensor of the large size is stored.

How. Up-sampling and the taps of a zero-padded convolution are separable, so with U the one-dimensional interpolation
matrix and S_d the shift by d in {-1, 0, 1} that drops what leaves the image (this is the zero padding), the output is

    sum over taps (t1, t2, t3)  W3[t3] W2[t2] W1[t1]  q  applied between  (S S S U)_rows  and  (S S S U)_columns

where the channel matrices act on the small grid. Among the 27 products S S S only 13 differ, so the 729 tap
combinations fall into 13 x 13 groups whose channel matrices are added up first. Biases pass through the later
convolutions as an image that is constant except two pixels from the border. Nothing is approximated: results and
gradients are those of the plain convolutions up to the order of the additions.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 13
"""Distinct products of three shifts of one axis."""


class UpsampleConvolutions(nn.Module):
    """Bilinear up-sampling with aligned corners, then 3x3 convolutions in -> in -> in -> out without activations.

    `folded=None` folds where the largest tensor on the way is then smaller, which is also where it is faster; `True` and
    `False` force a path. Both paths have the same parameters and the same result.

    Shapes: (B, in_channels, *in_size) -> (B, out_channels, *out_size), float.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_size: tuple[int, int],
        out_size: tuple[int, int],
        folded: bool | None = None,
    ) -> None:
        super().__init__()
        self.in_size, self.out_size = tuple(in_size), tuple(out_size)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(in_channels, channels, 3, padding=1) for channels in (in_channels, in_channels, out_channels)
        )
        if folded is None:
            plain = 2 * in_channels * out_size[0] * out_size[1]
            folded = plain >= WORDS**2 * out_channels * in_size[0] * in_size[1] and min(out_size) >= 5
        if folded and min(out_size) < 5:
            raise ValueError(
                f"the folded path needs an output of at least 5x5 pixels, found {out_size[0]}x{out_size[1]}"
            )
        self.folded = folded
        if folded:
            for axis, name in enumerate(("rows", "columns")):
                words, pairs, triples = _shift_words(out_size[axis])
                resample = words @ _interpolation(in_size[axis], out_size[axis])  # (13, out, in)
                self.register_buffer(f"{name}_resample", resample.float(), persistent=False)
                self.register_buffer(f"{name}_pairs", pairs.float(), persistent=False)
                self.register_buffer(f"{name}_triples", triples.float(), persistent=False)

    def forward(self, grid: Tensor) -> Tensor:
        return self._forward_folded(grid) if self.folded else self._forward_plain(grid)

    def _forward_plain(self, grid: Tensor) -> Tensor:
        image = F.interpolate(grid, size=self.out_size, mode="bilinear", align_corners=True)
        for convolution in self.convolutions:
            image = convolution(image)
        return image

    def _forward_folded(self, grid: Tensor) -> Tensor:
        with torch.autocast(grid.device.type, enabled=False):
            matrices, bias_image = self._channel_matrices(), self._bias_image()
        V, H, O, C = matrices.shape  # noqa: E741  groups of row shifts, groups of column shifts, out, in
        B, (h, w), (height, width) = grid.shape[0], self.in_size, self.out_size
        mixed = matrices.permute(2, 0, 1, 3).reshape(O * V * H, C).to(grid.dtype) @ grid.flatten(2)
        mixed = mixed.view(B, O, V, H, h, w).permute(0, 1, 2, 4, 3, 5).reshape(B, O * V * h, H * w)
        mixed = mixed @ self.columns_resample.permute(0, 2, 1).reshape(H * w, width).to(grid.dtype)
        rows = self.rows_resample.permute(1, 0, 2).reshape(height, V * h).to(grid.dtype)
        return rows @ mixed.view(B, O, V * h, width) + bias_image.to(grid.dtype)

    def _channel_matrices(self) -> Tensor:
        """Channel matrices of the groups of taps: (groups of row shifts, groups of column shifts, out, in)."""
        first, second, third = (convolution.weight for convolution in self.convolutions)
        two = torch.einsum("omij,mckl->ikjloc", third, second).flatten(2, 3).flatten(0, 1)
        two = torch.einsum("pi,qj,ijoc->pqoc", self.rows_pairs, self.columns_pairs, two)
        three = torch.einsum("pqom,mcij->piqjoc", two, first).flatten(2, 3).flatten(0, 1)
        return torch.einsum("pi,qj,ijoc->pqoc", self.rows_triples, self.columns_triples, three)

    def _bias_image(self) -> Tensor:
        """What the biases alone give, (1, out, *out_size): that of a 5x5 image, its centre repeated, is exact."""
        first, second, third = self.convolutions
        small = first.bias.view(1, -1, 1, 1).expand(1, -1, 5, 5)
        small = third(second(small))
        for axis, size in zip((2, 3), self.out_size, strict=True):
            before, centre, after = small.split((2, 1, 2), dim=axis)
            small = torch.cat((before, centre.repeat_interleave(size - 4, dim=axis), after), dim=axis)
        return small


@lru_cache
def _shift_words(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct products of three zero-padded shifts of an axis of `size` pixels, and which taps give which.

    Returns the products (13, size, size), the map from pairs of taps to distinct pairs (7, 9) and the map from
    (distinct pair, tap) to distinct products (13, 21), both 0/1, all float64.
    """
    shifts = [torch.diag(torch.ones(size - abs(d), dtype=torch.float64), d) for d in (-1, 0, 1)]
    pairs, pair_map = _distinct([a @ b for a, b in product(shifts, shifts)])
    triples, triple_map = _distinct([a @ b for a, b in product(pairs, shifts)])
    return torch.stack(triples), pair_map, triple_map


def _distinct(matrices: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The distinct matrices in order of appearance, and the 0/1 map (distinct, all)."""
    keys = [matrix.numpy().tobytes() for matrix in matrices]
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    mapping = torch.zeros(len(index), len(keys), dtype=torch.float64)
    for column, key in enumerate(keys):
        mapping[index[key], column] = 1
    return [matrices[keys.index(key)] for key in index], mapping


def _interpolation(in_size: int, out_size: int) -> Tensor:
    """One-dimensional bilinear interpolation with aligned corners as a matrix (out_size, in_size), float64."""
    identity = torch.eye(in_size, dtype=torch.float64).view(1, in_size, in_size, 1)
    return F.interpolate(identity, size=(out_size, 1), mode="bilinear", align_corners=True)[0, :, :, 0].T
