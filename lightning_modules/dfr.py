"""DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation, Yang, Shi and Qi, 2020, arXiv:2012.07122."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Adam

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models.backbones import BackboneConfig
from models.dfr import DFRNetwork, RegionalFeatures, StreamingCovariance, latent_dimension
from models.head import HeadConfig
from models.reconstruction import Pair


class DFR(ReconstructionModule):
    """DFR with the released configuration as defaults: 150 epochs, Adam 1e-4, batch 4, last epoch's model.

    The paper trains one model per category (`data.init_args.setting=per_category`).

    Args:
        backbone: VGG19, levels 1 to 4. A VGG is padded by reflection (padding `default` means that here) and gives
            all its ReLU maps; another backbone gives one map per level. With `standardised`, which is not the paper's,
            regional features are standardised, and the PCA sees them divided by their deviations in its own images.
        head: Mean square over channels, resized with aligned corners, no smoothing; image score = maximum.
        optimizer: Adam.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 4.
        latent: Channels of the latent layer; None finds them by PCA when training starts.
        explained: Share of the features' variance that the latent channels must exceed in the PCA.
        pca_images: How many training images the PCA reads: the first of each category, sorted by path.
    """

    method = "dfr"
    recipe = Recipe(resize="pil_nearest", batch_size=4, max_epochs=150)

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vgg19.tv_in1k", (1, 2, 3, 4), padding="reflect"),
        head: HeadConfig = HeadConfig(distance="squared_mean", fusion="sum", align_corners=True, image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        latent: int | None = None,
        explained: float = 0.9,
        pca_images: int = 10,
    ) -> None:
        if pca_images < 1:
            raise ValueError(f"pca_images is {pca_images}; the PCA needs at least one image.")
        if not 0 < explained < 1:
            raise ValueError(f"explained is {explained}; it is a share between 0 and 1.")
        if backbone.name.startswith("vgg") and "_bn" not in backbone.name:
            padding = "reflect" if backbone.padding == "default" else backbone.padding
            backbone = replace(backbone, padding=padding, maps="relu")
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.latent, self.explained, self.pca_images = latent, explained, pca_images
        if latent is None:
            self.untiled = "its latent size is found on whole training images; give it with model.init_args.latent"
        regional = RegionalFeatures(self.extractor.channels, self.extractor.strides, self.image_size)
        self.network = DFRNetwork(regional, latent)

    def setup(self, stage: str) -> None:
        """Finds the latent size before the optimiser is made; a checkpoint that is loaded then brings its own."""
        super().setup(stage)
        if stage == "fit" and self.network.latent is None:
            self.network.build(self.find_latent(self.trainer.datamodule))

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        if self.network.latent is None:
            raise ValueError(
                "The latent size of DFR is found in training: give a checkpoint (--ckpt_path), or "
                "--model.init_args.latent."
            )
        return super().reconstruct(batch)

    def find_latent(self, data: Any) -> int:
        """Number of principal components of regional features that explain more than `explained` of the variance."""
        covariance = StreamingCovariance(self.network.regional.channels)
        train = data.table[data.table.split == "train"].sort_values("image_path")
        device = self.trainer.strategy.root_device if self.attached is not None else self.device
        self.extractor.to(device)
        for _, rows in train.groupby(["dataset", "category"], sort=False):
            for number in rows.id.tolist()[: self.pca_images]:
                images = data.image_batch([number])["image"].to(device)
                (features,) = self.extract(images)
                covariance.update(features.permute(0, 2, 3, 1).flatten(0, 2))
        self.extractor.to(self.device)
        return latent_dimension(covariance.eigenvalues(self.standardisation is not None), self.explained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        latent = checkpoint["state_dict"]["network.encoder.6.weight"].shape[0]
        if self.latent not in (None, latent):
            raise ValueError(
                f"The checkpoint has {latent} latent channels, this model {self.latent}: leave latent out, or set "
                f"--model.init_args.latent={latent}."
            )
        if self.network.latent != latent:
            self.network.build(latent)

    def record_notes(self) -> list[str]:
        return [f"latent size {self.network.latent}"]
