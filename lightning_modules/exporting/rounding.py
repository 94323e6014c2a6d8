"""How far two correct float32 computations of one run may lie apart.

Another program adds the products of a convolution or a matrix product, or the values of a mean, in another order. The rounding
errors of a sum of K terms are about sqrt(K) times 2^-24 of its size (Higham and Mary, "A New Approach to Probabilistic Rounding
Error Analysis", SIAM J. Sci. Comput. 41, 2019). So every such result gets noise of that size, and what this changes in maps and
scores, for the run's own weights and images, is the unit of the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""
DRAWS = 3
FACTOR = 8.0
"""A difference up to so many times what the noise changes passes: both programs round, and three draws are few."""


@torch.no_grad()
def tolerances(score: Callable[[], tuple[Tensor, ...]]) -> tuple[float, ...]:
    """By how much the values of each tensor that `score` gives may differ from another correct computation's.

    It is `FACTOR` times the largest change by the noise, and at least `FACTOR` roundings of the largest value.

    Args:
        score: Gives the same tensors in every call, from float32 on the CPU.
    """
    exact = score()
    largest = [UNIT * float(values.abs().max()) for values in exact]
    for seed in range(DRAWS):
        with _Noise(seed):
            noisy = score()
        moved = (float((now - before).abs().max()) for now, before in zip(noisy, exact, strict=True))
        largest = [max(pair) for pair in zip(largest, moved, strict=True)]
    return tuple(FACTOR * change for change in largest)


class _Noise(TorchDispatchMode):
    """As long as it lasts, results of convolutions, matrix products, sums and means carry the rounding noise of their sums."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        terms = _TERMS.get(func)
        if terms is None or result.dtype != torch.float32:
            return result
        size = UNIT * terms(args, result) ** 0.5 * result.square().mean().sqrt()
        return result + size * torch.randn(result.shape, generator=self.generator)


def _reduced(args: Sequence[Any], result: Tensor) -> float:
    return args[0].numel() / result.numel()


_TERMS: dict[Any, Callable[[Sequence[Any], Tensor], float]] = {
    torch.ops.aten.convolution.default: lambda args, _: args[1].numel() / args[1].shape[1 if args[6] else 0],
    torch.ops.aten.mm.default: lambda args, _: args[0].shape[-1],
    torch.ops.aten.bmm.default: lambda args, _: args[0].shape[-1],
    torch.ops.aten.addmm.default: lambda args, _: args[1].shape[-1],
    torch.ops.aten.baddbmm.default: lambda args, _: args[1].shape[-1],
    torch.ops.aten.mean.default: _reduced,
    torch.ops.aten.mean.dim: _reduced,
    torch.ops.aten.sum.default: _reduced,
    torch.ops.aten.sum.dim_IntList: _reduced,
}
"""Operation -> how many terms each of its results is the sum of."""
