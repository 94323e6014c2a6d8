"""US, Uninformed Students: an ensemble learns a teacher's patch descriptors, and errs and disagrees where it saw nothing alike.

Bergmann et al., "Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent Embeddings", CVPR 2020,
https://arxiv.org/abs/1911.02357. The authors published no code. Widths and kernels are the paper's tables; where these
contradict themselves (patch size 65) or cannot be right (the first kernel of 17), the usual reimplementation's are taken.

    patch of p x p pixels -> teacher -> descriptor of 128 numbers, one for every pixel of an image
    M students learn it from normal images     error e = |mean student - teacher|^2, variance v of the students
    map = mean over the patch sizes of (e - mean) / std + (v - mean) / std, with the figures of held-out normal images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.tracing import tracing
from models.reconstruction import FeatureNetwork

Padding = Literal["zeros", "reflect"]
Target = Literal["descriptor", "decoded"]
Compactness = Literal["dims", "samples"]

KERNELS = {17: (6, 5, 5, 4), 33: (5, 5, 2, 4), 65: (5, 5, 5, 4, 1)}
"""Patch size -> kernels of the convolutions."""
POOLS = {17: 0, 33: 2, 65: 3}
"""Patch size -> after how many of the first convolutions a 2x2 maximum halves the size."""
WIDTHS = {17: (128, 256, 256, 128), 33: (128, 256, 256, 128), 65: (128, 128, 256, 256, 128)}
"""Patch size -> channels of the convolutions; the last are the descriptor. The paper's third of 65 is 128 or 256."""
SLOPE = 0.005
"""Of the leaky ReLUs."""
SMALLEST_STD = 1e-6


class Reading(NamedTuple):
    """error, variance: of one patch size, float32 (B, H, W); without a second student the variance is 0."""

    error: Tensor
    variance: Tensor


class PatchNetwork(nn.Module):
    """Valid convolutions that make one descriptor of a patch; `forward` gives it around every pixel of an image.

    Args:
        patch_size: 17, 33 or 65.
        widths: channels of the convolutions.
        padding: of the image, by patch_size // 2.
    """

    def __init__(self, patch_size: int, widths: Sequence[int], padding: Padding = "zeros") -> None:
        super().__init__()
        self.patch_size, self.padding = patch_size, padding
        self.pools, self.depth = POOLS[patch_size], len(widths)
        inputs = (3, *widths[:-1])
        for number, (before, width, kernel) in enumerate(zip(inputs, widths, KERNELS[patch_size], strict=True), 1):
            self.add_module(f"conv{number}", nn.Conv2d(before, width, kernel))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H, W): at every pixel what `patches` gives for the patch cut out there.

        The patch of a pixel reaches patch_size // 2 pixels to the left and above; on the other side, floors in the pools
        leave 1 (for 33) or 5 (for 65) of its rows and columns unseen. Instead of cutting out patches, everything behind a
        pool is dilated, for any size.
        """
        H, W = images.shape[-2:]
        half = self.patch_size // 2
        mode = "constant" if self.padding == "zeros" else "reflect"
        x = F.pad(images, (half,) * 4, mode=mode).contiguous(
            memory_format=torch.channels_last
        )  # two to four times faster
        dilation = 1
        for number in range(1, self.depth + 1):
            conv: nn.Conv2d = getattr(self, f"conv{number}")
            x = F.conv2d(x, conv.weight, conv.bias, dilation=dilation)
            x = F.leaky_relu(x, SLOPE) if number < self.depth else x
            if number <= self.pools:
                x = F.max_pool2d(x, 2, stride=1, dilation=dilation)
                dilation *= 2
        return x[..., :H, :W]

    def patches(self, patches: Tensor) -> Tensor:
        """Patches (B, 3, patch_size, patch_size) -> descriptors (B, C)."""
        x = patches
        for number in range(1, self.depth + 1):
            x = getattr(self, f"conv{number}")(x)
            x = F.leaky_relu(x, SLOPE) if number < self.depth else x
            x = F.max_pool2d(x, 2) if number <= self.pools else x
        return x.flatten(1)


class DecodedNetwork(PatchNetwork):
    """A patch network with a linear decoder of its descriptor to the pretrained network's features (`decode`)."""

    def __init__(self, patch_size: int, widths: Sequence[int], decoded: int, padding: Padding = "zeros") -> None:
        super().__init__(patch_size, widths, padding)
        self.decode = nn.Linear(widths[-1], decoded)

    def decoded(self, descriptors: Tensor) -> Tensor:
        """Descriptors (B, C, ...) -> (B, decoded, ...), both activated: what the usual reimplementation has students learn."""
        x = F.leaky_relu(descriptors, SLOPE).movedim(1, -1)
        return F.leaky_relu(self.decode(x), SLOPE).movedim(-1, 1)


