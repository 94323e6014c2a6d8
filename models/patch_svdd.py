"""Patch SVDD: patches that lie near each other get near embeddings; distance to the nearest training patch scores.

Yi and Yoon, "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation", ACCV 2020,
https://arxiv.org/abs/2006.16067. Where paper and released code differ, the released code is followed.

    patch of 32 pixels -> encoder -> D numbers; patch of 64: its four quarters through it, then two more layers
    training: which of eight directions two patches lie in (cross entropy) + lambda * distance of patches 1 or 2 pixels apart
    map: distance of every patch to the nearest one of the training images, averaged over the patches that cover a pixel;
         the product of both sizes' maps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.nearest import MemoryBank
from models.reconstruction import FeatureNetwork

LastWeight = Literal["fixed", "trained"]
SIDES = (64, 32)
"""Of the patches, in pixels."""
STRIDES = {64: 16, 32: 4}
"""Side -> pixels from one patch that is scored to the next."""
SLOPE = 0.1
"""Of the leaky ReLUs."""


class SmallEncoder(nn.Module):
    """Patches of 32 pixels -> (B, D): eight 3x3 convolutions without padding, the first with stride 2, and a tanh.

    Args:
        widths: channels of the first seven.
        dim: D.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        if len(widths) != 7:
            raise ValueError(f"widths names the channels of seven convolutions, found {list(widths)}.")
        for number, (before, width) in enumerate(zip((3, *widths), (*widths, dim), strict=True), 1):
            self.add_module(f"conv{number}", nn.Conv2d(before, width, 3, 2 if number == 1 else 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w): the embedding of every patch whose corner has even coordinates, all at once."""
        x = images
        for number in range(1, 8):
            x = F.leaky_relu(getattr(self, f"conv{number}")(x), SLOPE)
        return torch.tanh(self.conv8(x))


class Encoder(nn.Module):
    """Both encoders with the released names: `enc`, the small one, and the two layers above it for 64 pixels.

    401,984 parameters with the released widths, of which 360,832 are those of `enc`.
    """

    def __init__(self, widths: Sequence[int], dim: int, hidden: int) -> None:
        super().__init__()
        self.enc = SmallEncoder(widths, dim)
        self.conv1 = nn.Conv2d(dim, hidden, 2)
        self.conv2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, 3, K, K) with K 32 or 64 -> (B, D)."""
        if patches.shape[-1] == SIDES[1]:
            return self.enc(patches).flatten(1)
        B, _, K, _ = patches.shape
        quarters = patches.unfold(2, K // 2, K // 2).unfold(3, K // 2, K // 2)  # (B, 3, 2, 2, K / 2, K / 2)
        inner = self.enc(quarters.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).flatten(1)
        grid = inner.view(B, 2, 2, -1).permute(0, 3, 1, 2)
        return self._upper(grid).flatten(1)

    def _upper(self, grid: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        x = F.conv2d(grid, self.conv1.weight, self.conv1.bias, stride=stride, dilation=dilation)
        return torch.tanh(self.conv2(F.leaky_relu(x, SLOPE)))

    def maps(self, images: Tensor) -> dict[int, Tensor]:
        """Images (B, 3, H, W) -> side: embeddings (B, I, J, D) of the patches at its stride.

        The same as cutting out the patches, for a twentieth of the work: the small encoder's map has stride 2, so patches
        of 32 pixels are every second of its places, and a patch of 64 has its quarters 16 places apart.
        """
        dense = self.enc(images)
        small = dense[..., :: STRIDES[32] // 2, :: STRIDES[32] // 2]
        large = self._upper(dense, stride=STRIDES[64] // 2, dilation=16)
        return {64: large.permute(0, 2, 3, 1), 32: small.permute(0, 2, 3, 1)}


class PositionClassifier(nn.Module):
    """Which of eight directions the second patch lies in, from the difference of two embeddings: (B, D) each -> (B, 8).

    The last layer's weight is divided by its length over the eight classes.

    Args:
        last_weight: `fixed`: no gradient reaches that weight, so that it keeps its initial value, as released; `trained`.
    """

    def __init__(self, dim: int, hidden: int, last_weight: LastWeight = "fixed") -> None:
        super().__init__()
        if last_weight not in get_args(LastWeight):
            raise ValueError(f'last_weight is "{last_weight}"; choose one of {", ".join(get_args(LastWeight))}.')
        self.last_weight = last_weight
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 8)
        self.fc3.weight.requires_grad_(last_weight == "trained")

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc1(first - second), SLOPE)
        x = F.leaky_relu(self.fc2(x), SLOPE)
        return F.linear(x, self.fc3.weight / torch.linalg.vector_norm(self.fc3.weight, dim=0), self.fc3.bias)


class PatchSVDD(FeatureNetwork):
    """Encoder, position classifiers, mean image and the embeddings of the training patches. Reads images, no features.

    Args:
        size: (height, width) of the images.
        dim: D, of both embeddings.
        widths: of the small encoder's first seven convolutions.
        hidden: of the layer above it, and of the classifiers.
        last_weight: see `PositionClassifier`.

    The state dict holds `mean_image`, (3, height, width) in [0, 1], NaN until it is measured, and the banks `bank_64` and
    `bank_32`, empty until training ends: 3.2 GB for MVTec AD's 3,629 training images at 256 pixels.
    """

    preparation = "not used"
    mean_image: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        *,
        dim: int = 64,
        widths: Sequence[int] = (32, 64, 128, 128, 64, 32, 32),
        hidden: int = 128,
        last_weight: LastWeight = "fixed",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, dim, hidden)
        self.cls_64 = PositionClassifier(dim, hidden, last_weight)
        self.cls_32 = PositionClassifier(dim, hidden, last_weight)
        self.bank_64, self.bank_32 = MemoryBank(dim), MemoryBank(dim)
        self.dim = dim
        self.register_buffer("mean_image", torch.full((3, *size), torch.nan))

    @property
    def banks(self) -> dict[int, MemoryBank]:
        """Side -> embeddings of the training patches."""
        return {64: self.bank_64, 32: self.bank_32}

    @property
    def has_mean(self) -> bool:
        """Whether the mean image is known."""
        return bool(self.mean_image.isfinite().all())

    def losses(self, position: Tensor, label: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the direction, and mean distance (not squared) of near patches, of one side.

        position: centred patches (B, 2, 3, K, K).
        label: (B,).
        near: See `position`.
        """
        classifier = self.cls_64 if position.shape[-1] == 64 else self.cls_32
        first, second, near_first, near_second = self.encoder(
            torch.cat([position[:, 0], position[:, 1], near[:, 0], near[:, 1]])
        ).chunk(4)
        distances = torch.linalg.vector_norm(near_first - near_second, dim=1)  # its gradient at 0 is 0
        return F.cross_entropy(classifier(first, second), label), distances.mean()

    def centred(self, patches: Tensor, corners: Tensor) -> Tensor:
        """Patches (B, 2, 3, K, K) in [0, 1] without the mean image at their places; corners: (B, 2, 2), row and column."""
        K = patches.shape[-1]
        steps = torch.arange(K, device=patches.device)
        rows = (corners[..., 0, None] + steps)[..., :, None]  # (B, 2, K, 1)
        columns = (corners[..., 1, None] + steps)[..., None, :]
        return patches - self.mean_image[:, rows, columns].movedim(0, 2)

    def embed(self, images: Tensor) -> dict[int, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> side: embeddings (B, I, J, D)."""
        return self.encoder.maps(images - self.mean_image)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> side: map (B, H, W), the mean distance of the patches that cover a pixel.

        Nearest neighbours are exact. Pixels that no patch covers are 0.
        """
        found = {}
        for side, vectors in self.embed(images).items():
            B, rows, columns, _ = vectors.shape
            squares, _ = self.banks[side](vectors.flatten(0, 2))
            found[side] = spread(squares[:, 0].sqrt().view(B, rows, columns), side, tuple(images.shape[-2:]))
        return found


def spread(distances: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Patch distances (B, I, J) -> (B, H, W): every pixel's mean over the patches that cover it, 0 where none does."""
    stride = STRIDES[side]
    ones = distances.new_ones(1, 1, side, side)
    total = F.conv_transpose2d(distances[:, None], ones, stride=stride)
    count = F.conv_transpose2d(torch.ones_like(distances[:1, None]), ones, stride=stride)
    below, right = (side - covered for side, covered in zip(size, total.shape[-2:], strict=True))
    return F.pad((total / count)[:, 0], (0, right, 0, below))


def released_part(network: PatchSVDD) -> nn.Module:
    """The authors' files hold the encoder alone; the classifiers were not released."""
    return network.encoder


def released_name(name: str) -> str | None:
    """The encoder has the released names."""
    return name if name.startswith(("enc.", "conv1.", "conv2.")) else None
