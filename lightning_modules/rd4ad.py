"""RD4AD: Anomaly Detection via Reverse Distillation from One-Class Embedding, Deng and Li, CVPR 2022, arXiv:2201.10703."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models import rd4ad
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.optimizers import ShortMomentumAdam
from models.reconstruction import Pair


class RD4AD(ReconstructionModule):
    """RD4AD with the released configuration as defaults: 200 epochs, Adam 5e-3 with betas 0.5 and 0.999, batch 16, the last
    epoch's model.

    The paper trains one model per category (`data.init_args.setting=per_category`).

    Args:
        backbone: WideResNet50-2, levels 2, 3 and 4 (strides 4, 8 and 16).
        head: Sum of the three cosine maps, resized with aligned corners, smoothed with sigma 4; image score = maximum.
        optimizer: Adam with betas 0.5 and 0.999, no weight decay.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 32.
        network: Arguments of `models.rd4ad.RD4AD`. They follow the backbone: for ResNet18 block `basic`,
            width_per_group 64, embedding_blocks 2 and decoder_blocks [2, 2, 2].
    """

    method = "rd4ad"
    recipe = Recipe(resize="pil_bilinear", batch_size=16, max_epochs=200)
    network: rd4ad.RD4AD

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.tv_in1k", (2, 3, 4)),
        head: HeadConfig = HeadConfig(
            distance="cosine",
            fusion="sum",
            align_corners=True,
            smoothing_sigma=4.0,
            smoothing_border="symmetric",
            image_score="max",
        ),
        optimizer: OptimizerCallable = lambda parameters: ShortMomentumAdam(parameters, lr=5e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = rd4ad.RD4AD(self.extractor.channels, self.extractor.sizes(self.image_size), **network)

    def loss(self, pairs: list[Pair]) -> Tensor:
        return rd4ad.cosine_loss(pairs)
