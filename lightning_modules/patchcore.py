"""PatchCore: Towards Total Recall in Industrial Anomaly Detection, Roth et al., CVPR 2022, arXiv:2106.08265."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_modules.base import ImageSize, Recipe
from lightning_modules.fitted import MemoryBankModule
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.layers.coreset import CoresetConfig
from models.patchcore import PatchCoreNetwork

RELEASED_HEAD = HeadConfig(align_corners=False, smoothing_sigma=4.0, smoothing_border="symmetric", image_score="max")


class PatchCore(MemoryBankModule):
    """PatchCore by the released rule, or, with `rule=anomalib`, as anomalib has it; see `models.patchcore`.

    The paper trains one model per category (`data.init_args.setting=per_category`) on a tenth of the vectors, and so
    does the profile `paper`. The default here is 1 %, because a unified model of MVTec AD has 2.85 million vectors at 224
    pixels; their sizes stand in `models.patchcore`.

    Args:
        backbone: WideResNet50-2, levels 3 and 4 (strides 8 and 16).
        head: Resized without aligned corners, smoothed with sigma 4. Its distance has no meaning here, and its image score
            only with `score=map`. With `rule=anomalib` the default border is `reflect`, as in anomalib.
        image_size: Input size in pixels. The released code resizes to 256 and crops 224; here nothing is cropped.
        coreset: Which vectors make up the bank; anomalib's: projection `sparse`, start `random`, ratio 0.1.
        memory_gb: GB of collected vectors that stay in memory; more go to a memory-mapped file until the bank is chosen.
        network: Arguments of `models.patchcore.PatchCoreNetwork`.
    """

    method = "patchcore"
    recipe = Recipe(resize="pil_bilinear", batch_size=8, max_epochs=1)
    network: PatchCoreNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.tv_in1k", (3, 4)),
        head: HeadConfig = RELEASED_HEAD,
        image_size: ImageSize = 224,
        coreset: CoresetConfig = CoresetConfig(),
        memory_gb: float = 8.0,
        **network,
    ) -> None:
        if network.get("rule") == "anomalib" and head == RELEASED_HEAD:
            head = replace(head, smoothing_border="reflect")
        super().__init__(backbone, head, image_size, coreset, memory_gb)
        self.network = PatchCoreNetwork(self.extractor.channels, self.extractor.sizes(self.image_size), **network)

    def enlarge(self, maps: Tensor) -> Tensor:
        return self.network.enlarge(maps, self.image_size)

    def record_notes(self) -> list[str]:
        network = self.network
        rule = f"rule {network.rule}, image score {network.score}, {network.neighbors} nearest"
        return [rule, *super().record_notes()]
