"""DFR: deep feature reconstruction of regional features.

Paper: Yang, Shi, Qi, "DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation", 2020,
https://arxiv.org/abs/2012.07122. Details follow the authors' code.

    image -> VGG19 with reflection padding -> 12 ReLU maps -> each to image size, then 4x4 mean -> concatenate
          -> autoencoder of 1x1 convolutions -> squared error per position
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import FeatureExtractor
from models.reconstruction import Pair

REGION = 4  # pixels: side of the windows that regional features are averaged over


class RegionalFeatures(nn.Module):
    """Frozen regional features: all chosen maps on one grid of 4x4-pixel regions.

    On a VGG (timm `vgg19.tv_in1k`, levels 1-4, padding "reflect") the maps are all ReLU outputs up to the highest
    level: relu1_1 .. relu4_4, 64 x 2 + 128 x 2 + 256 x 4 + 512 x 4 = 3456 channels. As in the released code, every map
    but a block's last is taken after the next convolution's reflection padding, so it is 2 pixels wider: 258, 256,
    130, 128, 66, 66, 66, 64, 34, 34, 34, 32 for a 256-pixel image. Any other backbone contributes one map per level.

    Each map is resized bilinearly (align_corners True) to the image's size and averaged over 4x4 windows. Both are
    linear and separable, so they are done as one small matrix per axis; the image-sized maps are never built.

    It stands in for its extractor: config, provenance, mean, std, channels, strides, sizes and a forward that gives one level.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        config = self.config = extractor.config
        self.provenance = extractor.provenance
        self.mean, self.std = extractor.mean, extractor.std
        layers = list(self.extractor.net.children())
        self.dense = all(isinstance(layer, nn.Conv2d | nn.ReLU | nn.MaxPool2d) for layer in layers)
        if self.dense and config.padding != "reflect":
            raise ValueError(
                f'DFR pads {config.name} by reflection, found backbone.padding="{config.padding}". '
                'Set backbone.padding to "reflect".'
            )
        if self.dense:
            widths = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
        else:
            widths = self.extractor.channels
        self.map_channels: list[int] = widths
        self.channels = [sum(widths)]
        self.strides = [REGION]
        self._matrices: dict[tuple[int, int, str], Tensor] = {}

    def train(self, mode: bool = True) -> RegionalFeatures:
        """Stays in eval mode: the features are frozen."""
        return super().train(False)

    def sizes(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """[(rows, columns)] of regions for images of `image_size`, whose sides must be divisible by 4."""
        image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if any(side % REGION for side in image_size):
            raise ValueError(
                f"regional features are means over {REGION}x{REGION} pixels: the image size must be divisible by "
                f"{REGION}, found {image_size[0]}x{image_size[1]}"
            )
        return [(image_size[0] // REGION, image_size[1] // REGION)]

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> the chosen maps, lowest first, before any resizing."""
        if not self.dense:
            return self.extractor(images)
        layers, x, maps = list(self.extractor.net.children()), images, []
        for index, layer in enumerate(layers):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                ends_block = index + 1 == len(layers) or isinstance(layers[index + 1], nn.MaxPool2d)
                maps.append(x if ends_block else F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return maps

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> [regional features (B, C, H/4, W/4)]."""
        H, W = images.shape[-2:]
        self.sizes((H, W))
        out = []
        for x in self.maps(images):
            rows, columns = self._matrix(H, x.shape[-2], x), self._matrix(W, x.shape[-1], x)
            out.append(rows @ x.float() @ columns.T)
        return [torch.cat(out, dim=1)]

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


class DFRNetwork(nn.Module):
    """The convolutional autoencoder of DFR: 1x1 convolutions, C -> (C + 2d) // 2 -> 2d -> d and back.

    channels: C. latent: d, from `latent_dimension`. Batch norm and ReLU follow every convolution but the latent and
    the last one. With C = 3456 and d = 100 it has 13.42 M parameters.
    """

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        if not 0 < latent <= channels:
            raise ValueError(
                f"the latent size must be 1 to {channels} (the number of feature channels), found {latent}"
            )
        self.channels, self.latent = channels, latent
        wide, narrow = (channels + 2 * latent) // 2, 2 * latent

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        self.encoder = nn.Sequential(*block(channels, wide), *block(wide, narrow), nn.Conv2d(narrow, latent, 1))
        self.decoder = nn.Sequential(*block(latent, narrow), *block(narrow, wide), nn.Conv2d(wide, channels, 1))

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

    def eigenvalues(self) -> Tensor:
        """Variances along the principal components, (dimension,) float64, largest first, >= 0."""
        return torch.linalg.eigvalsh(self.covariance()).flip(0).clamp(min=0)


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
