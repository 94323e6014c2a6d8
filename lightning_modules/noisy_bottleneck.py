"""A noisy bottleneck on standardised convolutional features; see `models/noisy_bottleneck.py` for whose ideas it takes."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import AdamW

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.noisy_bottleneck import NoisyBottleneckNetwork
from models.optimizers import WarmCosine


class NoisyBottleneck(ReconstructionModule):
    """Dropout, a narrow token and two blocks of attention, trained on the squared error of standardised features.

    No paper's method, and no paper's number stands beside its own.

    Args:
        backbone: EfficientNet-Lite0 with the weights of its Python package, levels 2 to 4.
        head: L2 norm of the residual, resized with aligned corners; image score = maximum of the 16x16-averaged map.
        optimizer: AdamW 4e-3 with weight decay 1e-4.
        lr_scheduler: Warm-up over 300 steps from 0, cosine to 0.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels.
        network: Arguments of `models.noisy_bottleneck.NoisyBottleneckNetwork`.
    """

    method = "noisy_bottleneck"
    standardises = True
    recipe = Recipe(resize="pil_bilinear", batch_size=16, max_epochs=100_000, max_steps=1_200, gradient_clip_val=0.1)
    network: NoisyBottleneckNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_lite0.in1k", (2, 3, 4), weights="packaged"),
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=4e-3, weight_decay=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmCosine(
            optimizer, warmup_steps=300, final_ratio=0.0
        ),
        lr_interval: Interval = "step",
        image_size: ImageSize = 128,
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = NoisyBottleneckNetwork(self.extractor.channels, self.extractor.sizes(self.image_size), **network)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Mean and deviation of each channel over the training images of all processes."""
        if self.network.standardised:
            return  # resumed: they came with the checkpoint
        sums = torch.zeros(3, len(self.network.mean), dtype=torch.float64, device=self.device)
        for batch in self.trainer.datamodule.train_images():
            (features,) = self.features(self.trainer.strategy.batch_to_device(batch))
            features = features.double()
            count = features.new_full((features.shape[1],), features.numel() / features.shape[1])
            sums += torch.stack([count, features.sum((0, 2, 3)), features.square().sum((0, 2, 3))])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        count, total, squares = sums
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.network.standardise(mean, torch.where(std > 0, std, 1.0))  # a constant channel is only centred

    def record_notes(self) -> list[str]:
        return ["feature channels standardised over the training images"]
