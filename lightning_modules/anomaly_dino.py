"""AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2, Damm et al., WACV 2025, arXiv:2405.14529."""

from __future__ import annotations

from lightning_modules.base import ImageSize, Recipe
from lightning_modules.fitted import MemoryBankModule
from models.anomaly_dino import AnomalyDINONetwork
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.coreset import CoresetConfig


class AnomalyDINO(MemoryBankModule):
    """AnomalyDINO with all training images as references, unmasked; see `models.anomaly_dino`.

    Args:
        backbone: DINOv2 ViT-S/14, its last block.
        head: Resized without aligned corners, smoothed with sigma 4. Its distance and image score have no meaning here.
        image_size: Input size in pixels, a multiple of 14.
        coreset: Which vectors make up the bank: all of them in the paper.
        memory_gb: GB of collected vectors that stay in memory; more go to a memory-mapped file until the bank is chosen.
        network: Arguments of `models.anomaly_dino.AnomalyDINONetwork`.
    """

    method = "anomaly_dino"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1)
    network: AnomalyDINONetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vit_small_patch14_dinov2.lvd142m", (12,)),
        head: HeadConfig = HeadConfig(
            align_corners=False, smoothing_sigma=4.0, smoothing_border="symmetric", image_score="max"
        ),
        image_size: ImageSize = 448,
        coreset: CoresetConfig = CoresetConfig(ratio=1.0),
        memory_gb: float = 8.0,
        **network,
    ) -> None:
        super().__init__(backbone, head, image_size, coreset, memory_gb)
        self.network = AnomalyDINONetwork(self.extractor.channels, self.extractor.sizes(self.image_size), **network)
