"""What is touched inside libraries because they offer no other way; each place has a test that fails when it moves."""

from __future__ import annotations

import torch


def allow_clipping(optimizer: torch.optim.Optimizer) -> None:
    """Lets Lightning clip the gradients of a fused optimiser in mixed precision.

    A fused optimiser says that it can unscale gradients itself. Lightning then refuses to clip them, since it would
    clip scaled ones; without the word, Lightning unscales them first.
    """
    vars(optimizer).pop("_step_supports_amp_scaling", None)
