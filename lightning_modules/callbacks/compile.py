"""`torch.compile` for what a method computes in every step."""

from __future__ import annotations

import lightning as L

from lightning_modules.base import ReconstructionModule


class Compile(L.Callback):
    """Compiles what a method computes in every step, as soon as it is built.

    Args:
        mode: Of `torch.compile`; None is its default.
    """

    def __init__(self, mode: str | None = None) -> None:
        self.mode = mode

    def on_fit_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        for part in module.compiled_parts():
            part.compile(mode=self.mode)
