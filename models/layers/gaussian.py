"""One Gaussian of vectors with the covariance of Ledoit and Wolf, in float64.

Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis
88 (2004), in the form of scikit-learn's `LedoitWolf`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shrunk(NamedTuple):
    """mean (C,), covariance (C, C), both float64; shrinkage: a float from 0 to 1, the weight of the round covariance."""

    mean: Tensor
    covariance: Tensor
    shrinkage: float


class Moments(NamedTuple):
    """Sums over vectors y = x - centre: count; first, sum of y (C,); second, of y y^T (C, C); and of |y|^2, |y|^4 (scalars)
    and |y|^2 y (C,), from which the fourth moment around any other centre follows. All float64."""

    count: Tensor
    first: Tensor
    second: Tensor
    square: Tensor
    fourth: Tensor
    third: Tensor


def moments(vectors: Tensor, centre: Tensor) -> Moments:
    """Of vectors (n, C); centre: (C,), near their mean, so that nothing cancels."""
    y = vectors.double() - centre
    squares = y.square().sum(dim=1)
    count = torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)
    return Moments(count, y.sum(0), y.T @ y, squares.sum(), squares.square().sum(), squares @ y)


def merged(one: Moments, other: Moments) -> Moments:
    """Of the vectors of both, which have one centre."""
    return Moments(*(a + b for a, b in zip(one, other, strict=True)))


def ledoit_wolf(found: Moments, centre: Tensor) -> Shrunk:
    """The shrunk covariance of all vectors (divisor n).

    With S their covariance, p = C and mu = tr S / p, the round covariance mu I has the weight b^2 / d^2, where d^2 is the
    mean square of S - mu I and b^2, at most d^2, the mean square of the error of S.
    """
    n, p = found.count, len(found.first)
    step = found.first / n  # from the centre to the mean
    covariance = found.second / n - torch.outer(step, step)
    mu = covariance.trace() / p
    # sum |y - step|^4, from sums of y.
    length = step @ step
    fourth = (
        found.fourth
        + 4 * step @ found.second @ step
        + n * length.square()
        - 4 * step @ found.third
        + 2 * length * found.square
        - 4 * length * (step @ found.first)
    )
    d2 = (covariance - mu * torch.eye(p, dtype=covariance.dtype, device=covariance.device)).square().sum() / p
    b2 = torch.minimum((fourth / n - covariance.square().sum()) / (n * p), d2)
    shrinkage = float(b2 / d2) if b2 > 0 else 0.0
    round_part = shrinkage * mu * torch.eye(p, dtype=covariance.dtype, device=covariance.device)
    return Shrunk(centre + step, (1 - shrinkage) * covariance + round_part, shrinkage)
