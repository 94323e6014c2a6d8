"""PatchCore: nearest neighbours in a memory bank of normal patches.

Roth, Pemula, Zepeda, Schölkopf, Brox and Gehler, "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022,
https://arxiv.org/abs/2106.08265. `rule` chooses between the authors' released code and anomalib's, which differ in
what a patch is, in the distance, in the map and in the image score.

    levels -> 3x3 neighbourhood of every position -> lowest level's grid -> one vector per position
           -> coreset of the training vectors = memory bank -> distance to the nearest entries = patch map

Size and time by arithmetic, for MVTec AD in the unified setting (3,629 images; released rule at 224 pixels, grid 28x28,
1024 channels): 2.85 M vectors, 11.7 GB before the choice and 1.46 GB projected to 128 dimensions; the bank has 0.12 GB
with a share of 1 %, 1.17 GB with 10 %. With anomalib's 1536 channels the 2.85 M vectors take 17.5 GB (at 256 pixels there
are 3.7 M of them: 22.8 GB), the bank of 1 % 0.18 GB. Greedy choice reads the projected vectors once per pick when nothing
is pruned: 28,500 picks x 1.46 GB = 42 TB for 1 %. With pruning, one CPU thread took 0.31 s to choose 1 % of 15,680 vectors
of the embedded benchmark (128 dimensions) and 1.22 s of 31,360: the time grows with the square of their number. By that
slope, over a factor of 90, MVTec AD's 2.85 M vectors would take 10,000 s, about three hours. An image is scored by
784 x 28,500 x 1024 multiplications, 23 GFLOP x 2, ten times that for 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers.nearest import MemoryBank, nearest
from models.layers.neck import resize
from models.reconstruction import FeatureNetwork

Rule = Literal["released", "anomalib"]
Score = Literal["patch_max", "reweighted", "map"]


class PatchScores(NamedTuple):
    """maps: distance of every patch, float32 (B, H, W); image_scores: float32 (B,), or None if the map gives them."""

    maps: Tensor
    image_scores: Tensor | None


class PatchCoreNetwork(FeatureNetwork):
    """Nothing is trained: `prepare` makes patch vectors, `bank` holds the chosen ones, `forward` measures distances.

    Args:
        channels: channels and (height, width) of each level, as the feature extractor gives them.
        sizes: See `channels`.
        rule: `released`: all numbers of the neighbourhood, averaged to `pretrain_dim` per level and to `target_dim` over
            the levels; squared distances. `anomalib`: the neighbourhood's mean, levels concatenated; distances not squared,
            and a patch map that is enlarged without interpolation.
        score: of an image. `patch_max`: the farthest patch's distance, before enlarging and smoothing (released).
            `reweighted`: that distance x (1 - softmax over the distances to the `score_neighbors` bank entries around its
            nearest one), the paper's Eq. 7 as anomalib has it. `map`: what the head makes of the smoothed map. None = the
            rule's own.
        neighbors: a patch's distance is the mean of that many smallest ones (released: 1; 3 to 5 for its pixel metrics).
        score_neighbors: b of the reweighted score; a smaller bank gives all it has.
        patch: side of the neighbourhood, odd.
        pretrain_dim: see rule; `anomalib` has no use for them.
        target_dim: See `pretrain_dim`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        rule: Rule = "released",
        score: Score | None = None,
        neighbors: int = 1,
        score_neighbors: int = 9,
        patch: int = 3,
        pretrain_dim: int = 1024,
        target_dim: int = 1024,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule):
            raise ValueError(f'rule is "{rule}"; choose one of {", ".join(get_args(Rule))}.')
        score = score or ("patch_max" if rule == "released" else "reweighted")
        if score not in get_args(Score):
            raise ValueError(f'score is "{score}"; choose one of {", ".join(get_args(Score))}.')
        if patch < 1 or patch % 2 == 0:
            raise ValueError(f"patch is the odd side of a neighbourhood, such as 3; found {patch}.")
        for name, value in (
            ("neighbors", neighbors),
            ("score_neighbors", score_neighbors),
            ("pretrain_dim", pretrain_dim),
            ("target_dim", target_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        self.rule, self.score, self.patch = rule, score, patch
        self.neighbors, self.score_neighbors = neighbors, score_neighbors
        self.pretrain_dim, self.target_dim = pretrain_dim, target_dim
        self.channels = tuple(channels)
        self.grid = (*sizes[0],)
        self.width = target_dim if rule == "released" else sum(channels)
        self.bank = MemoryBank(self.width)

    @property
    def preparation(self) -> str:
        """What `prepare` does, in words that change whenever it does."""
        if self.rule == "anomalib":
            return f"{self.patch}x{self.patch} means, levels at the finest grid without aligned corners, concatenated"
        return (
            f"{self.patch}x{self.patch} neighbourhoods averaged to {self.pretrain_dim} channels per level, at the finest "
            f"grid without aligned corners, averaged to {self.target_dim}"
        )

    def prepare(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C_l, H_l, W_l) -> [patch vectors (B, C, H, W)] on the lowest level's grid, float32."""
        with torch.autocast(levels[0].device.type, enabled=False):
            levels = [level.float() for level in levels]
            if self.rule == "anomalib":
                means = [F.avg_pool2d(level, self.patch, stride=1, padding=self.patch // 2) for level in levels]
                return [torch.cat([resize(mean, self.grid, align_corners=False) for mean in means], dim=1)]
            if self._halves():
                return [self._embed_halves(levels)]
            return [self._embed(levels)]

    def _embed(self, levels: Sequence[Tensor]) -> Tensor:
        """Released: unfold, average each level's C x 9 numbers in order, resize, average the levels' row of vectors."""
        parts = []
        for level in levels:
            H, W = level.shape[-2:]
            unfolded = F.unfold(level, self.patch, padding=self.patch // 2)  # (B, C * 9, H * W), channel-major
            pooled = F.adaptive_avg_pool1d(unfolded.transpose(1, 2), self.pretrain_dim)
            # Averages are linear, as is the resize, so that their order does not matter.
            parts.append(resize(pooled.transpose(1, 2).unflatten(2, (H, W)), self.grid, align_corners=False))
        row = torch.cat(parts, dim=1).flatten(2).transpose(1, 2)
        joined = F.adaptive_avg_pool1d(row, self.target_dim).transpose(1, 2)
        return joined.unflatten(2, self.grid).contiguous()

    def _halves(self) -> bool:
        """Whether the averages have the closed form of WideResNet50-2's levels 3 and 4, with 512 and 1024 channels."""
        width = self.pretrain_dim
        return (
            self.patch == 3 and self.target_dim == width and tuple(2 * c for c in self.channels) == (width, 2 * width)
        )

    @staticmethod
    def _embed_halves(levels: Sequence[Tensor]) -> Tensor:
        """The numbers of `_embed` without a copy of every neighbourhood: 4.5 numbers per average overlap in the centre."""
        low, high = levels
        mean, high_mean = (F.avg_pool2d(level, 3, stride=1, padding=1) for level in (low, high))
        pairs = high_mean.unflatten(1, (-1, 2)).mean(dim=2)
        return torch.cat([(9 * mean + low) / 10, resize(pairs, low.shape[-2:], align_corners=False)], dim=1)

    def forward(self, features: list[Tensor]) -> PatchScores:
        """[Patch vectors (B, C, H, W)] -> distances to the memory bank, and image scores unless `score` is `map`."""
        (embedding,) = features
        B, _, H, W = embedding.shape
        queries = embedding.float().flatten(2).transpose(1, 2).flatten(0, 1)
        squared, indices = self.bank(queries, min(self.neighbors, len(self.bank) or 1))
        distances = squared if self.rule == "released" else squared.sqrt()
        maps = distances.mean(dim=1).view(B, H, W)
        if self.score == "map":
            return PatchScores(maps, None)
        farthest = maps.flatten(1).max(dim=1)
        if self.score == "patch_max":
            return PatchScores(maps, farthest.values)
        rows = torch.arange(B, device=maps.device) * H * W + farthest.indices
        weights = self._weights(queries[rows], indices[rows, 0])
        return PatchScores(maps, (farthest.values * weights).float())

    def enlarge(self, maps: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The patch map (B, H, W) as the head is to resize it: anomalib's is at image size already, without interpolation."""
        if self.rule == "released":
            return maps
        return F.interpolate(maps[:, None], size=tuple(image_size), mode="nearest")[:, 0]

    def _weights(self, patches: Tensor, entries: Tensor) -> Tensor:
        """1 - softmax of the distances from patches (B, C) to the bank entries around their nearest `entries` (B,).

        In float64: of large distances the softmax is 1 in float32, and the weight 0.
        """
        bank = self.bank.vectors
        _, around = nearest(bank[entries], bank, min(self.score_neighbors, len(bank)))
        # The entry itself comes first, even where another one equals it.
        others = torch.where(around == entries[:, None], around[:, :1], around)[:, 1:]
        around = torch.cat([entries[:, None], others], dim=1)
        distances = torch.linalg.vector_norm(patches.double()[:, None] - bank[around].double(), dim=2)
        return 1 - distances.softmax(dim=1)[:, 0]
