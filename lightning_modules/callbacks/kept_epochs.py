"""Weights of chosen epochs, for pictures of a training's way; nothing else reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from lightning_modules.base import ReconstructionModule


class KeptEpochs(L.Callback):
    """Keeps the weights at the end of some epochs as `epoch-N.ckpt`.

    Args:
        folder: Where they go, beside the run's own checkpoint.
        epochs: Counted from 1; one that the training does not reach leaves no file.
    """

    def __init__(self, folder: Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = folder, frozenset(epochs)

    def on_train_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        if trainer.current_epoch + 1 in self.epochs:
            trainer.save_checkpoint(kept(self.folder, trainer.current_epoch + 1), weights_only=True)


def kept(folder: Path, epoch: int) -> Path:
    """The file of an epoch."""
    return folder / f"epoch-{epoch}.ckpt"
