"""How many images a second a method scores, its backbone included, whatever was cached during the test."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from lightning_modules.base import ReconstructionModule


class Throughput(L.Callback):
    """Scores the first test batch again after the test, twice, from images; the second time counts.

    Features of the test images may come from the cache, so that the time of the test itself says little. The pixels are
    noise: no method's time depends on them; a photograph in tiles is scored as it is. `images_per_second` is None before a test.
    """

    def __init__(self) -> None:
        self.images_per_second: float | None = None
        self._batch: Mapping[str, Any] | None = None

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: ReconstructionModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._batch = {name: value for name, value in batch.items() if name not in ("features", "image")}

    def on_test_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        if self._batch is None:
            return
        count, device = len(self._batch["label"]), module.device
        noise = torch.randn(count, 3, *module.image_size, generator=torch.Generator().manual_seed(0)).to(device)
        batch, self._batch = {**self._batch, "image": noise}, None
        with trainer.precision_plugin.test_step_context():
            module.score_batch(batch)
            _wait(device)
            started = time.perf_counter()
            module.score_batch(batch)
            _wait(device)
        self.images_per_second = count / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
