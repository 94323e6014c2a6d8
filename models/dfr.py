"""DFR: deep feature reconstruction of regional features.

Paper: Yang, Shi, Qi, "DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation", 2020,
https://arxiv.org/abs/2012.07122. Details follow the authors' code.

    image -> VGG19 with reflection padding -> 12 ReLU maps -> each to image size, then 4x4 mean -> concatenate
          -> autoencoder of 1x1 convolutions -> squared error per position
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.reconstruction import Pair, ReconstructionNetwork

REGION = 4  # pixels: side of the windows that regional features are averaged over


class RegionalFeatures:
    """Regional features: all maps of a backbone on one grid of 4x4-pixel regions.

    The maps of a VGG (timm `vgg19.tv_in1k`, levels 1-4, padding "reflect", maps "relu") are all ReLU outputs up to the
    highest level: relu1_1 .. relu4_4, 64 x 2 + 128 x 2 + 256 x 4 + 512 x 4 = 3456 channels. As in the released code,
    every map but a block's last is taken after the next convolution's reflection padding, so it is 2 pixels wider: 258,
    256, 130, 128, 66, 66, 66, 64, 34, 34, 34, 32 for a 256-pixel image. Any other backbone has one map per level, which
    is a block of its own.

    Each map is resized bilinearly (align_corners True) to the image's size and averaged over 4x4 windows. Both are
    linear and separable, so they are done as one small matrix per axis; the image-sized maps are never built.

    Args:
        channels: of each map, as the feature extractor gives them.
        image_size: (height, width) in pixels.
        strides: See `channels`.

    Raises ValueError for an image size that is not divisible by 4.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], image_size: tuple[int, int]) -> None:
        if any(side % REGION for side in image_size):
            raise ValueError(
                f"regional features are means over {REGION}x{REGION} pixels: the image size must be divisible by "
                f"{REGION}, found {image_size[0]}x{image_size[1]}"
            )
        self.channels = sum(channels)
        self.image_size = tuple(image_size)
        self.padded = [stride == after for stride, after in pairwise([*strides, 0])]  # all but the last of a block
        self._matrices: dict[tuple[int, int, str], Tensor] = {}

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i), lowest first -> regional features (B, C, H/4, W/4) float32."""
        H, W = self.image_size
        out = []
        for x, padded in zip(maps, self.padded, strict=True):
            x = F.pad(x, (1, 1, 1, 1), mode="reflect") if padded else x
            rows, columns = self._matrix(H, x.shape[-2], x), self._matrix(W, x.shape[-1], x)
            out.append(rows @ x.float() @ columns.T)
        return torch.cat(out, dim=1)

    def _matrix(self, side: int, source: int, like: Tensor) -> Tensor:
        key = (side, source, str(like.device))
        if key not in self._matrices:
            self._matrices[key] = region_matrix(side, source).to(like.device)
        return self._matrices[key]


def region_matrix(side: int, source: int) -> Tensor:
    """Bilinear resize (align_corners True) from `source` to `side` samples, then means of 4: (side / 4, source)."""
    identity = torch.eye(source, dtype=torch.float64)[None]
    resized = F.interpolate(identity, size=side, mode="linear", align_corners=True)[0]
    return F.avg_pool1d(resized, REGION).T.contiguous().float()


class DFRNetwork(ReconstructionNetwork):
    """Regional features and the convolutional autoencoder of DFR: 1x1 convolutions, C -> (C + 2d) // 2 -> 2d -> d and back.

    Args:
        regional: gives the features with their C channels.
        latent: d, from `latent_dimension`; None until `build` is called with it.

    Batch norm and ReLU follow every convolution but the latent and the last one. With C = 3456 and d = 100 it
    has 13.42 M parameters.
    """

    def __init__(self, regional: RegionalFeatures, latent: int | None = None) -> None:
        super().__init__()
        self.regional = regional
        self.latent: int | None = None
        if latent is not None:
            self.build(latent)

    def build(self, latent: int) -> None:
        """New layers for `latent` channels, 1 to C."""
        channels = self.regional.channels
        if not 0 < latent <= channels:
            raise ValueError(
                f"the latent size must be 1 to {channels} (the number of feature channels), found {latent}"
            )
        self.latent = latent
        wide, narrow = (channels + 2 * latent) // 2, 2 * latent

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        self.encoder = nn.Sequential(*block(channels, wide), *block(wide, narrow), nn.Conv2d(narrow, latent, 1))
        self.decoder = nn.Sequential(*block(latent, narrow), *block(narrow, wide), nn.Conv2d(wide, channels, 1))

    @property
    def preparation(self) -> str:
        return f"{len(self.regional.padded)} maps at image size, means over 4x4 pixels, concatenated"

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """Maps of the backbone -> [regional features (B, C, h, w)]."""
        return [self.regional(levels)]

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """[Regional features (B, C, h, w)] -> one pair; the loss is its mean squared difference."""
        (target,) = features
        return [Pair(target, self.decoder(self.encoder(target)))]


class StreamingCovariance:
    """Covariance of vectors seen batch by batch, float64, without keeping them; exact whatever the batches are."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Add vectors (N, dimension) of any float dtype and device."""
        n = len(vectors)
        if n == 0:
            return
        x = vectors.detach().double()
        mean = x.mean(dim=0)
        x = x - mean
        self.mean, self._scatter = self.mean.to(x.device), self._scatter.to(x.device)
        delta = mean - self.mean
        self._scatter.addmm_(x.T, x)
        self._scatter.addr_(delta, delta, alpha=self.count * n / (self.count + n))
        self.count += n
        self.mean += delta * (n / self.count)

    def covariance(self) -> Tensor:
        """(dimension, dimension) float64, divided by count - 1 as in PCA."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two vectors, found {self.count}")
        return self._scatter / (self.count - 1)

    def correlation(self) -> Tensor:
        """(dimension, dimension) float64, the covariance of standardised values; what never varies has zeros."""
        covariance = self.covariance()
        inverse = covariance.diagonal().rsqrt()
        inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
        return covariance * inverse[:, None] * inverse

    def eigenvalues(self, standardised: bool = False) -> Tensor:
        """Variances along the principal components, (dimension,) float64, largest first, >= 0.

        standardised: of the values divided by their standard deviations.
        """
        matrix = self.correlation() if standardised else self.covariance()
        return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)


def latent_dimension(eigenvalues: Tensor, explained: float = 0.90) -> int:
    """Smallest number of principal components whose share of the total variance exceeds `explained` (DFR: 0.90).

    eigenvalues: variances (D,), in any order. Raises ValueError when there is no variance at all.
    """
    if not 0 < explained < 1:
        raise ValueError(f"the explained share of variance must lie between 0 and 1, found {explained}")
    ordered = eigenvalues.double().sort(descending=True).values
    total = float(ordered.sum())
    if not total > 0:
        raise ValueError("the features do not vary at all: no latent size can be derived from them")
    return int((ordered.cumsum(0) / total <= explained).sum()) + 1
