"""Learning-rate schedules that papers use and PyTorch does not have in this form."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR


class Drops(MultiStepLR):
    """The learning rate is multiplied by `gamma` at the start of one or two epochs.

    Args:
        optimizer: Whose learning rates are scheduled.
        first: Epoch index, from 0.
        second: Another one, or None.
        gamma: Factor of each drop.
    """

    def __init__(self, optimizer: Optimizer, first: int, second: int | None = None, gamma: float = 0.1) -> None:
        super().__init__(optimizer, [first] if second is None else [first, second], gamma=gamma)
