"""How high normal images score, by which the score of a new image can be judged without any label.

A run keeps the scores of normal images: of those that it held out (`data.holdout`, or a data set's own validation
images), else of some training images, which score lower than unseen normal images do. It also keeps how high the pixels of
their maps are, and what their categories look like; `lightning_modules.decisions` makes decisions of all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import pandas as pd

from datamodules.sample_table import FEWEST_HELD_OUT
from lightning_modules.base import ReconstructionModule
from lightning_modules.decisions import categories
from lightning_modules.decisions.normal import FILE, read
from lightning_modules.metrics.sync import Group
from lightning_modules.metrics.thresholds import PixelCollector, PixelStatistics, p_values

__all__ = ["FILE", "NormalScores", "p_values", "read"]
COLUMNS = ["id", "category", "image_score", "map_max", "path"]


class NormalScores(L.Callback):
    """Scores normal images after the test set. Then all of this is there, in every process.

    Attributes:
        table: One row per normal image, the content of `normal_scores.csv`.
        pixels: Category -> statistics of its normal maps' pixels; "" for all together, where there are several. Empty for a
            method without a map.
        features: What the categories look like, the content of `category_features.csv`; None for a single category.
        recognised: Per category how many of its test images resemble its own normal images most: columns `category`,
            `images`, `recognised`.
    """

    def __init__(self) -> None:
        self.table: pd.DataFrame | None = None
        self.pixels: dict[str, PixelStatistics] = {}
        self.features: pd.DataFrame | None = None
        self.recognised = pd.DataFrame(columns=["category", "images", "recognised"])
        self._tested: dict[int, tuple[str, np.ndarray]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        self._tested = {}
        self._several = len(trainer.datamodule.categories) > 1

    def on_test_batch_start(
        self, trainer: L.Trainer, module: ReconstructionModule, batch: dict[str, Any], *_: Any
    ) -> None:
        if self._several:  # the test step then does not compute them again
            batch.update(categories.with_features(module, batch))

    def on_test_batch_end(
        self, trainer: L.Trainer, module: ReconstructionModule, outputs: Any, batch: Mapping[str, Any], *_: Any
    ) -> None:
        if self._several:
            seen = zip(batch["category"], categories.describe(module, batch), strict=True)
            self._tested |= zip(batch["id"].tolist(), seen, strict=True)

    def on_test_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        data = trainer.datamodule
        splits = data.table["split"]
        rows: list[Any] = []
        seen: list[Any] = []
        collected: dict[tuple[str, str], PixelCollector] = {}
        with trainer.precision_plugin.val_step_context():
            for batch in data.normal_images():
                batch = trainer.strategy.batch_to_device(batch)
                if self._several:
                    batch = categories.with_features(module, batch)
                    seen += zip(batch["id"].tolist(), categories.describe(module, batch), strict=True)
                scored = module.score_batch(batch)[""]
                maps = scored.maps.float().cpu().numpy()
                highest = maps.reshape(len(maps), -1).max(1) if module.has_map else np.full(len(maps), np.nan)
                columns = batch["id"].tolist(), batch["category"], scored.image_scores.tolist(), highest.tolist()
                rows += zip(*columns, batch["path"], strict=True)
                for number, category, one in zip(batch["id"].tolist(), batch["category"], maps, strict=True):
                    if module.has_map:
                        collected.setdefault((category, splits[number]), PixelCollector()).add(one)
        group = Group()
        rows = [row for part in group.gather_objects(rows) for row in part]
        table = pd.DataFrame(rows, columns=COLUMNS).sort_values("id", ignore_index=True)
        table.insert(2, "split", splits[table["id"]].to_numpy())
        self.table = table
        self.pixels = self._statistics(group.gather_objects(collected))
        if self._several:
            found = dict(pair for part in group.gather_objects(seen) for pair in part)
            self._compare(found, {i: pair for part in group.gather_objects(self._tested) for i, pair in part.items()})

    def _statistics(self, parts: list[dict[tuple[str, str], PixelCollector]]) -> dict[str, PixelStatistics]:
        """Of the held-out maps of each category, or of all where those are too few to be called held out."""
        merged: dict[str, PixelCollector] = {}
        counts = self.table[self.table["split"] == "val"]["category"].value_counts()
        for part in parts:
            for (category, split), collector in part.items():
                if split == "val" or counts.get(category, 0) < FEWEST_HELD_OUT:
                    for name in (category, "") if self._several else (category,):
                        merged.setdefault(name, PixelCollector()).merge(collector)
        return {name: merged[name].statistics() for name in ("", *sorted(merged.keys() - {""})) if name in merged}

    def _compare(self, seen: Mapping[int, np.ndarray], tested: Mapping[int, tuple[str, np.ndarray]]) -> None:
        """Keeps what the categories look like, and how many test images are taken for their own."""
        descriptors = np.stack([seen[i] for i in self.table["id"]])
        self.features = categories.exemplars(self.table["category"].tolist(), descriptors)
        kept = categories.Categories(dict.fromkeys(self.table["category"]), self.features)
        names = [name for name, _ in tested.values()]
        nearest = kept.nearest(np.stack([one for _, one in tested.values()]))
        right = pd.DataFrame({"category": names, "recognised": np.equal(nearest, names)})
        counted = right.groupby("category", sort=False)["recognised"].agg(images="size", recognised="sum")
        self.recognised = counted.reset_index()
