"""DeSTSeg's denoising student and segmentation network.

Zhang et al., "DeSTSeg: Segmentation Guided Denoising Student-Teacher for Anomaly Detection", CVPR 2023,
https://arxiv.org/abs/2211.11317. Where the paper is silent this follows the released code, and says so.

A student sees an image with a synthetic anomaly and learns the frozen teacher's features of the same image without it.
Then the segmentation network learns to find the anomaly in the products of the two nets' features of the corrupted image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.neck import resize
from models.reconstruction import Pair, ReconstructionNetwork

SegmentationInput = Literal["products", "concatenated", "cosine"]


class DeSTSeg(ReconstructionNetwork):
    """Everything that is trained: the student, and the segmentation network. The teacher's features come from outside.

    Args:
        channels: of the teacher's three levels, finest first (ResNet18: layers 1 to 3 at strides 4, 8 and 16).
        decoder: whether the student is an encoder with a decoder behind it (the paper's), or the encoder's first three
            stages (`ed` off in the paper's Table 4).
        widths: of the student encoder's four stages; None = the teacher's channels and twice the last, as released. Without
            a decoder the first three must be the teacher's.
        stem: width of the student's first convolution.
        segmentation_input: `products` of the unit vectors channel by channel; both nets' unit vectors `concatenated`; or
            the three `cosine` distances (the paper's Table 6).
        segmentation_width: channels of the segmentation network.
        dilations: of its three dilated branches.

    Raises ValueError for another number of levels, an unknown option, or widths that do not fit.
    """

    preparation = "without negative values"

    def __init__(
        self,
        channels: Sequence[int],
        *,
        decoder: bool = True,
        widths: Sequence[int] | None = None,
        stem: int = 64,
        segmentation_input: SegmentationInput = "products",
        segmentation_width: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        if len(channels) != 3:
            raise ValueError(
                f"DeSTSeg compares three levels of the teacher, found {len(channels)}: set backbone.levels."
            )
        if segmentation_input not in get_args(SegmentationInput):
            allowed = ", ".join(get_args(SegmentationInput))
            raise ValueError(f'segmentation_input names "{segmentation_input}"; choose from {allowed}.')
        widths = tuple(widths or (*channels, 2 * channels[-1]))
        if len(widths) != 4:
            raise ValueError(f"widths has {len(widths)} values; the student's encoder has four stages.")
        if not decoder and widths[:3] != tuple(channels):
            raise ValueError(
                f"Without a decoder the student's first three stages must be as wide as the teacher's levels "
                f"{list(channels)}, found widths {list(widths)}."
            )
        self.segmentation_input = segmentation_input
        self.student = Student(widths, channels, stem) if decoder else Encoder(widths, stem, outputs=3)
        inputs = {"products": sum(channels), "concatenated": 2 * sum(channels), "cosine": 3}[segmentation_input]
        self.segmentation = Segmentation(inputs, segmentation_width, dilations)

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """The teacher's levels without negative values, which the student's ReLUs could not follow.

        This changes nothing for a ResNet, whose levels end in a ReLU.
        """
        return [F.relu(level) for level in levels]

    def forward(self, teacher: Sequence[Tensor], images: Tensor) -> list[Pair]:
        """Teacher's and student's unit vectors of each level, from the teacher's (B, C_l, H_l, W_l) and the images.

        images: (B, 3, H, W), normalised, what the student sees. In the first phase of the training the teacher's levels
        are those of the images without the anomalies.
        """
        return [Pair(unit(t), unit(s)) for t, s in zip(teacher, self.student(images), strict=True)]

    def segment(self, pairs: Sequence[Pair]) -> Tensor:
        """Probability of an anomaly at the finest level's size, (B, 1, H_1, W_1)."""
        return self.segmentation(self.segmentation_inputs(pairs))

    def segmentation_inputs(self, pairs: Sequence[Pair]) -> Tensor:
        """(B, C, H_1, W_1): the levels resized to the finest without aligned corners, in the order from finest to coarsest.

        Products carry a minus sign, which the paper leaves out and released weights need.
        """
        if self.segmentation_input == "products":
            levels = [-t * s for t, s in pairs]
        elif self.segmentation_input == "concatenated":
            levels = [torch.cat(pair, dim=1) for pair in pairs]
        else:
            levels = [distance[:, None] for distance in distances(pairs)]
        size = tuple(levels[0].shape[-2:])
        return torch.cat([resize(level, size, align_corners=False) for level in levels], dim=1)


def unit(features: Tensor) -> Tensor:
    """(B, C, H, W) divided by its length over channels, float32; zero vectors stay zero."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-12)


def distances(pairs: Sequence[Pair]) -> list[Tensor]:
    """1 - cosine of each level's unit vectors, (B, H_l, W_l)."""
    return [1 - (t * s).sum(1) for t, s in pairs]


def cosine_loss(pairs: Sequence[Pair]) -> Tensor:
    """Mean distance over positions, summed over levels and images (the released learning rate belongs to 32 images)."""
    return torch.stack([distance.mean(dim=(1, 2)).sum() for distance in distances(pairs)]).sum()


def small_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """bool or float (B, 1, H, W) to float32 0/1 at `size`: bilinear without aligned corners, from 0.5 on anomalous."""
    return (resize(mask.float(), size, align_corners=False) >= 0.5).float()


def focal_loss(probability: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Mean of -(1 - p)^gamma log p, with p the probability of the true label: (B, 1, H, W) both, mask 0/1."""
    true = torch.where(mask > 0, probability, 1 - probability).clamp_min(torch.finfo(probability.dtype).tiny)
    return -((1 - true) ** gamma * true.log()).mean()


class Block(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a shortcut, which is a 1x1 convolution where size or width change."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or channels != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def _stage(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(Block(channels, width, stride), Block(width, width))


def _kaiming(module: nn.Module) -> None:
    """Normal with the fan-out of a ReLU, for every convolution below."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class Encoder(nn.Module):
    """ResNet18 with any widths: (B, 3, H, W) to its stages at strides 4, 8, 16 and 32, after their last ReLU.

    The second norm of every block starts at 0, so that each block starts as its shortcut (timm's start).
    """

    def __init__(self, widths: Sequence[int], stem: int = 64, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs or len(widths)
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        inputs = (stem, *widths[:-1])
        self.stages = nn.ModuleList(
            _stage(before, width, stride=2 if number else 1)
            for number, (before, width) in enumerate(zip(inputs, widths, strict=True))
            if number < self.outputs
        )
        _kaiming(self)
        for block in self.modules():
            if isinstance(block, Block):
                nn.init.zeros_(block.bn2.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class Student(nn.Module):
    """An encoder of four stages and a decoder up to the teacher's three levels, without a connection around the bottleneck.

    Args:
        widths: of the encoder's stages; channels: of the teacher's levels, finest first.
    """

    def __init__(self, widths: Sequence[int], channels: Sequence[int], stem: int) -> None:
        super().__init__()
        self.encoder = Encoder(widths, stem)
        outputs = (widths[3], *reversed(channels))
        self.decoder = nn.ModuleList(
            _stage(before, width) for before, width in zip((widths[3], *outputs[:-1]), outputs, strict=True)
        )
        _kaiming(self.decoder)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Three levels of the teacher's shapes, finest first."""
        *sides, bottleneck = self.encoder(images)
        x = self.decoder[0](bottleneck)
        levels = []
        for stage, side in zip(self.decoder[1:], reversed(sides), strict=True):
            x = stage(resize(x, tuple(side.shape[-2:]), align_corners=False))
            levels.append(x)
        return levels[::-1]


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation if kernel == 3 else 0
        self.conv = nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling as released: a pooled and three dilated branches, no plain 1x1 one.

    A batch of one image cannot be trained on: the pooled branch's norm has one value per channel then.
    """

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.pooled = ConvNormReLU(width, width, kernel=1)
        self.dilated = nn.ModuleList(ConvNormReLU(width, width, dilation=dilation) for dilation in dilations)
        self.fusion = ConvNormReLU((1 + len(dilations)) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.fusion(torch.cat([pooled, *(branch(x) for branch in self.dilated)], dim=1))


class Segmentation(nn.Module):
    """Two residual blocks (`blocks`) and a head with the pyramid; (B, C, H, W) to probabilities (B, 1, H, W).

    The blocks start kaiming-normal, the head from torch's defaults, as released.
    """

    def __init__(self, channels: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.blocks = _stage(channels, width)
        _kaiming(self.blocks)
        self.head = nn.Sequential(
            Pyramid(width, dilations),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)).float().sigmoid()


RELEASED_BACKBONE = "teacher_net.encoder."
"""Of the teacher's weights in the authors' checkpoints; behind it stand the names of a ResNet18."""
_PYRAMID = {"0.1": "pooled", "1": "dilated.0", "2": "dilated.1", "3": "dilated.2"}


def released_name(name: str) -> str | None:
    """The name here of a tensor of the authors' checkpoint; None for the teacher's, which belong to the backbone."""
    if name.startswith("student_net."):
        return "student." + _student_name(name.removeprefix("student_net."))
    if name.startswith("segmentation_net.res."):
        return "segmentation.blocks." + name.removeprefix("segmentation_net.res.")
    branches = "segmentation_net.head.0.aspp_feature_extractors."
    if name.startswith(branches):
        branch, leaf = name.removeprefix(branches).rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
        return f"segmentation.head.0.{_PYRAMID[branch]}.{leaf}" if branch in _PYRAMID else None
    if name.startswith("segmentation_net.head."):
        return "segmentation.head." + name.removeprefix("segmentation_net.head.").replace("aspp_fusion_layer", "fusion")
    return None


def _student_name(name: str) -> str:
    """`decoder_layer4.`, the bottleneck's, is the decoder's first stage here; the encoder's layers count from 1."""
    if name.startswith("decoder_layer"):
        number, _, rest = name.removeprefix("decoder_layer").partition(".")
        return f"decoder.{4 - int(number)}.{rest}"
    return "encoder." + encoder_name(name.removeprefix("encoder."))


def encoder_name(name: str) -> str:
    """A ResNet18's name in `Encoder`."""
    if name.startswith("layer"):
        number, _, rest = name.removeprefix("layer").partition(".")
        return f"stages.{int(number) - 1}.{rest}"
    return name
