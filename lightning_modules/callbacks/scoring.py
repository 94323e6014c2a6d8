"""Scoring the test set: final metrics of every variant, and the training curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.anomaly_ratio import Marked, look, ratios
from datamodules.problems import number_of
from datamodules.sample_table import category_keys
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.logical import DEFINITIONS, LogicalEvaluation, has_logical
from lightning_modules.callbacks.normal_scores import NormalScores
from lightning_modules.metrics import AnomalyMetrics, MetricResult, RegionCache
from lightning_modules.metrics.sync import Group
from lightning_modules.metrics.thresholds import threshold
from lightning_modules.running import refusals
from lightning_modules.running.printing import print_metrics
from models.head import ScoredMaps
from results.common.pair import plain

MAPS_IN_MEMORY = 2**30
"""Bytes."""


def _masks_like(masks: Tensor, maps: Tensor) -> Tensor:
    """Masks bool (B, 1, H, W) at the size of maps (B, h, w), by the nearest pixel."""
    if masks.shape[-2:] == maps.shape[-2:]:
        return masks
    return F.interpolate(masks.to(torch.uint8), tuple(maps.shape[-2:]), mode="nearest-exact").bool()


def update_metrics(
    metrics: AnomalyMetrics,
    batch: Mapping[str, Any],
    scored: ScoredMaps,
    chosen: Sequence[int] | None = None,
    has_map: bool = True,
) -> None:
    """Adds one batch's maps and scores to the metrics. Masks follow maps of another size by the nearest pixel.

    chosen: positions in the batch of the images to add; None adds all.
    has_map: whether the maps mean something; else pixels are not measured, as if no image had a mask.
    """
    masks = _masks_like(batch["mask"], scored.maps)
    of_batch = (scored.maps, masks[:, 0], scored.image_scores, batch["label"], batch["id"], batch["has_mask"])
    categories = batch["category"]
    if chosen is not None:
        of_batch = tuple(values[list(chosen)] for values in of_batch)
        categories = [categories[n] for n in chosen]
    maps, masks, scores, labels, ids, has_mask = of_batch
    metrics.update(maps, masks, scores, labels, categories, ids, has_mask=has_mask & has_map)


class Evaluation(L.Callback):
    """Collects maps and scores during `trainer.test` and computes every metric at its end.

    Maps wait in memory, or, if all variants together would take more than `MAPS_IN_MEMORY`, in a temporary file of
    the run's folder.

    Where the data knows under what its test images were taken (MVTec AD 2: its light), the method's own metrics are also
    computed over the images of each condition alone, as a variant called `light=regular` or `light=shifted`.

    `notes` says how many masks mark nothing at the maps' size, where that is not the images'.

    After the test, `result` holds one long table over all variants, `image_scores` one row per image, and
    `anomaly_ratios` how much of the images is marked at their size, by definition.

    Args:
        fpr_limits: False-positive rates up to which AU-PRO is integrated; None takes the data's own.
        normal: A callback before this one, whose normal images give the thresholds of SegF1, for data measured by it.
    """

    def __init__(self, fpr_limits: Sequence[float] | None = None, normal: NormalScores | None = None) -> None:
        self.normal = normal
        self.fpr_limits = None if fpr_limits is None else tuple(sorted(set(fpr_limits)))
        self._conditions: dict[int, str] = {}
        self._map_size: tuple[int, int] | None = None
        self._marked: set[int] = set()
        self._vanished: set[int] = set()
        self._marks: dict[int, Marked] = {}
        self.result: MetricResult | None = None
        self.image_scores: pd.DataFrame | None = None
        self.anomaly_ratios: pd.DataFrame | None = None
        self._metrics: dict[str, AnomalyMetrics] = {}
        self._rows: list[tuple[int, str, str, int, float, float, str]] = []
        self._regions = RegionCache()
        self._logical: LogicalEvaluation | None = None

    def on_fit_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        """Refuses a disk that is too small for the maps of the test that follows the training."""
        needed = 4 * trainer.datamodule.scored_pixels()
        if needed > MAPS_IN_MEMORY:
            directory = Path(trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            refusals.room(directory, needed, "anomaly maps")

    def on_test_epoch_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        self._metrics, self._rows = {}, []
        self._map_size, self._marked, self._vanished = None, set(), set()
        self._marks = {}
        data = trainer.datamodule
        self._limits = data.fpr_limits() if self.fpr_limits is None else self.fpr_limits
        conditions = data.conditions()
        self._conditions = conditions if len(set(conditions.values())) > 1 else {}
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
            update_metrics(self._of(variant, trainer, directory), batch, scored, has_map=module.has_map)
            if self._logical is not None:
                self._logical.update(variant, batch, scored.maps, scored.image_scores)
        ids = batch["id"].tolist()
        self._look_at_masks(batch["mask"], outputs[""].maps, ids)
        for condition in dict.fromkeys(self._conditions[i] for i in ids if i in self._conditions):
            chosen = [n for n, i in enumerate(ids) if self._conditions.get(i) == condition]
            metrics = self._of(condition, trainer, directory, pooled=False)
            update_metrics(metrics, batch, outputs[""], chosen, module.has_map)
        marked = [look(mask) for mask in batch["mask"][:, 0].cpu().numpy()]
        has_mask = batch["has_mask"].tolist()
        self._marks |= {i: seen for i, seen, has in zip(ids, marked, has_mask, strict=True) if has}
        pixels = outputs[""].maps.flatten(1)
        scores: Tensor = outputs[""].image_scores
        columns = batch["id"].tolist(), batch["category"], batch["anomaly_type"], batch["label"].tolist()
        highest = pixels.amax(1).tolist() if module.has_map else [np.nan] * len(pixels)
        self._rows += zip(*columns, scores.tolist(), highest, batch["path"], strict=True)

    def _look_at_masks(self, masks: Tensor, maps: Tensor, ids: Sequence[int]) -> None:
        if masks.shape[-2:] == maps.shape[-2:]:
            return
        self._map_size = tuple(maps.shape[-2:])
        before, after = (m.flatten(1).any(1).tolist() for m in (masks, _masks_like(masks, maps)))
        self._marked |= {i for i, marked in zip(ids, before, strict=True) if marked}
        self._vanished |= {i for i, was, left in zip(ids, before, after, strict=True) if was and not left}

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, as sentences."""
        if self._map_size is None:
            return []
        size = f"{self._map_size[1]} x {self._map_size[0]}"
        lost = f"; {len(self._vanished)} of {number_of(len(self._marked), 'mask')} mark nothing there" * bool(
            self._vanished
        )
        return [f"pixel metrics are measured at {size} pixels{lost}"]

    def _ratios(self) -> pd.DataFrame:
        """`category,definition,percent,images` of the categories with masks; see `datamodules.anomaly_ratio`."""
        found = []
        for category, mine in self.image_scores.groupby("category", sort=False):
            images = [self._marks[i] for i in mine.id if i in self._marks]
            if any(image.marked for image in images):
                found += [(category, name, value, len(images)) for name, value in ratios(images).items()]
        return pd.DataFrame(found, columns=["category", "definition", "percent", "images"])

    def _of(self, variant: str, trainer: L.Trainer, directory: Path | None, pooled: bool = True) -> AnomalyMetrics:
        """The metrics of a variant, made when they are first needed."""
        if variant not in self._metrics:
            self._metrics[variant] = AnomalyMetrics(
                trainer.datamodule.dataset_of(),
                pooled=pooled,
                fpr_limits=self._limits,
                regions=self._regions,
                variant=variant,
                maps_directory=directory,
            )
        return self._metrics[variant]

    def _directory(self, trainer: L.Trainer, outputs: dict[str, ScoredMaps]) -> Path | None:
        """Where maps wait for the metrics; None for memory."""
        images = int((trainer.datamodule.table["split"] == "test").sum())
        bytes_of_one = sum(scored.maps[0].nbytes for scored in outputs.values())
        bytes_of_one += outputs[""].maps[0].nbytes if self._conditions else 0
        if images * bytes_of_one <= MAPS_IN_MEMORY:
            return None
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def on_test_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        results = {variant: metrics.compute() for variant, metrics in self._metrics.items()}
        self.result = results[""]
        tables = [result.table for result in results.values()]
        if self.normal is not None and self.normal.pixels and trainer.datamodule.segmentation:
            limits = {
                name: threshold([0.0], "mean_3sd", pixels=found).value for name, found in self.normal.pixels.items()
            }
            for variant in ("", *dict.fromkeys(self._conditions.values())):
                if variant in self._metrics:
                    found = self._metrics[variant].segmentation(limits)
                    tables.append(found.table)
                    self.result.definitions = self.result.definitions | found.definitions
        if self._logical is not None:
            tables.append(self._logical.rows())
            self.result.definitions = self.result.definitions | DEFINITIONS
        table = pd.concat(tables, ignore_index=True)
        # With several datasets a category's key is dataset/category; the table has a column for each.
        table["category"] = list(map(plain, table.dataset, table.category))
        self.result.table = table
        group = Group()
        # A process without images of its own repeats one: each id counts once.
        rows = list({row[0]: row for part in group.gather_objects(self._rows) for row in part}.values())
        for part in group.gather_objects((self._map_size, self._marked, self._vanished, self._marks)):
            self._map_size = self._map_size or part[0]
            self._marked |= part[1]
            self._vanished |= part[2]
            self._marks |= part[3]
        columns = ["id", "category", "anomaly_type", "label", "image_score", "map_max", "path"]
        self.image_scores = pd.DataFrame(rows, columns=columns).sort_values("id", ignore_index=True)
        self.anomaly_ratios = self._ratios()
        if trainer.is_global_zero:
            print_metrics(self.result.table)
