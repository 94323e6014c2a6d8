"""Losses that leave the well reconstructed positions alone: Dinomaly's and INP-Former's.

Both have the value of a global cosine distance, in which an image's whole map is one vector, and both change only its
gradient: at each position it is multiplied by a number that depends on how well the position is reconstructed. The
value is the same with and without, so a curve of the loss does not tell whether the scaling acts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.reconstruction import Pair


def position_distance(pair: Pair) -> Tensor:
    """1 - cosine over the channels at every position, float32 (B, H, W), without gradient."""
    with torch.no_grad():
        return 1 - F.cosine_similarity(pair.target.float(), pair.reconstruction.float(), dim=1)


def scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """The values themselves, bit for bit, with a gradient that is multiplied by `scale` (broadcast) on its way back."""
    fixed = values.detach()
    return fixed + (values - fixed) * scale


def hard_mining_scale(distance: Tensor, share: float, factor: float) -> Tensor:
    """`factor` at the `share` of all positions with the smallest distances, 1 elsewhere, (B, H, W).

    distance: (B, H, W), of the whole batch: one threshold for all its images, the k-th largest distance with
    k = int(B * H * W * (1 - share)), at least 1. share: in [0, 1]; factor: Dinomaly's is 0.1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of positions with a scaled gradient lies in [0, 1], found {share}.")
    kept = max(1, int(distance.numel() * (1 - share)))
    threshold = distance.flatten().topk(kept).values[-1]
    return torch.where(distance < threshold, factor, 1.0)


def soft_mining_scale(distance: Tensor, gamma: float) -> Tensor:
    """(distance / its mean over the batch) ** gamma, (B, H, W); INP-Former's gamma is 3, 0 = off.

    The scales do not average to 1 and are not normalised: a position at five times the mean gets 125 times its gradient.
    """
    distance = distance.clamp_min(0)  # rounding puts equal vectors below 0, and a root of that is undefined
    return (distance / distance.mean().clamp_min(torch.finfo(distance.dtype).tiny)) ** gamma


def mining_share(step: int, final: float = 0.9, steps: int = 1000) -> float:
    """Dinomaly's schedule: 0 at step 0, then linearly up to `final` at `steps`, and constant from there."""
    return final if steps < 1 else min(final * step / steps, final)


def global_cosine(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the images of 1 - cosine of the whole flattened maps; (B, C, H, W) each, a float32 scalar."""
    return (1 - F.cosine_similarity(target.float().flatten(1), reconstruction.float().flatten(1), dim=1)).mean()


def mined_cosine_loss(pairs: Sequence[Pair], scales: Sequence[Tensor | None]) -> Tensor:
    """Mean over the pairs of their global cosine distance, a float32 scalar.

    scales: per pair, what the gradient at each position of the reconstruction is multiplied by, (B, H, W); None = 1.
    """
    losses = []
    for (target, reconstruction), scale in zip(pairs, scales, strict=True):
        reconstruction = reconstruction.float()
        if scale is not None:
            reconstruction = scale_gradient(reconstruction, scale[:, None])
        losses.append(global_cosine(target, reconstruction))
    return torch.stack(losses).mean()
