"""PaDiM: a Gaussian of normal patch features at every position.

Defard, Setkov, Loesch and Audigier, "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization", ICPR 2020 workshops, https://arxiv.org/abs/2011.08785. The authors released no code; where the paper is
silent this follows the third-party code in common use.

    levels -> nearest neighbour to the lowest level's grid -> some channels, drawn at random -> mean and covariance per
    position over the training images -> Mahalanobis distance per position

Images must be aligned for this to make sense, and categories that share a model share each position's one Gaussian.

Size by arithmetic: positions x k (k + 1) / 2 float64 numbers, half a symmetric matrix each, before and after the fit and in
the checkpoint. WideResNet50-2 with 550 channels: 3.8 GB at 224 pixels (grid 56x56), 5.0 GB at 256 pixels; ResNet18 with 100
channels: 0.13 and 0.17 GB. Factoring takes k^3 / 3 operations per position, 0.2 TFLOP for 550 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers.tracing import tracing
from models.reconstruction import FeatureNetwork

POSITIONS = 64
"""Positions whose full matrices are held at a time: 64 matrices of 550 channels take 155 MB."""
KNOWN_CHANNELS = {1792: 550, 448: 100}
"""Channels kept of all: WideResNet50-2's (and ResNet50's) and ResNet18's levels 2 to 4, as in the paper."""


