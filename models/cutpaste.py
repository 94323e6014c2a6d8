"""CutPaste: a network learns to tell images with a pasted part from normal ones; a Gaussian of its embeddings scores.

Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021,
https://arxiv.org/abs/2104.04015. There is no official code. Head and covariance are those of the reimplementation
Runinho/pytorch-cutpaste, since the paper describes neither.

    image -> trunk, ResNet18 -> 512 numbers -> head -> normal, patch or scar       (training)
                                            -> unit length -> Mahalanobis distance (score)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.gaussian import Moments, ledoit_wolf, merged, moments
from models.layers.nearest import MemoryBank
from models.layers.tracing import tracing
from models.reconstruction import FeatureNetwork

Density = Literal["gaussian", "kernels"]
VECTORS = 4096
"""Embeddings whose moments are taken at a time."""


class Seen(NamedTuple):
    """embedding: (B, C), what is scored. logits: (B, classes)."""

    embedding: Tensor
    logits: Tensor


class CutPasteNet(FeatureNetwork):
    """Trunk, head and density. Reads images, no features.

    Args:
        trunk: images (B, 3, H, W) -> (B, C), for example a ResNet18 without its classifier.
        channels: C.
        classes: 3 for normal, patch and scar; 2 where there is one kind of pasted part.
        head: widths of the linear layers before the last one, each with batch norm and ReLU. The paper's is unknown; [512,
            128] is the reimplementation's of its best results.
        density: `gaussian`, with the covariance of Ledoit and Wolf; or `kernels`, a Gaussian of width 1 around every
            training embedding.

    The state dict holds `mean` (C,) and `precision` (C, C), float64, NaN until `fit`; with `kernels`, `bank.vectors`.
    """

    preparation = "not used"
    mean: Tensor
    precision: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        channels: int,
        classes: int = 3,
        *,
        head: Sequence[int] = (512, 128),
        density: Density = "gaussian",
    ) -> None:
        super().__init__()
        if density not in get_args(Density):
            raise ValueError(f'density is "{density}"; choose one of {", ".join(get_args(Density))}.')
        if not head:
            raise ValueError("head names no layer; the released one is [512, 128].")
        self.trunk, self.density = trunk, density
        layers: list[nn.Module] = []
        for before, width in zip((channels, *head[:-1]), head, strict=True):
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.head = nn.Sequential(*layers)
        self.out = nn.Linear(head[-1], classes)
        self.register_buffer("mean", torch.full((channels,), torch.nan, dtype=torch.float64))
        self.register_buffer("precision", torch.full((channels, channels), torch.nan, dtype=torch.float64))
        self.bank = MemoryBank(channels) if density == "kernels" else None

    @property
    def is_fitted(self) -> bool:
        """Whether images can be scored."""
        return len(self.bank) > 0 if self.bank is not None else bool(self.mean.isfinite().all())

    def forward(self, images: Tensor) -> Seen:
        """Embedding and logits of images (B, 3, H, W)."""
        embedding = self.trunk(images)
        return Seen(embedding, self.out(self.head(embedding)))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of unit length, float64 (B, C)."""
        return unit(self.trunk(images))

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of telling views (B, 3, H, W) apart, the normal images first.

        All go through the network together, so that batch norm mixes them.
        """
        labels = torch.arange(len(views), device=views[0].device).repeat_interleave(len(views[0]))
        return F.cross_entropy(self(torch.cat(list(views))).logits.float(), labels)

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> float:
        """Makes the density of embeddings of unit length, float64 (n, C); returns the Gaussian's shrinkage (NaN without)."""
        if self.bank is not None:
            self.bank.set(embeddings)
            return math.nan
        centre = embeddings.mean(dim=0)
        parts = [moments(part, centre) for part in embeddings.split(VECTORS)]
        total = parts[0]
        for part in parts[1:]:
            total = merged(total, part)
        return self.set_gaussian(total, centre)

    @torch.no_grad()
    def set_gaussian(self, found: Moments, centre: Tensor) -> float:
        """Takes the Gaussian from moments around a centre (C,); returns its shrinkage."""
        gaussian = ledoit_wolf(found, centre)
        self.mean.copy_(gaussian.mean)
        self.precision.copy_(torch.linalg.inv(gaussian.covariance))
        return gaussian.shrinkage

    def score(self, embeddings: Tensor) -> Tensor:
        """Score of embeddings of unit length, float64 (B, C) -> (B,): Mahalanobis distance, or -log density.

        float64 throughout: the shrunk covariance's eigenvalues span more than float32 can tell apart.
        """
        if not tracing() and not self.is_fitted:
            raise RuntimeError(
                "CutPaste has no density yet: it is made of the training images when training ends. Train, or give a "
                "checkpoint."
            )
        if self.bank is not None:
            squares = torch.cdist(embeddings, self.bank.vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
            logs = torch.logsumexp(-squares.square() / 2, dim=1) - math.log(len(self.bank))
            return embeddings.shape[1] / 2 * math.log(2 * math.pi) - logs
        away = embeddings - self.mean
        return ((away @ self.precision) * away).sum(dim=1).clamp_min(0).sqrt()


def unit(embeddings: Tensor) -> Tensor:
    """(B, C) divided by its length, float64; zero vectors stay zero."""
    return F.normalize(embeddings.double(), dim=1)
