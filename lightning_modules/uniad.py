"""UniAD: A Unified Model for Multi-class Anomaly Detection, You et al., NeurIPS 2022, arXiv:2206.03687."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.base import ImageSize, OptimizerConfig, Recipe, ReconstructionModule
from models import uniad
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.neck import resize_concatenate


def concatenation(grid: tuple[int, int]) -> str:
    """Name of UniAD's neck on a grid, for the key of the feature cache."""
    return f"levels resized to {grid[0]}x{grid[1]} with aligned corners, concatenated"


class UniAD(ReconstructionModule):
    """UniAD with the paper's setting as defaults: 1000 epochs, AdamW 1e-4, dropped to 1e-5 from epoch index 801.

    The released schedule is stepped with the epoch's index after the epoch, so its drop at 800 acts from 801.

    Args:
        backbone: EfficientNet-B4, levels 1 to 4, with the released code's padding.
        head: L2 norm of the residual, resized with aligned corners; image score = maximum of the 16x16-averaged map.
        optimizer: AdamW with weight decay 1e-4 on every trainable tensor.
        image_size: Input size in pixels; each side a multiple of the highest level's stride.
        grid: Token grid (height, width); the paper's is the image size divided by 16, the highest level's size.
        network: Arguments of :class:`models.uniad.UniAD`.
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
        optimizer: OptimizerConfig = OptimizerConfig(weight_decay=1e-4, lr_drops=(801,)),
        image_size: ImageSize = 224,
        grid: tuple[int, int] | None = None,
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size)
        self.grid = grid or self.extractor.sizes(self.image_size)[-1]
        self.preparation = concatenation(self.grid)
        self.network = uniad.UniAD([sum(self.extractor.channels)], [self.grid], **network)

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """The neck: all levels resized to the highest level's grid and concatenated over channels."""
        return [resize_concatenate(levels, self.grid, align_corners=True)]
