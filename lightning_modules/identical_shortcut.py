"""The identical-shortcut study of UniAD (You et al., NeurIPS 2022, section 3.1): which networks learn to copy anomalies."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_modules.base import ImageSize, OptimizerConfig, Recipe, ReconstructionModule
from lightning_modules.uniad import concatenation
from models import shortcut, uniad
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.neck import resize_concatenate


class IdenticalShortcut(ReconstructionModule):
    """One network of the study on UniAD's features, with UniAD's optimiser, schedule, head and score.

    The paper shows curves but publishes neither the networks' widths nor numbers; the widths are ours, matched to
    UniAD's number of parameters.

    Args:
        network: ``mlp``, ``cnn``, ``transformer_no_query``, ``transformer_one_query`` or, for comparison, ``uniad``.
        backbone: As in UniAD.
        head: As in UniAD.
        optimizer: As in UniAD.
        image_size: Input size in pixels.
        grid: Token grid (height, width); by default the highest level's size.
        hidden: Width of the hidden layers (mlp 1792, cnn 512) or of the transformers' feed-forward part (1024).
        d_model: Transformers and ``uniad`` only, width of their tokens.
        dropout: Transformers only, 0.1; 0 shows what dropout itself prevents.
        jitter_scale: Feature jitter; the study has none (0) except in ``uniad``, whose default is 20.
    """

    method = "identical_shortcut"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1000, gradient_clip_val=0.1)

    def __init__(
        self,
        network: Literal["mlp", "cnn", "transformer_no_query", "transformer_one_query", "uniad"] = "mlp",
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), padding="released"),
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(weight_decay=1e-4, lr_drops=(801,)),
        image_size: ImageSize = 224,
        grid: tuple[int, int] | None = None,
        hidden: int | None = None,
        d_model: int = 256,
        dropout: float | None = None,
        jitter_scale: float | None = None,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size)
        self.grid = grid or self.extractor.sizes(self.image_size)[-1]
        self.preparation = concatenation(self.grid)
        shape = [sum(self.extractor.channels)], [self.grid]
        if network == "uniad":
            self.network = uniad.UniAD(
                *shape,
                d_model=d_model,
                feedforward=hidden or 1024,
                dropout=0.1 if dropout is None else dropout,
                jitter_scale=20.0 if jitter_scale is None else jitter_scale,
            )
        else:
            self.network = shortcut.shortcut_network(
                network,
                *shape,
                hidden=hidden,
                d_model=d_model,
                dropout=dropout,
                jitter_scale=jitter_scale or 0.0,
            )

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """UniAD's neck."""
        return [resize_concatenate(levels, self.grid, align_corners=True)]
