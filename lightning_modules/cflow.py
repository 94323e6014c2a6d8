"""CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows, Gudovskiy et al., WACV
2022, arXiv:2107.12571."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam

from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.calibrated import CalibratedModule
from lightning_modules.metrics.sync import Group
from models import cflow
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.optimizers import WarmStairs
from models.reconstruction import Pair


class CFLOW(CalibratedModule):
    """CFLOW with the released configuration as defaults: 25 meta-epochs of eight passes, 32 images a batch, 256 fibres a step.

    The paper trains one model per category (`data.init_args.setting=per_category`), at an image size chosen for each (128, 256 or
    512), and reports every metric's best epoch on the test set: no single setting gives its numbers. anomalib's defaults are
    fibre_batch 64, a constant rate of 1e-4 and no augmentation.

    A training step cuts a batch into its levels' feature vectors, mixes them and makes one optimiser step for every
    `fibre_batch` of them, so that `trainer.max_steps` counts these. A level's step leaves the other levels' flows as they are.

    Args:
        backbone: WideResNet50-2, levels 3 to 5 (strides 8, 16 and 32).
        head: Sum over the levels, resized with aligned corners; image score = maximum. Its distance has no meaning here.
        optimizer: Adam, constant but for the schedule.
        lr_scheduler: Two meta-epochs of warm-up from a tenth of the rate, then a cosine in steps of a meta-epoch.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`, that is every batch.
        image_size: Input size in pixels.
        fibre_batch: Feature vectors per optimiser step. The rest of a batch is left out, as released, unless there is no whole
            one.
        map: `probability` (released) or `log`, which does not saturate; see `models.cflow.CFLOW.level_maps`.
        network: Arguments of `models.cflow.CFLOW`.
    """

    method = "cflow"
    recipe = Recipe(resize="pil_lanczos", batch_size=32, max_epochs=25, repeat=8, drop_last=True)
    needs_packages: ClassVar[Mapping[str, str]] = {"anomalib": "make baselines", "FrEIA": "make baselines"}
    reconstructs: ClassVar[bool] = False
    network: cflow.CFLOW

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.tv_in1k", (3, 4, 5)),
        head: HeadConfig = HeadConfig(fusion="sum", align_corners=True, image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=2e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmStairs(optimizer, stairs=25, warm=2),
        lr_interval: Interval = "step",
        image_size: ImageSize = 256,
        fibre_batch: int = 256,
        map: cflow.Map = "probability",
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if fibre_batch < 1:
            raise ValueError(f"fibre_batch must be at least 1, found {fibre_batch}.")
        if map not in get_args(cflow.Map):
            raise ValueError(f'map is "{map}"; choose one of {", ".join(get_args(cflow.Map))}.')
        self.automatic_optimization = False
        self.network = cflow.CFLOW(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
        self.fibre_batch, self.map = fibre_batch, map

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            raise ValueError(
                f"CFLOW makes many optimiser steps between two batches, in which {self.trainer.world_size} processes would not "
                "share their gradients. Train it on one device (--trainer.devices=1)."
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._check_loss()
        optimizer, losses = self.optimizers(), []
        for level, vectors, codes in self._fibres(batch):
            order = torch.randperm(len(vectors)).to(vectors.device)
            for rows in order[: self._whole(len(order))].split(self.fibre_batch):
                loss = self.network.loss(level, vectors[rows], codes[rows])
                optimizer.zero_grad()  # no gradient instead of zeros: momentum moves no other level
                self.manual_backward(loss)
                optimizer.step()
                losses.append(loss.detach())
        if self.schedule is not None and self.interval == "step":
            self.lr_schedulers().step()
        self.watch(torch.stack(losses).mean(), batch)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.schedule is not None and self.interval == "epoch":
            self.lr_schedulers().step()

    def _whole(self, fibres: int) -> int:
        return fibres // self.fibre_batch * self.fibre_batch or fibres

    def _fibres(self, batch: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(Level, its feature vectors, their position codes), in float32 also under autocast."""
        with torch.autocast(self.device.type, enabled=False):
            for level, features in enumerate(self.features(batch)):
                yield level, *self.network.fibres(level, features)

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean over all fibres of the batch."""
        parts = [(self.network.loss(*part), len(part[1])) for part in self._fibres(batch)]
        return torch.stack([loss * count for loss, count in parts]).sum() / sum(count for _, count in parts)

    def compiled_parts(self) -> list[nn.Module]:
        return list(self.network.flows)

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        raise ValueError("CFLOW reconstructs nothing: it gives likelihoods of features.")

    # ---- scale and score ---------------------------------------------------------------------------------------------

    def fit_normal(self) -> None:
        """The largest log-likelihood of each level over all training images: the scale of the maps."""
        own = torch.full_like(self.network.highest, -torch.inf)
        for batch in self.training_images():
            likelihoods = self.network(self.features(batch))
            own = torch.maximum(own, torch.stack([values.max() for values in likelihoods]))
        self.network.highest.copy_(torch.stack([part.to(own) for part in Group().gather_objects(own)]).amax(dim=0))

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        with torch.autocast(self.device.type, enabled=False):
            maps = self.network.level_maps(self.network(self.features(batch)), self.map)
        return {"": self.head.score(maps, self.image_size)}

    def record_notes(self) -> list[str]:
        network = self.network
        return [
            "flows of anomalib with "
            + (
                "rotations, as released"
                if network.permute_soft
                else "permutations, where the released code has rotations"
            ),
            "maps on the scale of the training images (released: of the test set)",
        ]
