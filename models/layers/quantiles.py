"""Exact quantiles of more numbers than fit in memory: two passes over the data, 65,536 counters each.

Pass one counts the upper 16 bits of every value's order-preserving key, pass two the lower 16 bits inside the few
bins that hold a wanted order statistic. Counts add, so batches, workers and processes give the same answer, which
equals `torch.quantile(..., interpolation="linear")` on all values at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BINS = 1 << 16


def _keys(values: Tensor) -> Tensor:
    """float32 values of any shape -> (N,) int64 keys in [0, 2^32) with the same order; -0 and +0 get one key."""
    bits = (values.detach().reshape(-1).float() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits + (1 << 31), -1 - bits)


def _values(keys: Tensor) -> Tensor:
    """Inverse of `_keys`: (N,) int64 -> (N,) float32."""
    bits = torch.where(keys >= (1 << 31), keys - (1 << 31), -1 - keys)
    return bits.to(torch.int32).view(torch.float32)


class StreamingQuantiles:
    """Quantiles with linear interpolation, exact for any number of float32 values.

    Feed every value once with `update`, call `next_pass`, feed every value again, call `result`:

        quantiles = StreamingQuantiles([0.9, 0.995])
        for _ in quantiles.passes():
            for batch in batches():
                quantiles.update(batch)
        q = quantiles.result()

    probabilities: in [0, 1]. Between two order statistics the interpolation is done in float64.
    With several processes, sum `counts` over them before each `next_pass` and before `result`.
    """

    def __init__(self, probabilities: Sequence[float]) -> None:
        for p in probabilities:
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"quantile {p} is not in [0, 1]")
        self.probabilities = tuple(float(p) for p in probabilities)
        self.counts = torch.zeros(1, _BINS, dtype=torch.int64)
        self.total = 0
        self._upper: Tensor | None = None
        self._ranks: Tensor | None = None

    def passes(self) -> Any:
        """Iterate twice: once for each pass over the data."""
        yield 1
        self.next_pass()
        yield 2

    def update(self, values: Tensor) -> None:
        """Count a tensor of any shape. Raises ValueError on NaN or infinity."""
        if not torch.isfinite(values).all():
            raise ValueError("a value that is not finite: its quantile means nothing")
        keys = _keys(values)
        upper = keys >> 16
        if self._upper is None:
            self.counts += torch.bincount(upper, minlength=_BINS).cpu()[None]
            return
        for row, bin_ in enumerate(self._upper.tolist()):
            inside = keys[upper == bin_] & (_BINS - 1)
            self.counts[row] += torch.bincount(inside, minlength=_BINS).cpu()

    def next_pass(self) -> None:
        """End pass one: find the bins of the wanted order statistics."""
        if self._upper is not None:
            raise RuntimeError("two passes are enough: call result()")
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise ValueError("no values: a quantile of nothing is not defined")
        ranks = {math.floor(p * (self.total - 1)) for p in self.probabilities}
        ranks |= {math.ceil(p * (self.total - 1)) for p in self.probabilities}
        self._ranks = torch.tensor(sorted(ranks))
        cumulative = self.counts[0].cumsum(0)
        bins = torch.searchsorted(cumulative, self._ranks, right=True)
        self._upper, self._row = torch.unique(bins, return_inverse=True)
        before = torch.where(bins > 0, cumulative[(bins - 1).clamp(min=0)], 0)
        self._inside = self._ranks - before
        self._expected = self.counts[0, self._upper]
        self.counts = torch.zeros(len(self._upper), _BINS, dtype=torch.int64)

    def result(self) -> list[float]:
        """End pass two: one quantile per probability, as float64 numbers."""
        if self._upper is None:
            raise RuntimeError("call next_pass() and feed the values again before result()")
        if not torch.equal(self.counts.sum(1), self._expected):
            raise RuntimeError("the second pass did not see the same values as the first")
        statistics: dict[int, float] = {}
        for rank, row, inside in zip(self._ranks.tolist(), self._row.tolist(), self._inside.tolist(), strict=True):
            lower = int(torch.searchsorted(self.counts[row].cumsum(0), inside, right=True))
            key = (int(self._upper[row]) << 16) | lower
            statistics[rank] = float(_values(torch.tensor([key])))
        out = []
        for p in self.probabilities:
            position = p * (self.total - 1)
            low, high = statistics[math.floor(position)], statistics[math.ceil(position)]
            out.append(low + (high - low) * (position - math.floor(position)))
        return out
