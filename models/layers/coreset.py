"""Coresets: few vectors that lie within a small distance of all others (greedy k-centre, Sener and Savarese, ICLR 2018).

The choice is that of plain greedy selection, index for index, but most distances are never computed. If a point x lies
at distance e from a centre c chosen before, a new centre p at |p - c| >= e + d(x) cannot come nearer to x than d(x), by
the triangle inequality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Projection = Literal["linear", "sparse", "none"]
Start = Literal["approximate", "exact", "random"]
Share = Literal["joint", "per_category"]
Track = Callable[[Iterable[int]], Iterable[int]]

ROWS = 2**17
"""Points whose differences from a centre are held at a time."""
SLACK = 1.0001
"""Float32 distances of up to a thousand dimensions are good to 1e-5: a bound that holds by less than that is not used."""


@dataclass(frozen=True)
class CoresetConfig:
    """Which vectors of all make up the memory bank.

    Args:
        ratio: share of the vectors that are kept, int(N * ratio) of N and at least one; 1 keeps all of them in order.
        projection: in which space they are chosen. `linear`: a bias-free linear layer at its random initialisation (released
            PatchCore); `sparse`: a sparse random projection (anomalib); `none`: as they are.
        projection_dim: its dimension; None: 128 for `linear`, and for `sparse` the Johnson-Lindenstrauss bound with epsilon
            0.9, as in anomalib. A projection that would not make vectors shorter is left out.
        start: `approximate`: the first pick has the largest mean distance to ten random vectors, and that mean caps every
            vector's distance from then on (what all released commands use). `exact`: likewise with the norm of all its
            distances, N x N of them: for small N. `random`: a random vector comes first (anomalib).
        share: `joint`: one choice among all vectors. `per_category`: each category's vectors by themselves, so that every
            category has its share of the bank; this uses the category labels of the training images.
    """

    ratio: float = 0.01
    projection: Projection = "linear"
    projection_dim: int | None = None
    start: Start = "approximate"
    share: Share = "joint"

    def __post_init__(self) -> None:
        for field, allowed in (("projection", Projection), ("start", Start), ("share", Share)):
            value = getattr(self, field)
            if value not in get_args(allowed):
                raise ValueError(f'coreset.{field} is "{value}"; choose one of {", ".join(get_args(allowed))}.')
        if not 0 < self.ratio <= 1:
            raise ValueError(f"coreset.ratio is a share of the training vectors in (0, 1], found {self.ratio}.")
        if self.projection_dim is not None and (self.projection == "none" or self.projection_dim < 1):
            raise ValueError(
                f"coreset.projection_dim is {self.projection_dim} with projection {self.projection}: it is the positive "
                "dimension of a linear or sparse projection."
            )

    def count(self, vectors: int) -> int:
        """How many of so many vectors are kept."""
        return max(1, int(vectors * self.ratio))

    def matrix(self, channels: int, vectors: int, generator: torch.Generator) -> Tensor | None:
        """The random projection as a float32 matrix (P, channels), y = x W^T, or None for none.

        vectors: number of all vectors, which the sparse projection's dimension follows.
        """
        if self.projection == "none" or self.ratio == 1:
            return None
        if self.projection == "linear":
            dimension = self.projection_dim or 128
            bound = 1 / math.sqrt(channels)
            drawn = torch.empty(dimension, channels).uniform_(-bound, bound, generator=generator)
        else:
            dimension = self.projection_dim or johnson_lindenstrauss(vectors)
            density = 1 / math.sqrt(channels)
            kept = torch.rand(dimension, channels, generator=generator) < density
            signs = torch.randint(0, 2, (dimension, channels), generator=generator) * 2 - 1
            drawn = kept * signs / math.sqrt(density * dimension)
        return drawn.float() if dimension < channels else None


def johnson_lindenstrauss(vectors: int, epsilon: float = 0.9) -> int:
    """Dimension that keeps the distances of so many vectors within a factor of 1 +- epsilon: 291 for 135,600 at 0.9."""
    return max(1, int(4 * math.log(vectors) / (epsilon**2 / 2 - epsilon**3 / 3)))


@torch.no_grad()
def choose(
    points: Tensor,
    config: CoresetConfig,
    generator: torch.Generator,
    groups: Sequence[Tensor] = (),
    track: Track = iter,
) -> Tensor:
    """Indices of the chosen points, int64 (M,), in the order of the choice.

    points: (N, P) float32, projected already. groups: with share `per_category`, the indices of each category's points;
    their choices follow each other. track: wraps the loop over the picks, for a progress bar.
    """
    if config.ratio == 1:
        return torch.arange(len(points))
    chosen = []
    for members in groups if config.share == "per_category" else [None]:
        part = points if members is None else points[members.to(points.device)]
        count = config.count(len(part))
        if config.start == "random":
            first = int(torch.randint(len(part), (), generator=generator))
            picks = greedy_coreset(part, count, first=first, track=track)
        else:
            among = None if config.start == "exact" else torch.randperm(len(part), generator=generator)[:10]
            picks = greedy_coreset(part, count, limit=start_criterion(part, among), track=track)
        chosen.append(picks if members is None else members[picks])
    return torch.cat(chosen)


@torch.no_grad()
def start_criterion(points: Tensor, among: Tensor | None) -> Tensor:
    """Released PatchCore's first distances, float32 (N,): mean distance to the points `among`, or, for None, the norm of
    the distances to all points."""
    total = torch.zeros(len(points), device=points.device)
    for index in range(len(points)) if among is None else among.tolist():
        distance = _distances(points, points[index])
        total += distance.square() if among is None else distance
    return total.sqrt() if among is None else total / len(among)


@torch.no_grad()
def greedy_coreset(
    points: Tensor, count: int, *, first: int | None = None, limit: Tensor | None = None, track: Track = iter
) -> Tensor:
    """Greedy k-centre: picks, again and again, the point that is farthest from all picks. Returns int64 (count,).

    points: (N, P) float32. Give either `first`, the first pick, or `limit`, float32 (N,): the first pick is then its
    largest value, and no point's distance ever counts for more than its limit. Of equally far points the first is taken.
    """
    if not 0 < count <= len(points):
        raise ValueError(f"A coreset of {count} points cannot be chosen among {len(points)}.")
    if (first is None) == (limit is None):
        raise ValueError("Give either the first pick, or the limit from which it follows.")
    points = points.float()
    picks = torch.empty(count, dtype=torch.int64, device=points.device)
    centres = points.new_empty(count, points.shape[1])
    pick = torch.tensor(first, device=points.device) if limit is None else limit.argmax()
    for number in track(range(count)):
        picks[number], centre = pick, points[pick]
        centres[number] = centre
        if number == 0:
            known = _distances(points, centre)  # to the centre `own`, the nearest as far as it was computed
            own = torch.zeros_like(known, dtype=torch.int64)
            far = known.clone() if limit is None else torch.minimum(known, limit)
            bound = (known + far) * SLACK
        else:
            between = torch.linalg.vector_norm(centres[:number] - centre, dim=1)
            near = (between[own] <= bound).nonzero()[:, 0]
            distance = _distances(points, centre, near)
            closer = distance < known[near]
            near, distance = near[closer], distance[closer]
            known[near], own[near] = distance, number
            far[near] = torch.minimum(far[near], distance)
            bound[near] = (distance + far[near]) * SLACK
        pick = far.argmax()
    return picks.cpu()


def _distances(points: Tensor, centre: Tensor, rows: Tensor | None = None) -> Tensor:
    """Euclidean distances from a centre (P,), of all points or of some rows, computed from differences."""
    parts = points.split(ROWS) if rows is None else (points[part] for part in rows.split(ROWS))
    found = [torch.linalg.vector_norm(part - centre, dim=1) for part in parts]
    return torch.cat(found) if found else points.new_empty(0)
