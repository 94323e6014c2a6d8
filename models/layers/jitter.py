"""Feature jitter: Gaussian noise in proportion to the length of the feature vector, in training only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureJitter(nn.Module):
    """f + scale * ||f||_2 / C * n with n ~ N(0, I_C) for every feature vector f of C channels.

    probability: of jittering at all, one draw of torch's generator per call, that is per batch (UniAD 1, always and
        without a draw; UniAS 0.5).
    scale: >= 0; 0 switches it off. The expected noise is scale / sqrt(C) times as long as f: with UniAD's scale 20 and
    272 channels 1.21 times. The norm is divided by C, not sqrt(C), so the same scale is milder for wider features.
    dim: the channel axis (-1 for tokens (B, L, C), 1 for maps (B, C, H, W)).
    Source: UniAD, section "Feature jittering", and its released code. Returns the input itself in eval mode.
    """

    def __init__(self, scale: float = 20.0, probability: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        if scale < 0:
            raise ValueError(f"The jitter's scale must not be negative, found {scale} (0 = no jitter).")
        if not 0 <= probability <= 1:
            raise ValueError(f"The jitter's probability must lie in [0, 1], found {probability}.")
        self.scale = scale
        self.probability = probability
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or not self.scale or (self.probability < 1 and not _happens(self.probability)):
            return features
        deviation = (
            self.scale / features.shape[self.dim] * torch.linalg.vector_norm(features, dim=self.dim, keepdim=True)
        )
        return features + deviation * torch.randn_like(features)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, probability={self.probability:g}"


@torch.compiler.disable  # a compiled network could not go on without knowing the answer
def _happens(probability: float) -> bool:
    return torch.rand(()).item() < probability
