"""Random draws of an epoch depend on nothing but the seed, the epoch and the process."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch


class EpochSeed(L.Callback):
    """Draws dropout, noise and masks of an epoch from (seed, epoch, process) alone.

    A resumed run then equals an uninterrupted one, and nothing that happens between epochs (a curve, the building of a
    cache) changes the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        place = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))
