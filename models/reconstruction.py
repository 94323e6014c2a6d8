"""What a reconstruction network is, and what it hands to the loss and to the head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Pair(NamedTuple):
    """One level's clean target and the network's reconstruction of it.

    Both are float tensors of the same shape (B, C, H, W). The target carries no jitter, no mask and no gradient
    into the frozen backbone; how the reconstruction came about is the network's own business.
    """

    target: Tensor
    reconstruction: Tensor


class FeatureNetwork(nn.Module):
    """A network on a backbone's levels: `prepare` once per image, then `forward` on what it returned.

    What precedes everything trainable and random belongs into `prepare`, because its results are kept with the
    backbone's features.
    """

    preparation: str = "none"
    """What `prepare` does, in words that change whenever it does; part of the feature cache's key."""

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """Levels of the backbone (B, C_l, H_l, W_l), lowest first -> what `forward` gets. No parameters, no gradient."""
        return levels


class ReconstructionNetwork(FeatureNetwork):
    """Prepared levels in, pairs of target and reconstruction out."""

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """One pair per level that is reconstructed, lowest first."""
        raise NotImplementedError
