"""How far two correct float32 computations of one run may lie apart.

Another program adds the products of a layer in another order. The rounding errors of a sum of K terms are about sqrt(K)
times 2^-24 of its size (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput.
41, 2019). So every layer's output gets noise of that size, and what this changes in maps and scores, for the run's own
weights and images, is the unit of the tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""
DRAWS = 3
FACTOR = 8.0
"""A difference up to so many times what the noise changes passes: both programs round, and three draws are few."""
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@torch.no_grad()
def tolerances(module: nn.Module, score: Callable[[], tuple[Tensor, ...]]) -> tuple[float, ...]:
    """By how much the values of each tensor that `score` gives may differ from another correct computation's.

    It is `FACTOR` times the largest change by the noise, and at least `FACTOR` roundings of the largest value.

    Args:
        module: Holds the layers that `score` runs, in float32 on the CPU.
        score: Gives the same tensors in every call.
    """
    exact = score()
    largest = [UNIT * float(values.abs().max()) for values in exact]
    for seed in range(DRAWS):
        with _noise(module, seed):
            moved = [float((noisy - values).abs().max()) for noisy, values in zip(score(), exact, strict=True)]
        largest = [max(pair) for pair in zip(largest, moved, strict=True)]
    return tuple(FACTOR * change for change in largest)


@contextlib.contextmanager
def _noise(module: nn.Module, seed: int) -> Iterator[None]:
    """As long as it lasts, the outputs of convolutions and linear layers carry the rounding noise of their sums."""
    hook = partial(_noisy, torch.Generator().manual_seed(seed))
    handles = [layer.register_forward_hook(hook) for layer in module.modules() if isinstance(layer, LAYERS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noisy(generator: torch.Generator, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    terms = layer.weight.numel() / outputs
    size = UNIT * terms**0.5 * output.square().mean().sqrt()
    return output + size * torch.randn(output.shape, generator=generator)
