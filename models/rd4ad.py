"""RD4AD, reverse distillation: a student decoder rebuilds the teacher's features from a compact embedding of them.

Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR 2022,
https://arxiv.org/abs/2201.10703. Where paper and released code differ, the released code is followed: one cosine per image
and level in the loss (the paper: one per position), no memory and no attention.

    teacher's levels E1, E2, E3 -> one-class embedding: fused at E3's grid, then halved once more -> decoder, a mirrored
    ResNet -> D3, D2, D1                  map = sum over the levels of 1 - cos(E, D) at every position
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.reconstruction import Pair, ReconstructionNetwork

Block = Literal["bottleneck", "basic"]
EXPANSION = {"bottleneck": 4, "basic": 1}


class RD4AD(ReconstructionNetwork):
    """Three levels in, three pairs out. Of a ResNet's levels (c, 2c, 4c) it is the released network; of any other
    backbone's the widths follow the levels in the same way.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them, each level at half the
            size of the one before. The highest level's size must be even.
        sizes: See `channels`.
        block: residual blocks of the embedding and the decoder, `bottleneck` (ResNet50 and larger) or `basic` (ResNet18,
            34).
        width_per_group: middle width of a bottleneck block relative to a ResNet's, in units of 64: 128 for WideResNet50-2,
            also in the embedding, where anomalib leaves 64.
        embedding_blocks: blocks of the embedding: 3, for basic blocks 2.
        decoder_blocks: blocks of the decoder's layers, from the smallest map: 3, 4, 6 for ResNet50; 2, 2, 2 for ResNet18.

    83,802,624 parameters for WideResNet50-2. The released embedding carries 8,392,704 more, in `conv4` and `bn4`, which
    nothing uses or trains; they are left out, and ignored in a released checkpoint.

    Raises ValueError for levels that do not fit together.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        block: Block = "bottleneck",
        width_per_group: int = 128,
        embedding_blocks: int = 3,
        decoder_blocks: Sequence[int] = (3, 4, 6),
    ) -> None:
        super().__init__()
        if block not in get_args(Block):
            raise ValueError(f'block is "{block}"; choose one of {", ".join(get_args(Block))}.')
        if len(channels) != 3 or len(decoder_blocks) != 3:
            raise ValueError(
                f"RD4AD reads three backbone levels and has three decoder layers, found {len(channels)} levels and "
                f"decoder_blocks={list(decoder_blocks)}. Its levels are 2, 3 and 4 (strides 4, 8 and 16)."
            )
        if embedding_blocks < 1 or min(decoder_blocks) < 1:
            raise ValueError(
                f"every layer needs at least one block, found embedding_blocks={embedding_blocks}, "
                f"decoder_blocks={list(decoder_blocks)}."
            )
        if any(width % EXPANSION[block] for width in channels):
            raise ValueError(
                f"bottleneck blocks need levels whose channels are divisible by 4, found {list(channels)}: set block to "
                "basic."
            )
        for fine, coarse in zip(sizes, [*sizes[1:], None], strict=True):
            wanted = tuple(side // 2 for side in fine)
            if any(side % 2 for side in fine) or (coarse is not None and tuple(coarse) != wanted):
                raise ValueError(
                    f"RD4AD halves every level to the next and the last one once more, found levels of "
                    f"{', '.join(f'{h}x{w}' for h, w in sizes)}. Choose three neighbouring levels and an image size that is "
                    "divisible by twice the highest one's stride (32)."
                )
        self.embedding = OneClassEmbedding(channels, block, width_per_group, embedding_blocks)
        self.decoder = Decoder(channels, block, width_per_group, decoder_blocks)
        for module in self.modules():
            if type(module) is nn.Conv2d:  # transposed ones keep torch's initialisation, as in the released code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """Levels (B, C_l, H_l, W_l), lowest first -> pairs of the same shapes."""
        embedded = self.embedding(features)
        return [Pair(target, output) for target, output in zip(features, self.decoder(embedded), strict=True)]


def cosine_loss(pairs: Sequence[Pair]) -> Tensor:
    """Released loss, a float32 scalar: over the levels the sum of 1 - cos(E, D), of an image's whole level each, averaged
    over the images."""
    return torch.stack(
        [
            (1 - F.cosine_similarity(pair.target.float().flatten(1), pair.reconstruction.float().flatten(1))).mean()
            for pair in pairs
        ]
    ).sum()


class OneClassEmbedding(nn.Module):
    """MFF and OCBE: levels at the highest one's grid by strided convolutions, concatenated, then a residual stage of
    stride 2. Returns (B, 2 C_3, H_3 / 2, W_3 / 2)."""

    def __init__(self, channels: Sequence[int], block: Block, width_per_group: int, blocks: int) -> None:
        super().__init__()
        low, middle, high = channels
        self.conv1, self.bn1 = _halving(low, middle), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = _halving(middle, high), nn.BatchNorm2d(high)
        self.conv3, self.bn3 = _halving(middle, high), nn.BatchNorm2d(high)
        first = _residual(block, 3 * high, 2 * high, width_per_group, change="down")
        further = [_residual(block, 2 * high, 2 * high, width_per_group) for _ in range(blocks - 1)]
        self.bn_layer = nn.Sequential(first, *further)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        low, middle, high = features
        if self.training and len(high) * high.shape[2] * high.shape[3] == 4:
            raise ValueError(
                "RD4AD's embedding has a single position in this batch, of which batch norm cannot take statistics in "
                "training: use larger images or more than one image per batch."
            )
        low = F.relu(self.bn1(self.conv1(low)))
        low = F.relu(self.bn2(self.conv2(low)))
        middle = F.relu(self.bn3(self.conv3(middle)))
        return self.bn_layer(torch.cat([low, middle, high], dim=1))


class Decoder(nn.Module):
    """A ResNet's stages in reverse, each of which doubles the size by a transposed 2x2 convolution in its first block."""

    def __init__(self, channels: Sequence[int], block: Block, width_per_group: int, blocks: Sequence[int]) -> None:
        super().__init__()
        width = 2 * channels[2]
        for number, (outputs, count) in enumerate(zip(reversed(channels), blocks, strict=True), 1):
            first = _residual(block, width, outputs, width_per_group, change="up")
            further = [_residual(block, outputs, outputs, width_per_group) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *further))
            width = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 2 C_3, h, w) -> the levels, lowest first."""
        high = self.layer1(x)
        middle = self.layer2(high)
        return [self.layer3(middle), middle, high]


def _halving(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)


def _resampling(inputs: int, outputs: int, change: str) -> nn.Module:
    """The convolution of a block that changes the size (`down`, `up`) or keeps it (the empty string)."""
    if change == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if change else 1, padding=1, bias=False)


def _residual(block: Block, inputs: int, outputs: int, width_per_group: int, change: str = "") -> nn.Module:
    if block == "basic":
        return BasicBlock(inputs, outputs, change)
    return Bottleneck(inputs, outputs, max(1, outputs // EXPANSION[block] * width_per_group // 64), change)


def _shortcut(inputs: int, outputs: int, change: str) -> nn.Module:
    if change == "up":
        return nn.Sequential(_resampling(inputs, outputs, "up"), nn.BatchNorm2d(outputs))
    if change == "down" or inputs != outputs:
        stride = 2 if change else 1
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `change` acts in the first."""

    def __init__(self, inputs: int, outputs: int, change: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _resampling(inputs, outputs, change), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _resampling(outputs, outputs, ""), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, change)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; `change` acts in the middle one."""

    def __init__(self, inputs: int, outputs: int, width: int, change: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _resampling(width, width, change), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, change)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def released_name(name: str) -> str | None:
    """A released parameter's name, `bn.*` for the embedding and `decoder.*`, in this network's words; None for the unused
    `conv4`, `bn4` and the memory of old checkpoints."""
    part, _, rest = name.partition(".")
    if part not in ("bn", "decoder") or rest.startswith(("conv4.", "bn4.")) or "memory" in rest:
        return None
    inner = rest.replace(".downsample.", ".shortcut.").replace(".upsample.", ".shortcut.")
    return f"{'embedding' if part == 'bn' else 'decoder'}.{inner}"
