"""Nearest neighbours among the features of normal images: the control beside the methods, nothing is trained."""

from __future__ import annotations

from lightning_modules.base import ImageSize, Recipe
from lightning_modules.fitted import MemoryBankModule
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.coreset import CoresetConfig
from models.nearest_neighbours import NearestNeighboursNetwork


class NearestNeighbours(MemoryBankModule):
    """Distance to the nearest vector of all training images; see `models.nearest_neighbours`.

    Args:
        backbone: EfficientNet-B4, levels 1 to 4, as UniAD. With `standardised` all channels weigh alike.
        head: Resized without aligned corners, not smoothed. Its distance and image score have no meaning here.
        image_size: Input size in pixels.
        coreset: Which vectors make up the bank: all of them.
        memory_gb: GB of collected vectors that stay in memory; more go to a memory-mapped file until the bank is filled.
        network: Arguments of `models.nearest_neighbours.NearestNeighboursNetwork`.
    """

    method = "nearest_neighbours"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1)
    network: NearestNeighboursNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), standardised=True),
        head: HeadConfig = HeadConfig(align_corners=False, image_score="max"),
        image_size: ImageSize = 224,
        coreset: CoresetConfig = CoresetConfig(ratio=1.0),
        memory_gb: float = 8.0,
        **network,
    ) -> None:
        super().__init__(backbone, head, image_size, coreset, memory_gb)
        self.network = NearestNeighboursNetwork(
            self.extractor.channels, self.extractor.sizes(self.image_size), **network
        )

    def record_notes(self) -> list[str]:
        rows, columns = self.network.grid
        return [f"nearest neighbours on a grid of {rows}x{columns}", *super().record_notes()]
