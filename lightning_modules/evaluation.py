"""Scoring the test set: final metrics of every variant, and the training curve."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.table import category_keys
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks import History
from lightning_modules.logical import DEFINITIONS, LogicalEvaluation, has_logical
from lightning_modules.metrics import AnomalyMetrics, MetricResult, RegionCache
from lightning_modules.metrics import table as metrics_table
from lightning_modules.metrics.sync import Group
from models.head import ScoredMaps

HEADINGS = {
    **metrics_table.HEADINGS,
    "image_auroc_structural": "struc\nAUROC",
    "image_auroc_logical": "logic\nAUROC",
    "pixel_auspro_mean": "AU-\nsPRO",
}
SHOWN = (
    "image_auroc",
    "image_auroc_structural",
    "image_auroc_logical",
    "image_ap",
    "pixel_auroc",
    "pixel_ap",
    "pixel_aupro",
    "pixel_auspro_mean",
    "dsc",
)
"""Columns of the table printed after an evaluation; the record holds all metrics."""
OF_SOME_DATA = ("image_auroc_structural", "image_auroc_logical", "pixel_auspro_mean")
"""Columns left out where a category has nothing of their kind."""


MAPS_IN_MEMORY = 2**30
"""Bytes."""


def update_metrics(metrics: AnomalyMetrics, batch: Mapping[str, Any], scored: ScoredMaps) -> None:
    """Adds one batch's maps and scores to the metrics."""
    metrics.update(
        scored.maps,
        batch["mask"][:, 0],
        scored.image_scores,
        batch["label"],
        batch["category"],
        batch["id"],
        has_mask=batch["has_mask"],
    )


class Evaluation(L.Callback):
    """Collects maps and scores during ``trainer.test`` and computes every metric at its end.

    Maps wait on the accelerator that they were made on; those of a CPU in memory, or, if all variants together would take
    more than :data:`MAPS_IN_MEMORY`, in a temporary file of the run's folder.

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
            update_metrics(self._metrics[variant], batch, scored)
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
        keys = zip(table.dataset, table.category, strict=True)
        table["category"] = [category.removeprefix(f"{dataset}/") for dataset, category in keys]
        self.result.table = table
        group = Group()
        rows = [row for part in group.gather_objects(self._rows) for row in part]
        middles, peaks = np.array([pair for part in group.gather_objects(self._ranges) for pair in part]).T
        self.colour_scale = float(np.median(middles)), float(np.quantile(peaks, 0.9))
        columns = ["id", "category", "anomaly_type", "label", "image_score", "path"]
        self.image_scores = pd.DataFrame(rows, columns=columns).sort_values("id", ignore_index=True)
        if trainer.is_global_zero:
            print_metrics(self.result.table)


class EvaluationCurve(L.Callback):
    """Image and pixel AUROC on the test set every ``every`` epochs while training, for a curve.

    With ``select`` (protocol ``as_released`` only) the weights of the best epoch by that metric are put back when training
    ends; of equally good epochs the ``tie`` (``last`` or ``first``) one.
    """

    def __init__(self, history: History, every: int, select: str | None = None, tie: str = "last") -> None:
        self.history = history
        self.every = every
        self.select = select
        self.tie = tie
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self._regions = RegionCache()
        self._is_put_back = False

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        epoch = trainer.current_epoch
        if (epoch + 1) % self.every and epoch + 1 != trainer.max_epochs:
            return
        names = ["image_auroc", "pixel_auroc"]
        names += [self.select] if self.select not in (None, *names) else []
        data = trainer.datamodule
        metrics = AnomalyMetrics(
            data.dataset_of(), names, pooled=False, regions=self._regions, expected=data.test_images()
        )
        module.eval()
        with trainer.precision_plugin.val_step_context():
            module.before_scoring(last_epoch=epoch + 1 == trainer.max_epochs)
            for batch in data.test_dataloader():
                batch = trainer.strategy.batch_to_device(batch)
                update_metrics(metrics, batch, module.evaluate(batch)[""])
        module.train()
        table = metrics.compute().table
        means = table[(table.scope == "mean") & (table.dataset == "")].set_index("metric").value
        for name, value in means.items():
            self.history.add(trainer, f"curve/{name}", float(value))
        for logger in trainer.loggers:
            logger.log_metrics({f"curve/{name}": float(value) for name, value in means.items()}, trainer.global_step)
        if self.select is not None and self._is_best(float(means[self.select])):
            self.best = (float(means[self.select]), epoch, copy.deepcopy(module.network.state_dict()))

    def _is_best(self, value: float) -> bool:
        if self.best is None:
            return True
        return value > self.best[0] or (value == self.best[0] and self.tie == "last")

    def on_train_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        self._put_back(module)

    def on_fit_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        # A training that was cut off after its last epoch is resumed without any, and its end is not announced.
        if not self._is_put_back:
            self._put_back(module)

    def _put_back(self, module: ReconstructionModule) -> None:
        if self.best is not None:
            module.network.load_state_dict(self.best[2])
        self._is_put_back = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def print_metrics(table: pd.DataFrame) -> None:
    """Prints the per-category metrics in percent, the means below, and why a number is missing."""
    console = Console()
    reasons: dict[str, None] = {}
    for variant, rows in table.groupby("variant", sort=False):
        pooled = "; pooled = one ranking over all" if (rows.scope == "pooled").any() else ""
        shown = Table(title=variant or None, caption=f"percent; mean = unweighted over categories{pooled}")
        shown.add_column("category", no_wrap=True)
        of_categories = rows[rows.scope == "category"]
        defined = of_categories.groupby("metric").value.count()
        everywhere = set(defined.index[defined == of_categories.category.nunique()])
        columns = [c for c in SHOWN if c in (everywhere if c in OF_SOME_DATA else set(rows.metric))]
        for name in columns:
            shown.add_column(HEADINGS[name], justify="right")
        for (scope, dataset, category), group in rows.groupby(["scope", "dataset", "category"], sort=False):
            if dataset and not category and rows.dataset[rows.scope == "category"].nunique() == 1:
                continue  # the same as over all datasets
            values = group.set_index("metric").value
            label = category or f"{scope}{f' of {dataset}' if dataset else ''}"
            shown.add_row(label, *("-" if pd.isna(values.get(c)) else f"{100 * values[c]:.2f}" for c in columns))
            reasons |= dict.fromkeys(f"{label}: {r}" for r in group[group.metric.isin(columns)].reason.dropna().unique() if r)
        console.print(shown)
    for reason in reasons:
        console.print(f"- {reason}", highlight=False)
