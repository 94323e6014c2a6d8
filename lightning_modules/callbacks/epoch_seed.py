"""Random draws of an epoch depend on nothing but the seed, the epoch and the process."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch


class EpochSeed(L.Callback):
    """Draws dropout, noise and masks of an epoch from (seed, epoch, process) alone.

    A resumed run then equals an uninterrupted one, and nothing that happens between epochs (a curve, the building of a
    cache) changes the training. What is drawn outside epochs, when a network is built from the data or something is
    estimated, depends on the seed and the moment alone.
    """

    MOMENTS = ("setup", "fit_start", "train_end", "test_start")

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._seed("setup", 0)  # every process builds the same network

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seed("fit_start", trainer.global_rank)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seed("train_end", trainer.global_rank)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seed("test_start", trainer.global_rank)

    def _seed(self, moment: str, rank: int) -> None:
        place = np.random.SeedSequence([self.seed, 2**32 - 1 - self.MOMENTS.index(moment), rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        place = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))
