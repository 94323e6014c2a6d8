"""The identical-shortcut study of UniAD (You et al., NeurIPS 2022, section 3.1): which networks learn to copy anomalies."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import AdamW

from lightning_modules.base import ImageSize, Interval, Recipe
from lightning_modules.running.schedules import Drops
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.neck import ConcatenatedLevels
from models.shortcut import Shortcut, shortcut_network


class IdenticalShortcut(UniAD):
    """One network of the study on UniAD's features, with UniAD's optimiser, schedule, head and score.

    The paper shows curves but publishes neither the networks' widths nor numbers; the widths are ours, matched to
    UniAD's number of parameters.

    Args:
        network: `mlp`, `cnn`, `transformer_no_query`, `transformer_one_query` or, for comparison, `uniad`.
        backbone: As in UniAD.
        head: As in UniAD.
        optimizer: As in UniAD.
        lr_scheduler: As in UniAD.
        lr_interval: As in UniAD.
        image_size: Input size in pixels.
        grid: Token grid (height, width); by default the highest level's size.
        hidden: Width of the hidden layers (mlp 1792, cnn 512) or of the transformers' feed-forward part (1024).
        d_model: Transformers and `uniad` only, width of their tokens.
        dropout: Transformers only, 0.1; 0 shows what dropout itself prevents.
        jitter_scale: Feature jitter; the study has none (0) except in `uniad`, whose default is 20.
    """

    method = "identical_shortcut"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1000, gradient_clip_val=0.1)

    def __init__(
        self,
        network: Shortcut = "mlp",
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), padding="released"),
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: Drops(optimizer, first=801),
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 224,
        grid: tuple[int, int] | None = None,
        hidden: int | None = None,
        d_model: int = 256,
        dropout: float | None = None,
        jitter_scale: float | None = None,
    ) -> None:
        super().__init__(
            backbone,
            head,
            optimizer,
            lr_scheduler,
            lr_interval,
            image_size,
            kind=network,
            grid=grid,
            hidden=hidden,
            d_model=d_model,
            dropout=dropout,
            jitter_scale=jitter_scale,
        )

    def build_network(self, **network) -> ConcatenatedLevels:
        """The chosen network on the backbone's levels."""
        return shortcut_network(
            channels=self.extractor.channels, sizes=self.extractor.sizes(self.image_size), **network
        )
