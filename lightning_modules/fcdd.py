"""FCDD: Explainable Deep One-Class Classification, Liznerski et al., ICLR 2021, arXiv:2007.01760."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from datamodules.anomalies.confetti import ConfettiConfig, ConfettiImages, nearest_places
from datamodules.dataset import TrainingViews
from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.metrics.sync import Group
from lightning_modules.own_trunk import OwnTrunkModule
from models import fcdd
from models.head import HeadConfig, ScoredMaps

NETWORK_SHARE = 224 / 240
"""Of the image's side, what the network gets."""


class FCDD(OwnTrunkModule):
    """FCDD, unsupervised: confetti on normal images. The released setting of MVTec AD as defaults: 200 epochs of ten passes.

    The paper trains one model per category (`data.init_args.setting=per_category`). The trunk is trained, and batch norm moves
    in its frozen part too, so no feature is cached.

    The paper's numbers with real defects (one image of every kind, with its mask) train on the test set and score it again:
    `supervision=real_defects` does so, is refused by the protocol `clean`, and every record says it.

    Args:
        head: Smoothing of the map, none by default; the image score is the mean of the cells, whatever it says.
        optimizer: SGD with Nesterov's momentum 0.9, L2 term 1e-4.
        lr_scheduler: The learning rate times 0.985 after every epoch.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels. The network gets 224 of 240: crops in training, the whole image resized by the
            nearest pixel in tests.
        net: `vgg11_bn`, whose first three stages are frozen; or `cnn224`, the released small network, all from scratch.
        start: Of VGG11: `imagenet`, a weight file, or `scratch`.
        supervision: `confetti` or `real_defects`.
        confetti: How it is drawn.
        map_loss: Whether the loss is one of maps (released for MVTec AD); else of cells (released for data without masks).
        frozen_norm: See `models.fcdd.VGG`.
        upsampling_std: Of the Gaussian that makes maps of cells, in pixels, in loss and score: 12 for MVTec AD.
        normalised_upsampling: Divide maps by those of ones, which makes up for the dark border.
    """

    method = "fcdd"
    recipe = Recipe(resize="pil_bilinear", batch_size=128, max_epochs=200, repeat=10)
    network: fcdd.FCDD

    def __init__(
        self,
        head: HeadConfig = HeadConfig(image_score="mean"),
        optimizer: OptimizerCallable = lambda parameters: SGD(
            parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True
        ),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: ExponentialLR(optimizer, gamma=0.985),
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 240,
        net: fcdd.Net = "vgg11_bn",
        start: str = "imagenet",
        supervision: Literal["confetti", "real_defects"] = "confetti",
        confetti: ConfettiConfig = ConfettiConfig(),
        map_loss: bool = True,
        frozen_norm: fcdd.FrozenNorm = "batch",
        upsampling_std: float | None = 12.0,
        normalised_upsampling: bool = False,
    ) -> None:
        if supervision not in ("confetti", "real_defects"):
            raise ValueError(f'supervision is "{supervision}"; choose confetti or real_defects.')
        trunk, extractor = fcdd.build(net, start, frozen_norm)
        super().__init__(extractor, head, optimizer, image_size, lr_scheduler, lr_interval)
        height, width = self.image_size
        self.network_size = (round(height * NETWORK_SHARE), round(width * NETWORK_SHARE))
        self.network = fcdd.FCDD(trunk, std=upsampling_std, normalised=normalised_upsampling)
        if supervision == "real_defects":
            self.untiled = "supervision=real_defects trains on whole test images"
        self.supervision, self.confetti, self.map_loss = supervision, confetti, map_loss

    def set_protocol(self, protocol: str, selection: str) -> None:
        """Refuses real defects in `clean`: they are images of the test set."""
        if self.supervision == "real_defects" and protocol == "clean":
            raise ValueError(
                "supervision=real_defects trains on one test image of every kind of defect and scores it again: that is not "
                "unsupervised, and run.protocol=clean refuses it. Use supervision=confetti, or run.protocol=as_released with "
                "run.selection=last, and say so beside the numbers."
            )

    @classmethod
    def starts_from(cls, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
        return (
            (fcdd.VGG_NAME, arguments["start"])
            if arguments["net"] == "vgg11_bn" and arguments["start"] != "scratch"
            else None
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_views(self) -> TrainingViews:
        return ConfettiImages(self.confetti, self.network_size, self._defects())

    def _defects(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first test image of every kind of defect of every category, uint8 (H, W, 3), and its mask, bool (H, W)."""
        data = getattr(self._trainer, "datamodule", None)
        if self.supervision == "confetti" or data is None or data.table is None:
            return []
        defective = data.table[(data.table["split"] == "test") & (data.table["label"] == 1)]
        first = defective.groupby(["dataset", "category", "defect"], sort=False).first()
        batch = data.image_batch(first["id"].tolist())
        images = (self.pixels(batch["image"]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return list(zip(images, batch["mask"][:, 0].numpy(), strict=True))

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """The range of the contrast-normalised training images, the same on every process."""
        self.network.to(self.device)
        if not self.network.has_range:
            self._measure_range()

    def _measure_range(self) -> None:
        ends = []
        for batch in self.training_images():
            values = fcdd.contrast(self._shrunk(batch["image"]))
            ends.append((values.amin((0, 2, 3)).cpu(), values.amax((0, 2, 3)).cpu()))
        low, high = zip(*(pair for part in Group().gather_objects(ends) for pair in part), strict=True)
        self.network.low.copy_(torch.stack(low).amin(0))
        self.network.high.copy_(torch.stack(high).amax(0))

    def _shrunk(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> pixels in [0, 1] at the network's size."""
        rows, columns = (
            torch.from_numpy(nearest_places(length, part)).to(images.device)
            for length, part in zip(images.shape[-2:], self.network_size, strict=True)
        )
        return self.pixels(images)[..., rows, :][..., columns]

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean over the images of the loss of their maps, float32."""
        cells = self.network(self.pixels(batch["image"]))
        with torch.autocast(cells.device.type, enabled=False):
            if self.map_loss:
                return fcdd.losses(self.network.spread(cells, self.network_size), batch["mask"][:, 0]).mean()
            return fcdd.losses_without_maps(cells, batch["synthetic"]).mean()

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        if not self.network.has_range:  # imported weights
            self.network.to(self.device)
            self._measure_range()

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """The map, resized by the nearest pixel; the score is the mean of the cells before they are spread."""
        images = batch["image"]
        with torch.autocast(images.device.type, enabled=False):
            cells = self.network(self._shrunk(images))
            maps = self.network.spread(cells, self.network_size)
            rows, columns = (
                torch.from_numpy(nearest_places(length, whole)).to(images.device)
                for length, whole in zip(self.network_size, self.image_size, strict=True)
            )
            scored = self.head.score([maps[:, rows][:, :, columns]], self.image_size)
        return {"": scored._replace(image_scores=cells.mean(dim=(1, 2)), level_maps=[cells])}

    def record_notes(self) -> list[str]:
        kernel = "divided by that of ones" if self.network.normalised else "not normalised, as released"
        notes = [f"Gaussian upsampling of std {self.network.std:g}, {kernel}; range of all training images"]
        if isinstance(self.network.net, fcdd.VGG):
            notes.append(f"norms of the frozen part: {self.network.net.frozen_norm} statistics in training")
        if self.supervision == "real_defects":
            return [
                "SEMI-SUPERVISED: trained on one test image of every kind of defect, with its mask, which is scored again",
                *notes,
            ]
        return [f"unsupervised: {ConfettiImages(self.confetti, self.network_size).describe()}", *notes]
