"""A frozen backbone whose statistics move: what HVQ-Trans' released code does to its EfficientNet while it trains.

Its parameters are frozen, but the switch to training mode reaches it: batch norms use the batch's statistics and follow
them slowly, and stochastic depth drops residual branches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MOMENTUM = 0.01
"""Of the running statistics (the EfficientNet port that HVQ-Trans uses)."""
DROP_RATE = 0.2
"""Of stochastic depth at the last block; it grows linearly with the block's number."""


class DropBranch(nn.Module):
    """Stochastic depth: in training mode each image's branch (B, ...) is dropped with `rate`, the others scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


def set_moving(net: nn.Module, name: str) -> None:
    """Prepares a timm extractor for training mode: momentum 0.01, and, if it is an EfficientNet, stochastic depth.

    name: of the timm model, which tells how many blocks the whole network has (the extractor may have lost its last).
    Blocks count from 0; only those with a shortcut have a branch to drop.
    """
    import timm  # late: it takes seconds, see models.backbones

    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = MOMENTUM
    stages = getattr(net, "blocks", None)
    if not isinstance(stages, nn.Sequential):
        return
    with torch.device("meta"):
        total = sum(len(stage) for stage in timm.create_model(name.partition(".")[0]).blocks)
    for number, block in enumerate(block for stage in stages for block in stage):
        if getattr(block, "has_skip", False):
            block.drop_path = DropBranch(DROP_RATE * number / total)


def moving_statistics(net: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all batch norms, by name."""
    return {name: buffer.detach().clone() for name, buffer in net.named_buffers() if "running_" in name}
