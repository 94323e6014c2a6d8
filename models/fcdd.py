"""FCDD: a fully convolutional network whose output's size tells anomalies, and is the map of them.

Liznerski et al., "Explainable Deep One-Class Classification", ICLR 2021, https://arxiv.org/abs/2007.01760. Where paper and
released code differ, the released code is followed.

    image -> contrast normalised -> VGG11, the first three stages frozen -> 1 number o per cell -> a = sqrt(o^2 + 1) - 1
    map u = a, spread by a Gaussian over each cell's receptive field; image score = mean of a
    loss: mean of u in normal images, -log(1 - exp(-mean of u)) in synthetic ones
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.receptive import Reception, spread
from models.reconstruction import FeatureNetwork
from models.trunk import NoBackbone, build_trunk

Net = Literal["vgg11_bn", "cnn224"]
FrozenNorm = Literal["batch", "running"]
VGG_NAME = "vgg11_bn.tv_in1k"
"""In timm."""
FROZEN = 15
"""Layers of VGG11's features that are frozen; six more are trained."""
TINY = 1e-31


class VGG(nn.Module):
    """VGG11 with batch norm up to its sixth convolution, and a 1x1 convolution to one number. Released names.

    Args:
        frozen_norm: `batch`: batch norm of the frozen part uses the batch's statistics in training, and moves its running
            ones, as released; `running`: it stays as it was.
    """

    reception = Reception(8, 62, 3.5)

    def __init__(self, features: nn.Sequential, frozen_norm: FrozenNorm = "batch") -> None:
        super().__init__()
        if frozen_norm not in get_args(FrozenNorm):
            raise ValueError(f'frozen_norm is "{frozen_norm}"; choose one of {", ".join(get_args(FrozenNorm))}.')
        self.frozen_norm = frozen_norm
        self.features = features[:21]
        self.features[:FROZEN].requires_grad_(False)
        self.conv_final = nn.Conv2d(512, 1, 1)
        self.train()

    def train(self, mode: bool = True) -> VGG:
        """The frozen part's norms follow `frozen_norm`."""
        super().train(mode)
        if self.frozen_norm == "running":
            self.features[:FROZEN].eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_final(self.features(images))


class Small(nn.Module):
    """The released network without ImageNet, `FCDD_CNN224`: 247,569 parameters, all trained from scratch."""

    reception = Reception(8, 59, 0.0)

    def __init__(self) -> None:
        super().__init__()
        plan = ((3, 8, 5), (8, 32, 5), (32, 64, 3), (64, 128, 3))
        for number, (before, width, kernel) in enumerate(plan, 1):
            self.add_module(f"conv{number}", nn.Conv2d(before, width, kernel, padding=kernel // 2))
            self.add_module(f"bn2d{number}", nn.BatchNorm2d(width, eps=1e-4))
        self.conv5 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv_final = nn.Conv2d(128, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for number in range(1, 5):
            x = F.leaky_relu(getattr(self, f"bn2d{number}")(getattr(self, f"conv{number}")(x)))
            if number != 3:
                x = F.max_pool2d(x, 3, 2, 1)
        return self.conv_final(self.conv5(x))


def default_std(field: int) -> float:
    """Of the Gaussian, where none is given: as the released code has it."""
    return 10.0 if field >= 32 else math.log10(0.45 * field + 1) + 0.25


def pseudo_huber(output: Tensor) -> Tensor:
    """sqrt(o^2 + 1) - 1, in the form that is not 0 for small o."""
    squares = output.square()
    return squares / ((squares + 1).sqrt() + 1)


def contrast(images: Tensor) -> Tensor:
    """(B, 3, H, W) minus its mean, divided by its mean absolute deviation, over channels and pixels; constant images are 0."""
    moved = images - images.mean(dim=(1, 2, 3), keepdim=True)
    scale = moved.abs().mean(dim=(1, 2, 3), keepdim=True)
    return moved / scale.where(scale > 0, 1)


def losses(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) of spread maps (B, H, W) and masks of the same shape, 0 or 1: all 0 for a normal image.

    mean of u (1 - m), and for images with an anomaly - log(1 - exp(-mean of u m)).
    """
    masks = masks.to(maps.dtype)
    inside = (maps * masks).mean(dim=(1, 2))
    anomalous = -torch.log(-torch.expm1(-inside) + TINY)
    return (maps * (1 - masks)).mean(dim=(1, 2)) + torch.where(masks.flatten(1).any(1), anomalous, 0.0)


def losses_without_maps(cells: Tensor, labels: Tensor) -> Tensor:
    """(B,) of cells a (B, h, w) and labels (B,), without the upsampling: what the release has for data without masks."""
    means = cells.mean(dim=(1, 2))
    return torch.where(labels > 0, -torch.log(-torch.expm1(-means) + TINY), means)


class FCDD(FeatureNetwork):
    """Normalisation, network, maps. Reads images, no features.

    Args:
        net: a `VGG` or a `Small`.
        std: of the Gaussian, in pixels; None: `default_std`.
        normalised: whether maps are divided by those of ones.

    The state dict holds `low` and `high`, (3,): range of the contrast-normalised training images, NaN until measured.
    """

    preparation = "not used"
    low: Tensor
    high: Tensor

    def __init__(self, net: VGG | Small, *, std: float | None = 12.0, normalised: bool = False) -> None:
        super().__init__()
        self.net, self.normalised = net, normalised
        self.std = default_std(net.reception.field) if std is None else std
        if self.std <= 0:
            raise ValueError(f"upsampling_std must be positive, found {std}.")
        self.register_buffer("low", torch.full((3,), torch.nan))
        self.register_buffer("high", torch.full((3,), torch.nan))

    @property
    def has_range(self) -> bool:
        """Whether the range is known."""
        return bool(self.low.isfinite().all())

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> what the network gets."""
        span = self.high - self.low
        return (contrast(pixels) - self.low.view(3, 1, 1)) / span.where(span > 0, 1).view(3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> cells a (B, h, w), float32."""
        return pseudo_huber(self.net(self.normalise(pixels))[:, 0].float())

    def spread(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """Cells (B, h, w) -> map u (B, H, W)."""
        return spread(cells, size, self.net.reception, self.std, self.normalised)


def build(net: Net, start: str, frozen_norm: FrozenNorm) -> tuple[VGG | Small, NoBackbone]:
    """The network, and what stands in place of a backbone.

    start: of VGG11, `imagenet` or a weight file, or `scratch`, whose frozen part was never trained. `cnn224` has no start.
    """
    if net not in get_args(Net):
        raise ValueError(f'net is "{net}"; choose one of {", ".join(get_args(Net))}.')
    if net == "cnn224":
        return Small(), NoBackbone("cnn224")
    trunk, extractor = build_trunk(VGG_NAME, start)
    if start == "scratch":
        extractor.provenance["weights"] = "random"
        extractor.provenance["note"] = "the frozen part has random weights"
    return VGG(trunk.features, frozen_norm), extractor


def released_part(network: FCDD) -> nn.Module:
    """The authors' files hold the network without the range, which their code keeps."""
    return network.net


def released_name(name: str) -> str | None:
    """The released names are the network's."""
    return name if name.startswith(("features.", "conv", "bn2d")) else None
