"""DRAEM: one network repairs a synthetic anomaly, another finds it by comparing the image with its repair.

Zavrtanik et al., "DRAEM: A Discriminatively Trained Reconstruction Embedding for Surface Anomaly Detection", ICCV 2021,
https://arxiv.org/abs/2108.07610. Both networks are anomalib's; initialisation, losses, map and score are the released code's.

    image -> U-Net without skips -> repaired image; (image, repaired image) -> U-Net with skips -> logits of normal and anomalous
    map = logit of anomalous - logit of normal              image score = largest 21 x 21 mean of their softmax
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.blur import GaussianBlur
from models.reconstruction import FeatureNetwork

STRIDE = 32
"""Sides of images are a multiple of this."""
POOL = 21
GAMMA, SMOOTHING = 2.0, 1e-5


class Segmented(NamedTuple):
    """repaired: (B, 3, H, W), about [0, 1]; logits: (B, 2, H, W) of normal and anomalous."""

    repaired: Tensor
    logits: Tensor


class DRAEM(FeatureNetwork):
    """Pixels in, repaired pixels and logits out: 97,422,725 parameters at the released widths.

    The second network reads (image, repaired image), as in anomalib; the released one reads them the other way round, which
    matters for a checkpoint alone.

    Args:
        reconstructive_width: Channels of the first network's first stage (128).
        discriminative_width: Of the second's (64).
    """

    preparation = "not used"

    def __init__(self, *, reconstructive_width: int = 128, discriminative_width: int = 64) -> None:
        super().__init__()
        if min(reconstructive_width, discriminative_width) < 1:
            raise ValueError(
                f"reconstructive_width and discriminative_width must be at least 1, found {reconstructive_width} and "
                f"{discriminative_width}."
            )
        from anomalib.models.image.draem.torch_model import DiscriminativeSubNetwork, ReconstructiveSubNetwork

        self.reconstructive = ReconstructiveSubNetwork(base_width=reconstructive_width)
        self.discriminative = DiscriminativeSubNetwork(in_channels=6, out_channels=2, base_width=discriminative_width)
        for module in self.modules():  # as released; anomalib leaves torch's own
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Segmented:
        """pixels: (B, 3, H, W) in [0, 1], sides a multiple of 32."""
        repaired = self.reconstructive(pixels)
        return Segmented(repaired, self.discriminative(torch.cat([pixels, repaired], dim=1)))


def anomaly(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 2, H, W) -> map float32 (B, H, W) and image scores (B,).

    The map is the difference of the logits: it ranks pixels as the released softmax does, which ties wherever float32 makes it
    exactly 0 or 1. The score is the released one: the largest 21 x 21 mean of the softmax, with zeros outside the image.
    """
    difference = (logits[:, 1] - logits[:, 0]).float()
    means = F.avg_pool2d(difference.sigmoid()[:, None], POOL, stride=1, padding=POOL // 2)
    return difference, means.flatten(1).amax(dim=1)


class StructuralSimilarity(nn.Module):
    """Mean SSIM of pixels in [0, 1]: 11 x 11 Gaussian windows of sigma 1.5, zeros outside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = GaussianBlur(1.5, 11, border="zeros")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors (B, C, H, W) -> a scalar, 1 for equal images."""
        mean_x, mean_y = self.mean(x), self.mean(y)
        variances = self.mean(x * x) - mean_x.square() + self.mean(y * y) - mean_y.square()
        covariance = self.mean(x * y) - mean_x * mean_y
        above = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
        return (above / ((mean_x.square() + mean_y.square() + 0.01**2) * (variances + 0.03**2))).mean()


def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal loss of two classes, a scalar: gamma 2, no class weight, mean over the pixels.

    anomalib's weighs normal pixels with 0, so that they have no gradient.

    Args:
        logits: (B, 2, H, W).
        mask: bool (B, 1, H, W), True where anomalous.
    """
    probability = logits.float().softmax(dim=1)
    of_class = torch.where(mask[:, 0], probability[:, 1], probability[:, 0])
    smoothed = (1 - SMOOTHING) * of_class + SMOOTHING * (1 - of_class) + SMOOTHING
    return ((1 - smoothed).abs().pow(GAMMA) * -smoothed.log()).mean()
