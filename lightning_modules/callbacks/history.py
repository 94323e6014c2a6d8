"""The curves of a training."""

from __future__ import annotations

from typing import Any

import lightning as L
import pandas as pd


class History(L.Callback):
    """Keeps every metric logged at the end of an epoch; survives a resume through the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, str, float]] = []
        self.epochs_seen = 0
        self.batches_seen: int | None = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if self.batches_seen is not None:
            self.batches_seen += 1

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.epochs_seen += 1
        for name, value in trainer.callback_metrics.items():
            self.add(trainer, name, float(value))

    def add(self, trainer: L.Trainer, name: str, value: float) -> None:
        """Adds one point of a curve at the present epoch."""
        self.rows.append((trainer.current_epoch, trainer.global_step, name, value))

    def table(self) -> pd.DataFrame:
        """Long table: epoch (from 0), step (optimiser steps), metric, value."""
        return pd.DataFrame(self.rows, columns=["epoch", "step", "metric", "value"])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "batches_seen": self.batches_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state["rows"]]
        self.batches_seen = state.get("batches_seen")  # None: a checkpoint of earlier, which did not count them
