"""The test metrics while a training goes on, for a curve; and the choice of an epoch by them."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.history import History
from lightning_modules.callbacks.scoring import update_metrics
from lightning_modules.metrics import AnomalyMetrics, RegionCache


class EvaluationCurve(L.Callback):
    """Image and pixel AUROC on the test set every `every` epochs while training, for a curve.

    With `select` (protocol `as_released` only) the weights of the best epoch by that metric are put back when training
    ends; of equally good epochs the `tie` (`last` or `first`) one.
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
                update_metrics(metrics, batch, module.score_batch(batch)[""], has_map=module.has_map)
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
