"""Base of methods that estimate something from normal images after training: the scale of their maps, or a density."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightning_modules.base import ReconstructionModule


class CalibratedModule(ReconstructionModule):
    """`fit_normal` is called when training ends, and before each point of a curve; what it finds is part of the checkpoint."""

    fitted_epochs: int = -1
    """After how many epochs the last estimate was made; -1 before the first."""

    # ---- what a method does ------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        """Estimates what scoring needs from normal images; called in eval mode, without gradient."""

    def training_images(self) -> Iterator[Mapping[str, Any]]:
        """Batches of all training images as they are, each image once over all processes, on this device."""
        for batch in self.trainer.datamodule.train_images():
            yield self.trainer.strategy.batch_to_device(batch)

    # ---- when it is called -------------------------------------------------------------------------------------------

    def before_scoring(self, last_epoch: bool) -> None:
        self._fit_normal(self.current_epoch + 1)

    def on_train_end(self) -> None:
        self._fit_normal(self.trained_epochs)

    def on_test_start(self) -> None:
        # A training that was cut off after its last epoch is resumed without any, and its end is not announced.
        # An authors' weights come without it.
        if self.fitted_epochs != self.trained_epochs:
            self._fit_normal(self.trained_epochs)

    @torch.no_grad()
    def _fit_normal(self, epochs: int) -> None:
        if self.fitted_epochs == epochs:
            return
        was_training = self.training
        self.eval()
        with torch.autocast(self.device.type, enabled=False):
            self.fit_normal()
        self.train(was_training)
        self.fitted_epochs = epochs

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["fitted_epochs"] = self.fitted_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.fitted_epochs = checkpoint["fitted_epochs"]
