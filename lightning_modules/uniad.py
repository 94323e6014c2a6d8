"""UniAD: A Unified Model for Multi-class Anomaly Detection, You et al., NeurIPS 2022, arXiv:2206.03687."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import AdamW

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from lightning_modules.running.schedules import Drops
from models import uniad
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.neck import ConcatenatedLevels


class UniAD(ReconstructionModule):
    """UniAD with the paper's setting as defaults: 1000 epochs, AdamW 1e-4, dropped to 1e-5 from epoch index 801.

    The released schedule is stepped with the epoch's index after the epoch, so its drop at 800 acts from 801.

    Args:
        backbone: EfficientNet-B4, levels 1 to 4, with the released code's padding.
        head: L2 norm of the residual, resized with aligned corners; image score = maximum of the 16x16-averaged map.
        optimizer: AdamW with weight decay 1e-4 on every trainable tensor.
        lr_scheduler: A tenth from epoch index 801.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels; each side a multiple of the highest level's stride.
        network: Arguments of `models.uniad.UniAD`. Its grid is by default the highest level's size, which is the
            paper's, the image size divided by 16.
    """

    method = "uniad"
    recipe = Recipe(
        resize="pil_bilinear",
        batch_size=8,
        max_epochs=1000,
        gradient_clip_val=0.1,
        best_on_test=("pixel_auroc", 10),
    )

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), padding="released"),
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: Drops(optimizer, first=801),
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 224,
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = self.build_network(**network)

    def build_network(self, **network) -> ConcatenatedLevels:
        """The network on the backbone's levels."""
        return uniad.UniAD(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
