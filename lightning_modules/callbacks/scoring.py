"""Scoring the test set: final metrics of every variant, and the training curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.sample_table import category_keys
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.logical import DEFINITIONS, LogicalEvaluation, has_logical
from lightning_modules.metrics import AnomalyMetrics, MetricResult, RegionCache
from lightning_modules.metrics.sync import Group
from lightning_modules.running.printing import print_metrics
from models.head import ScoredMaps
from results.common.pair import plain

MAPS_IN_MEMORY = 2**30
"""Bytes."""


def update_metrics(metrics: AnomalyMetrics, batch: Mapping[str, Any], scored: ScoredMaps, has_map: bool = True) -> None:
    """Adds one batch's maps and scores to the metrics. Masks follow maps of another size by the nearest pixel.

    Without a map, pixels are not measured: no mask counts.
    """
    masks, size = batch["mask"], scored.maps.shape[-2:]
    if masks.shape[-2:] != size:
        masks = F.interpolate(masks.to(torch.uint8), tuple(size), mode="nearest-exact").bool()
    metrics.update(
        scored.maps,
        masks[:, 0],
        scored.image_scores,
        batch["label"],
        batch["category"],
        batch["id"],
        has_mask=batch["has_mask"] & has_map,
    )


class Evaluation(L.Callback):
    """Collects maps and scores during ``trainer.test`` and computes every metric at its end.

    Maps wait in memory, or, if all variants together would take more than :data:`MAPS_IN_MEMORY`, in a temporary file of
    the run's folder.

    After the test, :attr:`result` holds one long table over all variants, :attr:`image_scores` one row per image, and
    :attr:`colour_scale` the ends of a colour scale on which normal images are dark: the median pixel, and the 90 %
    quantile over images of the highest one.
    """

    def __init__(self) -> None:
        self.result: MetricResult | None = None
        self.image_scores: pd.DataFrame | None = None
        self.colour_scale: tuple[float, float] | None = None
        self._metrics: dict[str, AnomalyMetrics] = {}
        self._rows: list[tuple[int, str, str, int, float, str]] = []
        self._ranges: list[tuple[float, float]] = []
        self._regions = RegionCache()
        self._logical: LogicalEvaluation | None = None

    def on_test_epoch_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        self._metrics, self._rows, self._ranges = {}, [], []
        table = trainer.datamodule.table
        self._logical = LogicalEvaluation(table, category_keys(table)) if has_logical(table) else None

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: ReconstructionModule,
        outputs: dict[str, ScoredMaps],
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        directory = self._directory(trainer, outputs)
        for variant, scored in outputs.items():
            if variant not in self._metrics:
                self._metrics[variant] = AnomalyMetrics(
                    trainer.datamodule.dataset_of(), regions=self._regions, variant=variant, maps_directory=directory
                )
            update_metrics(self._metrics[variant], batch, scored, module.has_map)
            if self._logical is not None:
                self._logical.update(variant, batch, scored.maps, scored.image_scores)
        pixels = outputs[""].maps.flatten(1)
        self._ranges += zip(pixels.median(1).values.tolist(), pixels.amax(1).tolist(), strict=True)
        scores: Tensor = outputs[""].image_scores
        columns = batch["id"].tolist(), batch["category"], batch["anomaly_type"], batch["label"].tolist()
        self._rows += zip(*columns, scores.tolist(), batch["path"], strict=True)

    @staticmethod
    def _directory(trainer: L.Trainer, outputs: dict[str, ScoredMaps]) -> Path | None:
        """Where maps wait for the metrics; None for memory."""
        images = int((trainer.datamodule.table["split"] == "test").sum())
        if images * sum(scored.maps[0].nbytes for scored in outputs.values()) <= MAPS_IN_MEMORY:
            return None
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def on_test_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        results = {variant: metrics.compute() for variant, metrics in self._metrics.items()}
        self.result = results[""]
        tables = [result.table for result in results.values()]
        if self._logical is not None:
            tables.append(self._logical.rows())
            self.result.definitions = self.result.definitions | DEFINITIONS
        table = pd.concat(tables, ignore_index=True)
        # With several datasets a category's key is dataset/category; the table has a column for each.
        table["category"] = list(map(plain, table.dataset, table.category))
        self.result.table = table
        group = Group()
        # A process without images of its own repeats one: each id counts once.
        gathered = group.gather_objects(list(zip(self._rows, self._ranges, strict=True)))
        once = {row[0]: (row, ends) for part in gathered for row, ends in part}
        rows = [row for row, _ in once.values()]
        middles, peaks = np.array([ends for _, ends in once.values()]).T
        self.colour_scale = float(np.median(middles)), float(np.quantile(peaks, 0.9))
        columns = ["id", "category", "anomaly_type", "label", "image_score", "path"]
        self.image_scores = pd.DataFrame(rows, columns=columns).sort_values("id", ignore_index=True)
        if trainer.is_global_zero:
            print_metrics(self.result.table)
