"""Which category an image shows: by its folder, by what the user says, or by the normal images that it resembles most.

A run keeps a few descriptors of each category's normal images: the means over all positions of the backbone's features, or, for
methods without a frozen backbone, the image at eight by eight pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from lightning_modules.base import ReconstructionModule

FILE = "category_features.csv"
"""In a record: `category`, and a descriptor's numbers in columns of their own; `EXEMPLARS` rows per category."""
EXEMPLARS = 10
"""Normal images per category that are kept."""
LONGEST = 256
"""Numbers of a descriptor; of more channels as many are picked, evenly."""
SMALL = 8
"""Side in pixels of an image that is its own descriptor."""


class Choice(NamedTuple):
    """A category and how it was found: `CATEGORY`, `folder`, `nearest`, `only one`, or "" and why there is none."""

    category: str
    by: str


def with_features(module: ReconstructionModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the features that the method computes from its images anyway, where it can be handed them."""
    if "features" in batch or not _has_features(module):
        return dict(batch)
    return {**batch, "features": module.extract(batch["image"])}


@torch.no_grad()
def describe(module: ReconstructionModule, batch: Mapping[str, Any]) -> np.ndarray:
    """Descriptors, float32 (B, D), of a batch with `image` (B, 3, H, W) or `features`; see `with_features`."""
    if _has_features(module):
        levels = with_features(module, batch)["features"]
        means = torch.cat([level.float().flatten(2).mean(2) for level in levels], dim=1)
    else:
        means = F.adaptive_avg_pool2d(batch["image"].float(), SMALL).flatten(1)
    width = means.shape[1]
    picked = torch.linspace(0, width - 1, min(width, LONGEST)).long()
    return means[:, picked.to(means.device)].cpu().numpy()


def _has_features(module: ReconstructionModule) -> bool:
    return module.has_backbone and not module.uncached


def exemplars(categories: Sequence[str], descriptors: np.ndarray) -> pd.DataFrame:
    """The content of `FILE`: of each category `EXEMPLARS` of its normal images, evenly picked, in their order."""
    names = np.asarray(categories, dtype=object)
    chosen = []
    for category in dict.fromkeys(categories):
        mine = np.flatnonzero(names == category)
        chosen += mine[np.unique(np.linspace(0, len(mine) - 1, min(EXEMPLARS, len(mine))).astype(int))].tolist()
    table = pd.DataFrame(descriptors[chosen], columns=[f"f{n}" for n in range(descriptors.shape[1])])
    table.insert(0, "category", names[chosen])
    return table


class Categories:
    """The categories of a run, and what their normal images look like.

    Args:
        names: Their keys, as in the run's record.
        kept: As `exemplars` made it; None if the record keeps none.
    """

    def __init__(self, names: Iterable[str], kept: pd.DataFrame | None = None) -> None:
        self.names = list(names)
        self._of: list[str] = []
        if kept is not None and len(kept):
            self._of = kept["category"].tolist()
            values = kept.drop(columns="category").to_numpy(np.float64)
            self._mean, sd = values.mean(axis=0), values.std(axis=0)
            self._scale = np.where(sd > 1e-6 * np.abs(self._mean) + 1e-12, sd, np.inf)  # what never varies says nothing
            self._values = (values - self._mean) / self._scale

    @classmethod
    def read(cls, record: Path, names: Iterable[str]) -> Categories:
        """Of a run's record."""
        file = record / FILE
        kept = pd.read_csv(file, dtype={"category": str}, keep_default_na=False) if file.is_file() else None
        return cls(names, kept)

    @property
    def can_compare(self) -> bool:
        """Whether `nearest` has something to compare with."""
        return bool(self._of)

    def nearest(self, descriptors: np.ndarray) -> list[str]:
        """For each of (B, D) descriptors the category of the kept normal image that is nearest.

        Distances are Euclidean, of numbers standardised over all kept images.
        """
        scaled = (np.asarray(descriptors, np.float64) - self._mean) / self._scale
        squares = np.square(scaled).sum(1)[:, None] - 2 * scaled @ self._values.T + np.square(self._values).sum(1)
        return [self._of[n] for n in squares.argmin(axis=1)]

    def named(self, word: str) -> str:
        """The category that a word stands for: its key, or the part of it after the dataset.

        Raises:
            ValueError: none or several; names those that there are.
        """
        found = [name for name in self.names if word in (name, name.rpartition("/")[2])]
        if len(found) != 1:
            what = "stands for several categories" if found else "is not a category"
            raise ValueError(f"{word!r} {what} of the run; it has {', '.join(self.names)}.")
        return found[0]

    def of_folder(self, path: str | PurePath) -> str:
        """The category that a folder of the path is called after, the innermost such folder; "" for none."""
        folders = PurePath(path).parent.parts
        for depth in range(len(folders), 0, -1):
            pair = "/".join(folders[max(0, depth - 2) : depth])
            found = [name for name in self.names if name == pair]
            found = found or [name for name in self.names if name.rpartition("/")[2] == folders[depth - 1]]
            if len(found) == 1:
                return found[0]
        return ""

    def choose(self, path: str | PurePath | None, descriptor: np.ndarray | None, given: str = "") -> Choice:
        """The category of an image: the one given, else that of its folder, else the nearest one.

        Args:
            path: The image's file; None where it has none.
            descriptor: float (D,) from `describe`; None where there is none.
            given: A key of `names`, see `named`.
        """
        if given:
            return Choice(given, "CATEGORY")
        if len(self.names) == 1:
            return Choice(self.names[0], "only one")
        if path is not None and (found := self.of_folder(path)):
            return Choice(found, "folder")
        if descriptor is not None and self.can_compare:
            return Choice(self.nearest(descriptor[None])[0], "nearest")
        return Choice("", "its category is not known: put it into a folder of that name, or give CATEGORY=")
