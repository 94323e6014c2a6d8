"""What is estimated from normal images besides weights: channel statistics, quantiles of maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


class ChannelStatistics(nn.Module):
    """Mean and standard deviation of every feature channel, one set per named group (a dataset), and x -> (x - m) / s.

    Moments are streamed exactly: `update` merges each batch's float64 mean and centred sum of squares (Chan's
    formula), so neither the number of images nor a large mean costs precision. They are stored with the checkpoint
    by group name; `std` is the population value, without epsilon. With one group its statistics serve every image;
    with several, `forward` needs each image's group name.

    A channel that never varies (a dead ReLU) has s = 0; the released code would divide by zero, here it is only
    centred, and a warning counts such channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self._moments: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.register_buffer("mean", torch.zeros(0, channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(0, channels, 1, 1), persistent=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that have statistics, sorted."""
        return tuple(sorted(self._moments))

    def count(self, group: str) -> int:
        """Number of vectors (images x positions) behind a group's statistics."""
        return self._moments[group][0]

    def reset(self) -> None:
        """Forget everything."""
        self._moments.clear()
        self._rebuild(warn=False)

    @torch.no_grad()
    def update(self, features: Tensor, groups: Sequence[str]) -> None:
        """Add raw features (B, C, H, W) of images whose group names are `groups` (B,). Call `finish` at the end."""
        if len(groups) != len(features):
            raise ValueError(f"{len(features)} images but {len(groups)} group names")
        for group in dict.fromkeys(groups):
            members = [i for i, name in enumerate(groups) if name == group]
            x = features[members].detach().double().transpose(0, 1).flatten(1)
            mean = x.mean(dim=1)
            squares = (x - mean[:, None]).square().sum(dim=1)
            self.merge({group: (x.shape[1], mean.cpu(), squares.cpu())})

    def moments(self) -> dict[str, tuple[int, Tensor, Tensor]]:
        """{group: (count, mean (C,) float64, centred sum of squares (C,) float64)}, to send to other processes."""
        return dict(self._moments)

    def merge(self, moments: dict[str, tuple[int, Tensor, Tensor]]) -> None:
        """Add the moments of other data (another batch, another process); exact whatever the order."""
        for group, (n, mean, squares) in moments.items():
            if n == 0:
                continue
            old_n, old_mean, old_squares = self._moments.get(group, (0, torch.zeros_like(mean), torch.zeros_like(mean)))
            total, delta = old_n + n, mean - old_mean
            self._moments[group] = (
                total,
                old_mean + delta * (n / total),
                old_squares + squares + delta.square() * (old_n * n / total),
            )

    def finish(self) -> None:
        """Make the collected moments the ones that `forward` uses."""
        if not self._moments:
            raise ValueError("no features were seen: the training data gave no batch, so there are no statistics")
        self._rebuild(warn=True)

    def set(self, group: str, mean: Tensor, std: Tensor) -> None:
        """Replace everything by one group with known mean and std (C values each), e.g. a released model's."""
        mean, std = mean.detach().double().flatten().cpu(), std.detach().double().flatten().cpu()
        if mean.numel() != self.channels or std.numel() != self.channels:
            raise ValueError(f"expected {self.channels} channels, got mean {mean.numel()} and std {std.numel()}")
        self._moments = {group: (1, mean, std.square())}
        self._rebuild(warn=True)

    def _rebuild(self, warn: bool) -> None:
        device = self.mean.device
        if not self._moments:
            self.mean = torch.zeros(0, self.channels, 1, 1, device=device)
            self.std = torch.ones(0, self.channels, 1, 1, device=device)
            return
        rows = [self._moments[group] for group in self.groups]
        mean = torch.stack([m for _, m, _ in rows]).float()
        std = torch.stack([(s / n).sqrt() for n, _, s in rows]).float()
        constant = std == 0
        if warn and constant.any():
            names = ", ".join(f"{g}: {int(c.sum())}" for g, c in zip(self.groups, constant, strict=True) if c.any())
            warnings.warn(
                f"feature channels that never vary in the training data ({names} of {self.channels}) cannot be "
                "standardised; they are only centred",
                stacklevel=3,
            )
        self.mean = mean[:, :, None, None].to(device)
        self.std = std.masked_fill(constant, 1.0)[:, :, None, None].to(device)

    def index(self, groups: Sequence[str] | None) -> list[int] | None:
        """Rows of `groups` in `mean` and `std`; None when one group serves all."""
        known = self.groups
        if not known:
            raise RuntimeError(
                "no channel statistics yet: they are computed from the training data at the start of fit "
                "and stored in the checkpoint"
            )
        if len(known) == 1:
            return None
        if groups is None:
            raise ValueError(f"this model has statistics for {', '.join(known)}: say which dataset each image is from")
        position = {name: i for i, name in enumerate(known)}
        unknown = sorted(set(groups) - set(known))
        if unknown:
            raise ValueError(f"no channel statistics for {', '.join(unknown)}: trained on {', '.join(known)}")
        return [position[name] for name in groups]

    def forward(self, features: Tensor, groups: Sequence[str] | None = None) -> Tensor:
        """Raw features (B, C, H, W), group name of each image (may be None with one group) -> standardised features."""
        rows = self.index(groups)
        if rows is None:
            return (features - self.mean) / self.std
        return (features - self.mean[rows]) / self.std[rows]

    def get_extra_state(self) -> dict:
        return {g: {"count": n, "mean": m, "squares": s} for g, (n, m, s) in self._moments.items()}

    def set_extra_state(self, state: dict) -> None:
        self._moments = {
            g: (int(v["count"]), v["mean"].double().cpu(), v["squares"].double().cpu()) for g, v in state.items()
        }
        self._rebuild(warn=False)


class Standardisation(nn.Module):
    """Levels -> the same levels, each channel with mean 0 and standard deviation 1 over the training images.

    Before a reconstruction network this weighs channels alike, whatever their scale; ULSAD (Algorithm 1) and Uninformed
    Students standardise their targets so. Empty until moments are merged; they travel with the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._levels: list[ChannelStatistics] = []

    @property
    def is_fitted(self) -> bool:
        """Whether there are statistics."""
        return bool(self._levels)

    @staticmethod
    def measured(batches: Iterable[Sequence[Tensor]]) -> list[dict]:
        """Moments of each level over batches of levels (B, C_l, H_l, W_l), to send to other processes."""
        found: list[ChannelStatistics] = []
        for levels in batches:
            found = found or [ChannelStatistics(level.shape[1]) for level in levels]
            for statistics, level in zip(found, levels, strict=True):
                statistics.update(level, ["all"] * len(level))
        return [statistics.moments() for statistics in found]

    def merge(self, parts: Iterable[list[dict]]) -> None:
        """Set the statistics from the moments of every process; a process without images has none."""
        parts = [part for part in parts if part]
        self._levels = [ChannelStatistics(len(level["all"][1])) for level in parts[0]]
        for part in parts:
            for statistics, moments in zip(self._levels, part, strict=True):
                statistics.merge(moments)
        for statistics in self._levels:
            statistics.finish()

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """(B, C_l, H_l, W_l) per level, in and out."""
        if not self._levels:
            raise RuntimeError(
                "no channel statistics yet: they are computed at the start of fit and come with a checkpoint"
            )
        return [statistics.to(level.device)(level) for statistics, level in zip(self._levels, levels, strict=True)]

    def get_extra_state(self) -> list[dict]:
        return [statistics.get_extra_state() for statistics in self._levels]

    def set_extra_state(self, state: list[dict]) -> None:
        self._levels = []
        for level in state:
            statistics = ChannelStatistics(len(level["all"]["mean"]))
            statistics.set_extra_state(level)
            self._levels.append(statistics)


class BranchQuantiles(nn.Module):
    """Quantiles of the branches' maps on normal images, per named group (a dataset); stored with the checkpoint.

    They put the branches on one scale (Eq. 9, corrected): map -> 0.1 (map - q_alpha) / (q_beta - q_alpha), so that the
    alpha quantile becomes 0 and the beta quantile 0.1. Without quantiles the maps stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, dict[str, dict[float, float]]] = {}

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that have quantiles, sorted; empty = not set."""
        return tuple(sorted(self._values))

    def set(self, values: Mapping[str, Mapping[str, Mapping[float, float]]]) -> None:
        """Replace everything by {group: {branch: {probability: quantile}}}."""
        self._values = {g: {b: dict(q) for b, q in branches.items()} for g, branches in values.items()}

    def get(self) -> dict[str, dict[str, dict[float, float]]]:
        """{group: {branch: {probability: quantile}}}."""
        return {g: {b: dict(q) for b, q in branches.items()} for g, branches in self._values.items()}

    def affine(
        self, branches: Sequence[str], groups: Sequence[str] | None, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        """(scale, shift) of Eq. 9, each (branches, B, 1, 1), or (branches, 1, 1, 1) when one group serves all images.

        Raises ValueError for a group without quantiles, a probability that was not estimated, or quantiles that
        coincide (constant maps).
        """
        known = self.groups
        if not known:
            raise RuntimeError("no quantiles are set: they are estimated on normal images when training ends")
        if len(known) == 1:
            groups = known
        elif groups is None:
            raise ValueError(f"this model has quantiles for {', '.join(known)}: say which dataset each image is from")
        scale, shift = torch.empty(len(branches), len(groups)), torch.empty(len(branches), len(groups))
        for column, group in enumerate(groups):
            if group not in self._values:
                raise ValueError(f"no quantiles for {group}: they were estimated for {', '.join(known)}")
            for row, branch in enumerate(branches):
                values = self._values[group][branch]
                missing = [p for p in (alpha, beta) if p not in values]
                if missing:
                    raise ValueError(
                        f"the {missing[0]} quantile of the {branch} map was not estimated; known are "
                        f"{', '.join(map(str, sorted(values)))}"
                    )
                low, high = values[alpha], values[beta]
                if not high > low:
                    raise ValueError(
                        f"the {branch} map of {group} has the same {alpha} and {beta} quantile ({low}): it is constant "
                        "over the normal images and cannot be brought to a common scale"
                    )
                scale[row, column] = 0.1 / (high - low)
                shift[row, column] = -0.1 * low / (high - low)
        return scale[:, :, None, None], shift[:, :, None, None]

    def get_extra_state(self) -> dict:
        return self.get()

    def set_extra_state(self, state: dict) -> None:
        self.set(state)