class TargetScale(nn.Module):
    """(x - mean) / std of a teacher's channels (B, C, H, W), for students to learn; NaN until they are set."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("std", torch.full((channels,), torch.nan))

    @torch.no_grad()
    def set(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (C,) over all positions of all training images; deviations have a floor of 1e-6."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(SMALLEST_STD))

    def forward(self, output: Tensor) -> Tensor:
        return (output - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class US(FeatureNetwork):
    """Teachers, students and everything estimated from normal images, for each patch size. Reads images, no features.

    Args:
        decoded: channels of the features that teachers are distilled from (ResNet18: 512).
        patch_sizes: among 17, 33 and 65.
        students: M, of each patch size.
        target: what students learn: the teacher's linear `descriptor` (the paper's), or the `decoded` and activated output
            (the usual reimplementation's), with a decoder of their own.
        widths: patch size -> channels of the convolutions, for other than the paper's (65: [128, 128, 128, 256, 128] is the
            paper's table as printed).
        padding: of an image, `zeros` or `reflect` (which needs sides above patch_size // 2).

    Estimated from normal images, and NaN until then: `scales`, mean and deviation of each teacher's channels; `statistics`,
    (patch sizes, 4): mean and std of e, mean and std of v over all pixels.
    One patch size has 1,616,000 trainable parameters per student (33), 2,996,480 (17) or 2,320,640 (65).
    """

    preparation = "not used"

    def __init__(
        self,
        decoded: int,
        *,
        patch_sizes: Sequence[int] = (17, 33, 65),
        students: int = 3,
        target: Target = "descriptor",
        widths: Mapping[int, Sequence[int]] | None = None,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        if not patch_sizes or len(set(patch_sizes)) < len(patch_sizes) or not set(patch_sizes) <= set(KERNELS):
            raise ValueError(f"patch_sizes are one or more of 17, 33 and 65, each once; found {list(patch_sizes)}.")
        if students < 1:
            raise ValueError(f"students is {students}; each patch size needs at least one.")
        for name, value, allowed in (("target", target, Target), ("padding", padding, Padding)):
            if value not in get_args(allowed):
                raise ValueError(f'{name} is "{value}"; choose one of {", ".join(get_args(allowed))}.')
        chosen = {int(size): tuple(given) for size, given in (widths or {}).items()}
        if unknown := sorted(set(chosen) - set(KERNELS)):
            raise ValueError(f"widths name patch size {unknown[0]}; there are 17, 33 and 65.")
        chosen = WIDTHS | chosen
        for size in patch_sizes:
            if len(chosen[size]) != len(KERNELS[size]):
                raise ValueError(
                    f"widths of patch size {size} are {len(KERNELS[size])} numbers, one per convolution; found "
                    f"{list(chosen[size])}."
                )
        self.patch_sizes, self.target = tuple(patch_sizes), target
        self.teachers, self.students = nn.ModuleDict(), nn.ModuleDict()
        self.scales = nn.ModuleDict()
        for size in self.patch_sizes:
            name, own = str(size), chosen[size]
            self.teachers[name] = DecodedNetwork(size, own, decoded, padding)
            self.students[name] = nn.ModuleList(
                DecodedNetwork(size, own, decoded, padding) if target == "decoded" else PatchNetwork(size, own, padding)
                for _ in range(students)
            )
            self.scales[name] = TargetScale(decoded if target == "decoded" else own[-1])
        self.teachers.requires_grad_(False)
        self.register_buffer("statistics", torch.full((len(self.patch_sizes), 4), torch.nan))

    # ---- what the networks say ---------------------------------------------------------------------------------------

    def output(self, network: PatchNetwork, images: Tensor) -> Tensor:
        """What a teacher or student says of images (B, 3, H, W) at every pixel, (B, C, H, W) float32."""
        x = network(images)
        return (network.decoded(x) if self.target == "decoded" else x).float()

    def normalised(self, patch_size: int, images: Tensor) -> Tensor:
        """The teacher's output, each channel with mean 0 and deviation 1 over the training images, (B, C, H, W)."""
        name = str(patch_size)
        with torch.no_grad():
            return self.scales[name](self.output(self.teachers[name], images))

    def student_losses(self, patch_size: int, images: Tensor) -> list[Tensor]:
        """Of each student a scalar: squared distance to the normalised teacher, summed over channels, averaged over pixels."""
        target = self.normalised(patch_size, images)
        return [
            (self.output(student, images) - target).square().sum(dim=1).mean()
            for student in self.students[str(patch_size)]
        ]

    def forward(self, images: Tensor) -> list[Reading]:
        """Images (B, 3, H, W) -> error and variance for each patch size, in their order.

        The variance is the mean squared deviation: mean of squares minus square of the mean cancels in float32.
        """
        readings = []
        for size in self.patch_sizes:
            target = self.normalised(size, images)
            outputs = torch.stack([self.output(student, images) for student in self.students[str(size)]])
            mean = outputs.mean(dim=0)
            variance = (outputs - mean).square().sum(dim=2).mean(dim=0)
            readings.append(Reading((mean - target).square().sum(dim=1), variance))
        return readings

    # ---- what is estimated -------------------------------------------------------------------------------------------

    @property
    def has_teachers(self) -> bool:
        """Whether the teachers are final: their channels' statistics are known."""
        return not any(scale.mean.isnan().any() for scale in self.scales.values())

    @property
    def has_statistics(self) -> bool:
        """Whether maps can be put on a scale."""
        return not bool(self.statistics.isnan().any())

    def scaled(self, readings: Sequence[Reading]) -> tuple[list[Tensor], list[Tensor]]:
        """Errors and variances of each patch size on the scale of normal images, (B, H, W) each.

        With one student there is no variance, and the second list is empty. Raises ValueError before there are statistics.
        """
        if not tracing() and not self.has_statistics:
            raise ValueError(
                "US puts its maps on the scale of normal images, which is estimated when training ends and comes with the "
                "checkpoint: give a checkpoint (--ckpt_path)."
            )
        errors, variances = [], []
        for reading, (e_mean, e_std, v_mean, v_std) in zip(readings, self.statistics, strict=True):
            errors.append((reading.error - e_mean) / e_std.clamp_min(SMALLEST_STD))
            if len(self.students[str(self.patch_sizes[0])]) > 1:
                variances.append((reading.variance - v_mean) / v_std.clamp_min(SMALLEST_STD))
        return errors, variances


def moments(values: Tensor) -> Tensor:
    """Values (C, N) -> per row their number, mean and centred sum of squares, (3, C) float64."""
    values = values.double()
    mean = values.mean(dim=1)
    squares = (values - mean[:, None]).square().sum(dim=1)
    return torch.stack([torch.full_like(mean, values.shape[1]), mean, squares])


def merged(parts: Sequence[Tensor]) -> Tensor:
    """The moments of everything behind some `moments`, whatever their order up to rounding, (3, C) float64."""
    count, mean, squares = torch.stack(list(parts)).unbind(dim=1)
    total = count.sum(dim=0)
    overall = (count * mean).sum(dim=0) / total
    return torch.stack([total, overall, squares.sum(dim=0) + (count * (mean - overall).square()).sum(dim=0)])


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), divisor N, of (3, C) moments."""
    count, mean, squares = moments
    return mean, (squares / count).sqrt()


def distillation_loss(decoded: Tensor, features: Tensor) -> Tensor:
    """Mean over patches of the squared distance, a scalar, of (B, D) both."""
    return (decoded - features).square().sum(dim=1).mean()


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, delta: float = 1.0) -> Tensor:
    """Mean over patches of max(0, delta + |a - p|^2 - min(|a - n|^2, |p - n|^2)), a scalar, of (B, D) each."""
    near = (anchor - positive).square().sum(dim=1)
    far = torch.minimum((anchor - negative).square().sum(dim=1), (positive - negative).square().sum(dim=1))
    return (delta + near - far).clamp_min(0).mean()


def compactness_loss(vectors: Tensor, kind: Compactness) -> Tensor:
    """Half the sum of squared off-diagonal correlations of (B, D), a scalar; needs a batch of two or more.

    kind: between the dimensions over the batch (`dims`: decorrelates them), or between the samples (`samples`: the usual
        reimplementations). The paper leaves open which, and whether squared.
    """
    rows = vectors.T if kind == "dims" else vectors
    centred = rows - rows.mean(dim=1, keepdim=True)
    unit = centred / centred.square().mean(dim=1, keepdim=True).clamp_min(SMALLEST_STD**2).sqrt()
    correlation = unit @ unit.T / rows.shape[1]
    return 0.5 * (correlation.square().sum() - correlation.diagonal().square().sum())
