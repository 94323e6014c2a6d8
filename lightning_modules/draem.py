"""DRAEM: A Discriminatively Trained Reconstruction Embedding for Surface Anomaly Detection, Zavrtanik et al., ICCV 2021,
arXiv:2108.07610."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.own_trunk import OwnTrunkModule
from lightning_modules.synthetic_anomalies import SyntheticAnomaliesModule
from models import draem
from models.head import HeadConfig, ScoredMaps
from models.optimizers import Drops
from models.trunk import NoBackbone


class DRAEM(SyntheticAnomaliesModule, OwnTrunkModule):
    """DRAEM with the released setting as defaults: 700 epochs, batch 8, Adam 1e-4, a fifth of it at 80 % and again at 90 %.

    The paper trains one model per category (`data.init_args.setting=per_category`). Training images get synthetic anomalies
    (`data.init_args.anomalies`); the paper's are photographs of textures (source `dtd`), and the record and every table say
    what they are. Against the released code an epoch has every image once instead of draws with replacement, textures are not
    augmented, and images are RGB. Turning the images is `data.init_args.augmentation=draem`.

    Args:
        head: Of the map; the image score is the released one, whatever it says.
        optimizer: Adam, all parameters.
        lr_scheduler: See above; by the share of steps.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 32.
        anomalous: Share of the training images that keep their anomaly.
        network: Arguments of `models.draem.DRAEM`.
    """

    method = "draem"
    recipe = Recipe(resize="opencv_bilinear", batch_size=8, max_epochs=700)
    needs_packages: ClassVar[Mapping[str, str]] = {"anomalib": "make baselines"}
    network: draem.DRAEM

    def __init__(
        self,
        head: HeadConfig = HeadConfig(image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: Drops(optimizer, first=0.8, second=0.9, ratio=0.2),
        lr_interval: Interval = "step",
        image_size: ImageSize = 256,
        anomalous: float = 0.5,
        **network,
    ) -> None:
        super().__init__(NoBackbone("none (two U-Nets)"), head, optimizer, image_size, lr_scheduler, lr_interval)
        if any(side % draem.STRIDE for side in self.image_size):
            raise ValueError(f"image_size is {self.image_size}; DRAEM halves images five times: give a multiple of 32.")
        if not 0 < anomalous <= 1:
            raise ValueError(f"anomalous is {anomalous}; give the share of images with an anomaly, in (0, 1].")
        self.network, self.similarity = draem.DRAEM(**network), draem.StructuralSimilarity()
        self.anomalous = anomalous

    # ---- training ----------------------------------------------------------------------------------------------------

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error and 1 - SSIM of the repaired image, and the focal loss of the segmentation."""
        clean, image = self.pixels(batch["clean"]), self.pixels(batch["image"])
        kept = (torch.rand(len(image)) < self.anomalous).to(image.device).view(-1, 1, 1, 1)
        found = self.network(torch.where(kept, image, clean))
        with torch.autocast(self.device.type, enabled=False):
            repaired = found.repaired.float()
            losses = {
                "loss_l2": F.mse_loss(repaired, clean),
                "loss_ssim": 1 - self.similarity(repaired, clean),
                "loss_focal": draem.focal_loss(found.logits, batch["mask"] & kept),
            }
        self.keep({name: loss.detach() for name, loss in losses.items()}, batch)
        return torch.stack(list(losses.values())).sum()

    def compiled_parts(self) -> list[nn.Module]:
        return [self.network.reconstructive, self.network.discriminative]

    # ---- score -------------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        maps, scores = draem.anomaly(self.network(self.pixels(batch["image"])).logits)
        return {"": self.head.score([maps], self.image_size)._replace(image_scores=scores)}
