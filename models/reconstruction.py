"""What a reconstruction network hands to the loss and to the head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """One level's clean target and the network's reconstruction of it.

    Both are float tensors of the same shape (B, C, H, W). The target carries no jitter, no mask and no gradient
    into the frozen backbone; how the reconstruction came about is the network's own business.
    """

    target: Tensor
    reconstruction: Tensor
