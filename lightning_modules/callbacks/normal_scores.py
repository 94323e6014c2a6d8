"""How high normal images score, by which the score of a new image can be judged without any label.

A run keeps the scores of normal images: of those that it held out (`data.holdout`, or a data set's own validation
images), else of some training images, which score lower than unseen normal images do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd

from lightning_modules.base import ReconstructionModule
from lightning_modules.metrics.sync import Group

FILE = "normal_scores.csv"
"""In a record: id, category, split (val or train), image_score and path."""


class NormalScores(L.Callback):
    """Scores normal images after the test set; then `table` holds them, in every process."""

    def __init__(self) -> None:
        self.table: pd.DataFrame | None = None

    def on_test_epoch_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        data = trainer.datamodule
        rows: list[Any] = []
        with trainer.precision_plugin.val_step_context():
            for batch in data.normal_images():
                batch = trainer.strategy.batch_to_device(batch)
                scores = module.evaluate(batch)[""].image_scores.tolist()
                rows += zip(batch["id"].tolist(), batch["category"], scores, batch["path"], strict=True)
        rows = [row for part in Group().gather_objects(rows) for row in part]
        table = pd.DataFrame(rows, columns=["id", "category", "image_score", "path"])
        table.insert(2, "split", data.normal_split)
        self.table = table.sort_values("id", ignore_index=True)


def read(record: Path) -> pd.DataFrame | None:
    """The normal scores in a run's record; None in a record without them."""
    if not (record / FILE).is_file():
        return None
    texts = {"category": str, "split": str, "path": str}
    return pd.read_csv(record / FILE, dtype=texts, keep_default_na=False, na_values={"image_score": [""]})


def p_values(scores: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """For each score how rare one as high is among normal images: (1 + k) / (1 + n), k of n normal scores being >= it.

    With held-out images this is the conformal p-value: a normal image like them gets one of at most p with probability p.

    Args:
        scores: float (N,).
        normal: float (n,).

    Returns:
        float64 (N,) in (0, 1].
    """
    below = np.searchsorted(np.sort(normal), scores, side="left")
    return (1 + len(normal) - below) / (1 + len(normal))
