"""MKD, multiresolution knowledge distillation: a small cloner learns the levels of a frozen source network.

Salehi et al., "Multiresolution Knowledge Distillation for Anomaly Detection", CVPR 2021, https://arxiv.org/abs/2011.11108.
Where paper and released code differ, the released code is followed: the weight multiplies the squared error (the paper puts
it on the direction), the cosine is one number per image and level, four levels are learned and three of them scored.

    image -> source, VGG16 -> after pools 2, 3, 4, 5  \\
    image -> cloner, the same plan but narrow -> 2 to 5  > 1 - cos of the whole level + 0.5 * mean square
                                                      map = gradient of the score of levels 3 to 5 by the pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.reconstruction import Pair, ReconstructionNetwork

Map = Literal["gradients", "gbp", "smooth_grad"]
NoiseRule = Literal["released", "smoothgrad"]


class MKD(ReconstructionNetwork):
    """The cloner, and the source's levels that it is compared with. Its parameters have the released names, `features.N`.

    Every stage halves the image: 3x3 convolutions, each followed by batch norm and ReLU, but the last one by ReLU alone, so
    that no compared level is normalised; then a 2x2 maximum. 343,984 parameters for VGG16's levels.

    Args:
        channels: of the source's levels, lowest first, as `prepare` gives them (behind the pool, for a VGG). Strides are
            powers of two, 4, 8, 16 and 32 for the released network.
        strides: See `channels`.
        pooled: whether the source's levels still have to be pooled: a VGG's, which the feature extractor gives before the
            pool.
        stages: widths of the cloner's convolutions, a list per stage; a compared stage ends in its level's channels. None
            is the released plan: two convolutions in the first two stages, three in the others, 16 channels but for the
            last one.
        equal_size: the plan has the levels' channels in every convolution instead of 16 (the paper's equal-size ablation).
        bias: whether the cloner's convolutions have biases.

    Raises ValueError for strides or stages that do not fit the source.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        pooled: bool = True,
        stages: Sequence[Sequence[int]] | None = None,
        equal_size: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        numbers = [stride.bit_length() - 1 for stride in strides]
        if any(2**number != stride for number, stride in zip(numbers, strides, strict=True)) or numbers != sorted(
            set(numbers)
        ):
            raise ValueError(
                f"the cloner halves the image stage by stage, so the levels' strides must be ascending powers of two, found "
                f"{list(strides)}."
            )
        if len(channels) < 2:
            raise ValueError("MKD learns at least two levels: all but the lowest one are scored. Set backbone.levels.")
        if stages is not None and equal_size:
            raise ValueError("stages and equal_size both say how wide the cloner is: give one of them.")
        wanted = dict(zip(numbers, channels, strict=True))
        plan = [list(widths) for widths in stages] if stages is not None else _plan(wanted, equal_size)
        if len(plan) != numbers[-1] or not all(plan):
            raise ValueError(
                f"the highest level's stride {strides[-1]} needs {numbers[-1]} stages of one convolution or more, found "
                f"stages={plan}."
            )
        for number, width in wanted.items():
            if plan[number - 1][-1] != width:
                raise ValueError(
                    f"stage {number} of the cloner must end in the {width} channels of the source's level, found "
                    f"{plan[number - 1]}."
                )
        self.pooled, self.bias = pooled, bias
        layers: list[nn.Module] = []
        self.outputs = []
        inputs = 3
        for number, widths in enumerate(plan, 1):
            for width in widths[:-1]:
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers += [nn.Conv2d(inputs, widths[-1], 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = widths[-1]
            if number in wanted:
                self.outputs.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    @property
    def preparation(self) -> str:
        return "without negative values" + (", 2x2 maximum" if self.pooled else "")

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """The source's levels as the cloner is to give them: without negative values, which end in no ReLU elsewhere than in
        a VGG and could not be learned; a VGG's pooled."""
        levels = [F.relu(level) for level in levels]
        return [F.max_pool2d(level, 2) for level in levels] if self.pooled else levels

    def clone(self, pixels: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> list[Tensor]:
        """Pixels (B, 3, H, W) -> the cloner's levels (B, C_l, H / stride, W / stride), lowest first.

        relu: what stands for the ReLUs (`guided_relu` for guided backpropagation).
        """
        x, levels = pixels, []
        for number, layer in enumerate(self.features):
            x = relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if number in self.outputs:
                levels.append(x)
        return levels

    def forward(self, features: list[Tensor], pixels: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> list[Pair]:
        """The source's prepared levels and the pixels that both networks see -> a pair per level."""
        return [Pair(target, level) for target, level in zip(features, self.clone(pixels, relu), strict=True)]


def _plan(wanted: dict[int, int], equal_size: bool) -> list[list[int]]:
    """The released widths of every stage, from the channels of the compared ones."""
    plan: list[list[int]] = []
    first = min(wanted)
    for number in range(1, max(wanted) + 1):
        # Stages below the lowest compared level, in which the source is half as wide with each (VGG16: 64, then 128).
        own = wanted.get(number, max(1, wanted[first] >> (first - number)) if number < first else max(wanted.values()))
        count, inner = 2 if number <= 2 else 3, own if equal_size else 16
        plan.append([inner] * (count - 1) + [own if number in wanted else inner])
    return plan


def differences(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Per image and level, both (B, levels) float32: 1 - cosine of the whole flattened levels, and their mean square."""
    cosine, square = [], []
    for target, clone in pairs:
        target, clone = target.float().flatten(1), clone.float().flatten(1)
        cosine.append(1 - F.cosine_similarity(clone, target, dim=1))
        square.append((clone - target).square().mean(dim=1))
    return torch.stack(cosine, dim=1), torch.stack(square, dim=1)


def distances(pairs: Sequence[Pair], weight: float) -> Tensor:
    """1 - cosine + weight * mean square, (B, levels). The weight multiplies the square, as in the released code."""
    cosine, square = differences(pairs)
    return cosine + weight * square


def loss(pairs: Sequence[Pair], weight: float) -> Tensor:
    """A float32 scalar: the distances, summed over all levels, averaged over the images."""
    return distances(pairs, weight).mean(dim=0).sum()


def image_scores(pairs: Sequence[Pair], weight: float) -> Tensor:
    """(B,): the distances summed over all levels but the lowest."""
    return distances(pairs[1:], weight).sum(dim=1)


class _Guided(torch.autograd.Function):
    """ReLU whose gradient passes only where both the input and the gradient are positive."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient * (gradient > 0) * (x > 0)


def guided_relu(x: Tensor) -> Tensor:
    """The ReLU of guided backpropagation."""
    return _Guided.apply(x)


def pixel_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each image's own score by its pixels, (B, 3, H, W), and the scores (B,).

    Works wherever it is called, also in a trainer's inference mode, and leaves no gradient in any parameter.

    score: images (B, 3, H, W) -> (B,), without anything that mixes images.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        scores = score(images)
        return torch.autograd.grad(scores.sum(), images)[0], scores.detach()


def grey(gradient: Tensor) -> Tensor:
    """(B, 3, H, W) -> sum of the absolute values over the channels, (B, H, W)."""
    return gradient.abs().sum(dim=1)


def stretched(maps: Tensor, quantile: float = 1.0) -> Tensor:
    """Each map (B, H, W) moved and scaled on its own: its minimum to 0, its quantile to 1, clipped. A constant one is 0.

    quantile: interpolated linearly; the released code takes 0.99 of the grey map, and its maximum (1.0) afterwards.
    """
    flat = maps.flatten(1)
    low = flat.amin(dim=1)[:, None, None]
    high = (flat.amax(dim=1) if quantile == 1 else torch.quantile(flat, quantile, dim=1))[:, None, None]
    span = high - low
    return torch.where(span > 0, ((maps - low) / span.where(span > 0, 1)).clamp(0, 1), 0)


def noise_std(images: Tensor, rule: NoiseRule) -> Tensor:
    """Standard deviation of `smooth_grad`'s noise for each image (B, 3, H, W), (B,).

    `smoothgrad`: 0.05 of the image's range, as in the paper that the map comes from. `released`: (0.05 / range)^2.
    """
    flat = images.flatten(1)
    span = flat.amax(dim=1) - flat.amin(dim=1)
    return 0.05 * span if rule == "smoothgrad" else (0.05 / span.clamp_min(1e-6)).square()


def opened(maps: Tensor) -> Tensor:
    """Grey opening of maps (B, H, W) with a cross of five pixels: minimum, then maximum over it.

    A threshold of the result is the released code's opening of the thresholded map, for every threshold.
    """
    lowest = -_highest_of_cross(-maps)
    return _highest_of_cross(lowest)


def _highest_of_cross(maps: Tensor) -> Tensor:
    """Maximum of a pixel and its four neighbours; outside the image nothing counts."""
    H, W = maps.shape[-2:]
    padded = F.pad(maps, (1, 1, 1, 1), value=float("-inf"))
    shifts = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return torch.stack([padded[:, top : top + H, left : left + W] for top, left in shifts]).amax(dim=0)


def check_map(kind: str, rule: str, draws: int) -> None:
    """Raises ValueError for options of the map that do not exist."""
    for name, value, allowed in (("map", kind, Map), ("noise_rule", rule, NoiseRule)):
        if value not in get_args(allowed):
            raise ValueError(f'{name} is "{value}"; choose one of {", ".join(get_args(allowed))}.')
    if draws < 1:
        raise ValueError(f"smooth_draws is {draws}; give at least 1.")


def released_name(name: str) -> str | None:
    """A cloner's parameters have the authors' names; None for anything else."""
    return name if name.startswith("features.") else None
