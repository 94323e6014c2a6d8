"""Base of methods that learn from training images with synthetic anomalies."""

from __future__ import annotations

from typing import Any

from datamodules.errors import DataError
from lightning_modules.base import ReconstructionModule


class SyntheticAnomaliesModule(ReconstructionModule):
    """Refuses a training without `data.init_args.anomalies`, and keeps what they are for record and checkpoint."""

    anomalies: str = ""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule
        if data.anomalies is None:
            raise DataError(
                f"{type(self).__name__} learns from synthetic anomalies: set data.init_args.anomalies, for example "
                "--data.init_args.anomalies.source=textures (drawn) or dtd with anomalies.folder (the paper's)."
            )
        self.anomalies = data.describe_anomalies()

    def record_notes(self) -> list[str]:
        return [self.anomalies] if self.anomalies else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["anomalies"] = self.anomalies

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.anomalies = checkpoint["anomalies"]