class PaDiMNetwork(FeatureNetwork):
    """Mean and factored covariance of every position; nothing is trained by gradients.

    Nothing is prepared: which channels are kept differs from run to run, and picking them is cheap.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them. Every level's map must be
            a whole fraction of the lowest one's.
        sizes: See `channels`.
        kept: how many channels of the concatenated levels are used; None: the paper's 550 of 1792 or 100 of 448.
        epsilon: added to the diagonal of every covariance (0.01; anomalib adds 1e-5 more).
        generator: of the draw of channels; None: torch's global one.

    The state dict holds `chosen`, int64 (kept,), the channels in the order of use; `mean`, float64 (H * W, kept); and
    `factor`, float64 (H * W, kept (kept + 1) / 2): the lower Cholesky factors, row by row. Before `finish`, `factor` holds
    the sums of squared deviations in the same form.
    """

    chosen: Tensor
    mean: Tensor
    factor: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        kept: int | None = None,
        epsilon: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        total = sum(channels)
        if kept is None and total not in KNOWN_CHANNELS:
            raise ValueError(
                f"PaDiM's paper names the number of kept channels for {', '.join(map(str, KNOWN_CHANNELS))} channels; these "
                f"levels have {total}. Set model.init_args.kept, for example to {max(1, total // 4)}."
            )
        kept = KNOWN_CHANNELS[total] if kept is None else kept
        if not 0 < kept <= total:
            raise ValueError(f"kept must be 1 to {total}, the channels of all levels; found {kept}.")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, or a covariance may have no inverse; found {epsilon}.")
        self.grid = tuple(sizes[0])
        for size in sizes:
            if any(fine % coarse for fine, coarse in zip(self.grid, size, strict=True)):
                raise ValueError(
                    f"PaDiM repeats every level on the lowest one's grid, {self.grid[0]}x{self.grid[1]}, but a level has "
                    f"{size[0]}x{size[1]}. Choose an image size that is divisible by the highest level's stride."
                )
        self.channels, self.kept, self.epsilon = tuple(channels), kept, epsilon
        self.count = 0
        self.register_buffer("chosen", torch.randperm(total, generator=generator)[:kept])
        self.register_buffer("mean", torch.zeros(0, kept, dtype=torch.float64))
        self.register_buffer("factor", torch.zeros(0, kept * (kept + 1) // 2, dtype=torch.float64))
        self.register_buffer("inverse", None, persistent=False)

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments and of what comes out of them."""
        return 8 * self.grid[0] * self.grid[1] * (self.mean.shape[1] + self.factor.shape[1])

    @property
    def is_fitted(self) -> bool:
        """Whether distances can be measured."""
        return len(self.factor) > 0 and self.count == 0

    def embed(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, C_l, H_l, W_l) -> the chosen channels (B, kept, H, W), lowest level's channels numbered first."""
        joined = [F.interpolate(level.float(), size=self.grid, mode="nearest") for level in levels]
        return torch.cat(joined, dim=1)[:, self.chosen]

    # ---- fit ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, levels: Sequence[Tensor]) -> None:
        """Add images (any number) to the moments, float64 by Chan's rule: exact whatever the batches are."""
        if not self.count:
            self.reset()
        x = self.embed(levels).flatten(2).permute(2, 0, 1).double()  # (H * W, B, kept)
        n = x.shape[1]
        if n == 0:
            return
        mean = x.mean(dim=1)
        delta = mean - self.mean
        total = self.count + n
        # The batch's own deviations and, as one more row, the shift of the mean.
        rows = torch.cat([x - mean[:, None], delta[:, None] * (self.count * n / total) ** 0.5], dim=1)
        self._add_products(rows)
        self.mean += delta * (n / total)
        self.count = total

    def reset(self) -> None:
        """Forget everything, and make room for the moments."""
        positions = self.grid[0] * self.grid[1]
        self.mean = self.mean.new_zeros(positions, self.kept)
        self.factor = self.factor.new_zeros(positions, self.factor.shape[1])
        self.count = 0

    def moments(self) -> tuple[int, Tensor]:
        """(Images seen, their mean (H * W, kept) float64), for the processes' exchange; see `merge`."""
        return self.count, self.mean

    @torch.no_grad()
    def merge(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """Join the moments of all processes, whose `factor` buffers have been summed in place already.

        parts: every process's `moments()` from before, in the same order everywhere.
        """
        parts = [(count, mean.to(self.factor)) for count, mean in parts if count]
        total = sum(count for count, _ in parts)
        mean = torch.stack([mean * (count / total) for count, mean in parts]).sum(dim=0)
        shifts = torch.stack([(own - mean) * count**0.5 for count, own in parts], dim=1)
        self._add_products(shifts)
        self.mean, self.count = mean, total

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the sums into covariances (divisor n - 1) plus epsilon, and these into Cholesky factors, in place."""
        if self.count < 2:
            raise ValueError(
                f"PaDiM estimates a covariance at every position, which needs at least two training images; found "
                f"{self.count}."
            )
        for part in self._parts():
            covariance = self._full(self.factor[part])
            covariance /= self.count - 1
            covariance.diagonal(dim1=1, dim2=2).add_(self.epsilon)
            self.factor[part] = self._packed(torch.linalg.cholesky(covariance))
        self.count = 0

    def _add_products(self, rows: Tensor) -> None:
        """Add the products of rows (H * W, n, kept) with themselves to the packed sums."""
        for part in self._parts():
            self.factor[part] += self._packed(rows[part].transpose(1, 2) @ rows[part])

    def _parts(self) -> list[slice]:
        return [slice(first, first + POSITIONS) for first in range(0, len(self.factor), POSITIONS)]

    def _packed(self, matrices: Tensor) -> Tensor:
        """(n, kept, kept) -> (n, kept (kept + 1) / 2), the lower triangles."""
        rows, columns = torch.tril_indices(self.kept, self.kept, device=matrices.device)
        return matrices[:, rows, columns]

    def _full(self, packed: Tensor) -> Tensor:
        """The inverse of `_packed`; above the diagonal there are zeros."""
        rows, columns = torch.tril_indices(self.kept, self.kept, device=packed.device)
        matrices = packed.new_zeros(len(packed), self.kept, self.kept)
        matrices[:, rows, columns] = packed
        return matrices

    # ---- distances ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels -> Mahalanobis distance (rooted) of every position, float32 (B, H, W), through triangular solves."""
        if not self.is_fitted:
            raise RuntimeError(
                "PaDiM has no Gaussians yet: they are estimated at the end of fit and stored in the checkpoint. Train the "
                "run, or give a checkpoint."
            )
        with torch.autocast(levels[0].device.type, enabled=False):
            x = self.embed(levels).flatten(2).permute(2, 1, 0).double() - self.mean[:, :, None]  # (H * W, kept, B)
            distances = [torch.linalg.vector_norm(self._whitened(part, x[part]), dim=1) for part in self._parts()]
        return torch.cat(distances).T.reshape(-1, *self.grid).float()

    def _whitened(self, part: slice, x: Tensor) -> Tensor:
        """(n, kept, B) divided by the Cholesky factors of the positions in `part`."""
        if tracing() and self.inverse is not None:
            return self._full(self.inverse[part]) @ x
        return torch.linalg.solve_triangular(self._full(self.factor[part]), x, upper=False)

    @torch.no_grad()
    def invert(self) -> None:
        """Makes graphs that are traced from now on multiply by the inverse factors, which they hold instead of the factors."""
        one = torch.eye(self.kept, dtype=self.factor.dtype, device=self.factor.device)
        whole = (self._full(self.factor[part]) for part in self._parts())
        parts = [self._packed(torch.linalg.solve_triangular(full, one.expand_as(full), upper=False)) for full in whole]
        self.inverse = torch.cat(parts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("chosen", "mean", "factor"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == own.shape[1:] and name != "chosen":
                setattr(self, name, own.new_zeros(stored.shape))
        self.count = 0
        super()._load_from_state_dict(state_dict, prefix, *args)
