"""Separable Gaussian blur with the three border rules that the papers' code uses.

* "reflect": the mirror stands on the edge pixel, which is not repeated: d c b | a b c d | c b a. This is torch's and
  kornia's "reflect" and SciPy's "mirror". UniAS (feature filter, level maps) and ULSAD (maps) need it.
* "symmetric": the mirror stands on the pixel's outer edge, which is repeated: c b a | a b c d | d c b. This is SciPy's
  default, which SciPy calls "reflect". RLR needs it.
* "zeros": outside the image everything is 0, as in a padded convolution, so that the border is darkened. Dinomaly and
  INP-Former need it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Border = Literal["reflect", "symmetric", "zeros"]


def gaussian_taps(sigma: float, kernel: int | None = None, truncate: float = 4.0) -> Tensor:
    """Normalised taps, float64 (kernel,).

    sigma: standard deviation in pixels. kernel: odd number of taps; without it the half-width is
    int(truncate * sigma + 0.5), as in SciPy. Raises ValueError for sigma <= 0 or an even kernel.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"The Gaussian's sigma must be a positive number of pixels, found {sigma}.")
    if kernel is None:
        kernel = 2 * int(truncate * sigma + 0.5) + 1
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"The Gaussian's kernel must be a positive odd number of pixels, found {kernel}.")
    offsets = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return taps / taps.sum()


def border_index(length: int, pad: int, border: Border) -> Tensor:
    """Source indices, int64 (length + 2 * pad,), that extend an axis by `pad` on both sides, however short it is.

    border: `reflect` or `symmetric`; zeros have no source.
    """
    positions = torch.arange(-pad, length + pad)
    if border == "symmetric":
        folded = positions.remainder(2 * length)
        return torch.where(folded < length, folded, 2 * length - 1 - folded)
    if length == 1:
        return torch.zeros_like(positions)
    folded = positions.remainder(2 * (length - 1))
    return torch.where(folded < length, folded, 2 * (length - 1) - folded)


@lru_cache(maxsize=64)
def _border_index_on(length: int, pad: int, border: Border, device: torch.device) -> Tensor:
    """`border_index` on a device; kept, so that no blur waits for a copy from the host."""
    with torch.inference_mode(False):  # training may use what a scoring run has made
        return border_index(length, pad, border).to(device)


class GaussianBlur(nn.Module):
    """Blur over the last two axes of a tensor (..., H, W); the taps are a buffer outside the state dict.

    Arguments as in `gaussian_taps`, and `border` as in the module's text. Half-precision input is blurred in, and
    comes back as, float32, also under autocast; other dtypes are kept.
    """

    taps: Tensor

    def __init__(
        self, sigma: float, kernel: int | None = None, truncate: float = 4.0, border: Border = "reflect"
    ) -> None:
        super().__init__()
        if border not in get_args(Border):
            raise ValueError(f'Unknown border rule "{border}"; choose one of {", ".join(get_args(Border))}.')
        self.sigma = sigma
        self.border = border
        self.register_buffer("taps", gaussian_taps(sigma, kernel, truncate).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()
        pad = self.taps.numel() // 2
        taps = self.taps.to(images.dtype)
        for axis in (-2, -1):  # shifted sums: five to ten times faster on a CPU than a convolution of single channels
            length = images.shape[axis]
            if self.border == "zeros":
                padded = F.pad(images, (pad, pad) if axis == -1 else (0, 0, pad, pad))
            else:
                padded = images.index_select(axis, _border_index_on(length, pad, self.border, images.device))
            images = padded.narrow(axis, 0, length) * taps[0]
            for shift in range(1, taps.numel()):
                images = torch.addcmul(images, padded.narrow(axis, shift, length), taps[shift])
        return images

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, kernel={self.taps.numel()}, border={self.border}"
