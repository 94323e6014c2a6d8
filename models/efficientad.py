"""EfficientAD: a student learns a small teacher's patch descriptors, and an autoencoder's view of them.

Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
https://arxiv.org/abs/2303.14535. The authors released no code; the networks are anomalib's, which follow the third-party
implementation in use (nelson1425/EfficientAD). Statistics, losses, quantiles and maps are this project's.

    pixels -> teacher T, student (S, S'), autoencoder A: (B, 384, H/4 - 8, W/4 - 8) each
    local map = mean over channels of (T - S)^2, global map = of (A - S')^2; each on the scale of normal images, then their mean
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers.statistics import BranchQuantiles, ChannelStatistics
from models.reconstruction import FeatureNetwork
from models.weight_files import check_finite, check_fit

Size = Literal["small", "medium"]
CHANNELS = 384
SMALLEST = 256
"""Smallest side of an image: the autoencoder's last kernel does not fit into a smaller one's map."""
PADDING = 4
"""Positions without descriptor at each border of a map, which count as 0."""
HARD = 0.999
"""Quantile of the differences from which they enter the student's loss."""
BRANCHES = ("local", "global")
QUANTILES = (0.9, 0.995)


class EfficientAD(FeatureNetwork):
    """Pixels in, descriptors out: small 5,363,712 trained parameters, medium 12,711,808. The teacher is frozen.

    The teacher's channels are standardised over the training images, by moments in float64 (anomalib: sums of squares in
    float32).

    Args:
        size: Of teacher and student, `small` (EfficientAD-S) or `medium` (EfficientAD-M).
    """

    preparation = "not used"

    def __init__(self, *, size: Size = "small") -> None:
        super().__init__()
        if size not in get_args(Size):
            raise ValueError(f'size is "{size}"; choose one of {", ".join(get_args(Size))}.')
        from anomalib.models.image.efficient_ad import torch_model

        describe = {
            "small": torch_model.SmallPatchDescriptionNetwork,
            "medium": torch_model.MediumPatchDescriptionNetwork,
        }[size]
        self._jitter = torch_model.EfficientAdModel.choose_random_aug_image
        self.teacher = describe(CHANNELS).requires_grad_(False)
        self.student = describe(2 * CHANNELS)
        self.autoencoder = torch_model.AutoEncoder(CHANNELS, padding=False)
        self.statistics = ChannelStatistics(CHANNELS)
        self.quantiles = BranchQuantiles()

    def load_teacher(self, found: Mapping[str, Tensor], where: str) -> None:
        """Takes a teacher's weights: anomalib's names, or another's for the same tensors in the same order (the third party's).

        Raises ValueError, which begins with `where`, for tensors that do not fit.
        """
        wanted = self.teacher.state_dict()
        if len(found) == len(wanted) and set(found) != set(wanted):
            found = dict(zip(wanted, found.values(), strict=True))
        check_fit(found, wanted, where)
        check_finite({name: found[name] for name in wanted}, where)
        self.teacher.load_state_dict({name: found[name] for name in wanted})

    def jittered(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] with another brightness, contrast or saturation, by a factor of 0.8 to 1.2."""
        return self._jitter(pixels)

    @torch.no_grad()
    def described(self, pixels: Tensor) -> Tensor:
        """The teacher's descriptors, each channel standardised."""
        return self.statistics(self.teacher(pixels))

    def losses(self, pixels: Tensor, penalty: Tensor | None) -> dict[str, Tensor]:
        """The parts of the loss, scalars by name, of pixels (B, 3, H, W) in [0, 1].

        Args:
            pixels: Training images.
            penalty: Other images, (N, 3, H, W), on which the student is to say nothing; None for none.
        """
        of_student = self.student(pixels)[:, :CHANNELS]
        found = {"hard": hardest((self.described(pixels) - of_student).square())}
        if penalty is not None:
            found["penalty"] = self.student(penalty)[:, :CHANNELS].square().mean()
        changed = self.jittered(pixels)
        of_autoencoder = self.autoencoder(changed, changed.shape[-2:])
        found["autoencoder"] = (self.described(changed) - of_autoencoder).square().mean()
        found["student_autoencoder"] = (of_autoencoder - self.student(changed)[:, CHANNELS:]).square().mean()
        return found

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Local and global map, (B, H/4 - 8, W/4 - 8) each, on no scale yet."""
        local, overall = self.student(pixels).split(CHANNELS, dim=1)
        described, of_autoencoder = self.described(pixels), self.autoencoder(pixels, pixels.shape[-2:])
        return [(described - local).square().mean(dim=1), (of_autoencoder - overall).square().mean(dim=1)]

    def scale(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), two numbers each: the quantiles 0.9 and 0.995 of normal images become 0 and 0.1."""
        scale, shift = self.quantiles.affine(BRANCHES, None, *QUANTILES)
        return scale.flatten(), shift.flatten()


def hardest(differences: Tensor) -> Tensor:
    """Mean of the largest thousandth: of all values that reach the quantile 0.999. Exact for any number of values."""
    values = differences.flatten()
    below = HARD * (len(values) - 1)
    count = len(values) - int(below) - (below > int(below))
    return values.topk(count).values.mean()


def padded(maps: Tensor) -> Tensor:
    """Maps (B, H, W) with the border that has no descriptor."""
    return F.pad(maps, (PADDING,) * 4)
