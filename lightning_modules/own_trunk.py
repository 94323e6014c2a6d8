"""Base of methods that train all of their network on images, and are then fitted to the embeddings of normal images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.base import ImageSize, Interval
from lightning_modules.calibrated import CalibratedModule
from lightning_modules.metrics.sync import Group
from models.head import HeadConfig
from models.reconstruction import Pair
from models.trunk import NoBackbone


class OwnTrunkModule(CalibratedModule):
    """No frozen backbone: the network reads images, so that no feature is cached, and `batch_loss` reads training views.

    What is estimated from plain training images at the end goes into `fit_normal`; see `CalibratedModule`.

    Args:
        extractor: What stands in place of a backbone.
        head, optimizer, image_size, schedule, interval: As for every method.
    """

    needs_images = True
    has_backbone: ClassVar[bool] = False
    reconstructs: ClassVar[bool] = False
    uncached = "the method trains its own trunk, on images"

    def __init__(
        self,
        extractor: NoBackbone,
        head: HeadConfig,
        optimizer: OptimizerCallable,
        image_size: ImageSize,
        schedule: LRSchedulerCallable | None = None,
        interval: Interval = "epoch",
    ) -> None:
        super().__init__(extractor, head, optimizer, image_size, schedule, interval)
        self.trained_steps = 0

    # ---- what a method does ------------------------------------------------------------------------------------------

    @classmethod
    def starts_from(cls, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
        """timm model and weights that the trunk starts from with these arguments of the constructor; None from scratch."""
        return None

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.trained_steps = self.global_step

    # ---- images ------------------------------------------------------------------------------------------------------

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the run's pixels."""
        data = getattr(self._trainer, "datamodule", None)
        return (data.mean, data.std) if data is not None else (self.extractor.mean, self.extractor.std)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images or patches (..., 3, H, W) back to [0, 1], by the run's own mean and std."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in self.normalisation)
        return images.float() * std + mean

    def of_all_images(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """What `measure` gives of images (B, 3, H, W), one row (N, ...) per training image of all processes, in the order
        of their ids, so that neither order nor processes change anything."""
        own: dict[int, Tensor] = {}
        for batch in self.training_images():
            own |= dict(zip(batch["id"].tolist(), measure(batch["image"]).cpu(), strict=True))
        rows = {number: row for part in Group().gather_objects(own) for number, row in part.items()}
        return torch.stack([rows[number] for number in sorted(rows)]).to(self.device)

    # ---- what no such method has -------------------------------------------------------------------------------------

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Nothing: the loss is one of training views, which held-out images do not have."""

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        raise ValueError(f"{self.method} reconstructs nothing.")

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["normalisation"] = self.normalisation
        checkpoint["trained_steps"] = self.trained_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.extractor.provenance = checkpoint[
            "backbone"
        ]  # every weight is in the checkpoint, whatever it started from
        self.extractor.mean, self.extractor.std = (tuple(part) for part in checkpoint["normalisation"])
        super().on_load_checkpoint(checkpoint)
        self.trained_steps = checkpoint["trained_steps"]
