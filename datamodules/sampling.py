"""Orders in which images are drawn: a function of (seed, epoch) alone, whatever the number of workers or processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from datamodules.errors import DataError
from results.common.did_you_mean import did_you_mean

SAMPLINGS = ("natural", "balanced", "balanced_datasets")


class Draw(NamedTuple):
    """One training draw: which row, and the seed of its augmentation."""

    row: int
    seed: int


def quotas(datasets: Sequence[str], categories: Sequence[str], sampling: str) -> dict[str, float]:
    """Expected draws per category key in one epoch of as many draws as there are images.

    Args:
        datasets: dataset of each image, length N.
        categories: category key of each image, length N.
        sampling: natural (as many as there are images), balanced (equal over categories) or balanced_datasets (equal
            over datasets, then equal over the categories of each).
    """
    check_sampling(sampling)
    names = list(dict.fromkeys(categories))
    if sampling == "natural":
        return {name: float(list(categories).count(name)) for name in names}
    if sampling == "balanced":
        return dict.fromkeys(names, len(categories) / len(names))
    home = dict(zip(categories, datasets, strict=True))
    members = {name: sum(other == home[name] for other in home.values()) for name in names}
    return {name: len(categories) / len(set(datasets)) / members[name] for name in names}


def check_sampling(sampling: str) -> None:
    """DataError unless the name is one of SAMPLINGS."""
    if sampling not in SAMPLINGS:
        raise DataError(f"Unknown sampling {sampling!r}. {did_you_mean(sampling, SAMPLINGS)}")


class TrainSampler(DistributedSampler):
    """Yields `Draw`s. No image is drawn a second time in an epoch before all images of its category were drawn.

    It derives from torch's DistributedSampler so that Lightning leaves it in place and calls `set_epoch`. All processes
    compute the same order and take every `num_replicas`-th draw; the end is padded from the start so that each process
    makes the same number of steps. An epoch has `repeat` times `draws` of them, as many draws as images if None.
    """

    def __init__(
        self,
        dataset: Dataset,
        datasets: Sequence[str],
        categories: Sequence[str],
        sampling: str = "natural",
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        draws: int | None = None,
        repeat: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        quota = quotas(datasets, categories, sampling)
        keys = np.asarray(categories)
        self._draws = repeat * (len(categories) if draws is None else draws)
        scale = self._draws / len(categories)
        self._groups = [(np.flatnonzero(keys == name), quota[name] * scale) for name in quota]
        self.num_samples = -(-self._draws // num_replicas)
        self.total_size = self.num_samples * num_replicas

    def order(self) -> list[Draw]:
        """All draws of the current epoch, before they are dealt to processes."""
        rng = np.random.default_rng([self.seed, self.epoch])
        rows: list[np.ndarray] = []
        counts = self._whole_counts(rng)
        for (members, _), count in zip(self._groups, counts, strict=True):
            rounds = -(-count // len(members))
            rows.append(np.concatenate([rng.permutation(members) for _ in range(rounds)] or [members[:0]])[:count])
        shuffled = rng.permutation(np.concatenate(rows))
        seeds = rng.integers(0, 2**32, size=len(shuffled))
        return [Draw(int(row), int(seed)) for row, seed in zip(shuffled, seeds, strict=True)]

    def _whole_counts(self, rng: np.random.Generator) -> list[int]:
        """Integer draws per category with the exact total; what rounding leaves over goes to categories at random."""
        counts = np.array([int(quota + 1e-9) for _, quota in self._groups])
        left = self._draws - counts.sum()
        counts[rng.permutation(len(counts))[:left]] += 1
        return counts.tolist()

    def __iter__(self) -> Iterator[Draw]:
        draws = self.order()
        wanted = self.num_samples * self.num_replicas
        draws = (draws * (-(-wanted // len(draws))))[:wanted]
        return iter(draws[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples


class EvalSampler(DistributedSampler):
    """Every row on exactly one process, in table order; nothing is padded, so processes may differ by one image.

    With `repeat`, a process that would have no row repeats one of another's: a trainer skips a loop without batches, and
    the other processes would wait for this one for ever. Whoever collects the rows drops a repeated id.
    """

    def __init__(self, dataset: Dataset, num_replicas: int = 1, rank: int = 0, repeat: bool = False) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self._rows = range(rank, len(dataset), num_replicas)
        if repeat and not self._rows:
            self._rows = range(rank % len(dataset), rank % len(dataset) + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
