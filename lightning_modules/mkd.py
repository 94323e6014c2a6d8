"""MKD: Multiresolution Knowledge Distillation for Anomaly Detection, Salehi et al., CVPR 2021, arXiv:2011.11108."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from datamodules.errors import DataError
from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models import mkd
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.reconstruction import Pair

Input = Literal["unit", "backbone"]


class MKD(ReconstructionModule):
    """MKD with the released setting for MVTec AD as defaults: 128 pixels, Adam 1e-3, batch 64, 602 passes, the last epoch.

    The paper trains one model per category (`data.init_args.setting=per_category`). The map is the gradient of an
    image's score by its pixels, so that scoring runs both networks forwards and backwards.

    The released code stretches every image's map to [0, 1] on its own, opens it, and leaves all normal images out of the
    pixel metrics: with them, a normal image gets as high values as a defective one. The protocol `as_released` stretches
    and opens, and adds the map of the protocol `clean` as variant `map=unstretched`. `clean` smooths the gradient as
    it is, so that images compare. Pixel metrics are over all test images under both.

    Args:
        backbone: The source, VGG16, levels 2 to 5, pooled. Any other gives its levels without negative values.
        head: Gaussian of sigma 4 with symmetric border. The image score is not read from the map.
        optimizer: Adam.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of the highest level's stride (32).
        input: What both networks see: `unit`, pixels in [0, 1], as released for MVTec AD; `backbone`, normalised as the
            data module does. Only the latter's source features are cached.
        magnitude_weight: Weight of the squared error beside the cosine (released: 0.5 for MVTec AD, 0.01 elsewhere).
        direction_only: Leave the squared error out (the paper's ablation).
        map: `gradients`; `gbp`, guided backpropagation through the cloner (the released configuration's default);
            `smooth_grad`, the mean over noisy copies. The released numbers are most likely `gradients`.
        smooth_draws: Noisy copies for `smooth_grad`. All images get the same draws, scaled, so that batches do not matter.
        noise_rule: Their standard deviation: `released`, (0.05 / range)^2, or `smoothgrad`, 0.05 * range, which was
            probably meant.
        stages: See `models.mkd.MKD`.
        equal_size: See `stages`.
        bias: See `stages`.
    """

    method = "mkd"
    recipe = Recipe(resize="pil_bilinear", batch_size=64, max_epochs=602, best_on_test=("image_auroc", 10))
    needs_images = True
    unexported = "its map is the gradient of the score by the pixels, which torch.export does not trace"
    network: mkd.MKD

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("vgg16.tv_in1k", (2, 3, 4, 5)),
        head: HeadConfig = HeadConfig(smoothing_sigma=4.0, smoothing_border="symmetric", image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-3, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 128,
        input: Input = "unit",
        magnitude_weight: float = 0.5,
        direction_only: bool = False,
        map: mkd.Map = "gradients",
        smooth_draws: int = 50,
        noise_rule: mkd.NoiseRule = "released",
        stages: Sequence[Sequence[int]] | None = None,
        equal_size: bool = False,
        bias: bool = False,
    ) -> None:
        if input not in get_args(Input):
            raise ValueError(f'input is "{input}"; choose one of {", ".join(get_args(Input))}.')
        if magnitude_weight < 0:
            raise ValueError(f"magnitude_weight is {magnitude_weight}; a negative weight would push the cloner away.")
        if backbone.standardised:
            raise ValueError(
                "backbone.standardised: MKD's cloner ends in ReLUs and learns the levels as they are. Leave it out."
            )
        mkd.check_map(map, noise_rule, smooth_draws)
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if str(getattr(self.extractor.net, "output_fmt", "NCHW")).upper().endswith("NHWC"):
            raise ValueError(f"backbone.name is {backbone.name}; MKD takes a convolutional network as its source.")
        pooled = backbone.name.startswith("vgg")  # timm's levels of a VGG end before its pool
        strides = [stride * (2 if pooled else 1) for stride in self.extractor.strides]
        if any(side % strides[-1] for side in self.image_size):
            raise ValueError(
                f"image_size is {self.image_size}; MKD's cloner needs sides that are multiples of {strides[-1]}, the highest "
                "level's stride."
            )
        self.network = mkd.MKD(
            self.extractor.channels, strides, pooled=pooled, stages=stages, equal_size=equal_size, bias=bias
        )
        self.input, self.map, self.noise_rule, self.smooth_draws = input, map, noise_rule, smooth_draws
        self.magnitude_weight = 0.0 if direction_only else magnitude_weight
        if input == "unit":
            self.uncached = "input=unit feeds the source pixels in [0, 1], not normalised ones"
        self.as_released = False

    def set_protocol(self, protocol: str, selection: str) -> None:
        self.as_released = protocol == "as_released"

    # ---- training ----------------------------------------------------------------------------------------------------

    def inputs(self, images: Tensor) -> Tensor:
        """What both networks see of normalised images (B, 3, H, W), float32."""
        if self.input == "backbone":
            return images.float()
        data = getattr(self._trainer, "datamodule", None)  # its own mean and std may have been given by the user
        mean, std = (data.mean, data.std) if hasattr(data, "std") else (self.extractor.mean, self.extractor.std)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        return images.float() * std + mean

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        pixels = self.inputs(batch["image"])
        levels = batch["features"] if "features" in batch else self.extract(pixels)
        return self.network(levels, pixels)

    def loss(self, pairs: list[Pair]) -> Tensor:
        return mkd.loss(pairs, self.magnitude_weight)

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """The map under "", with the image scores, which are those of both readings of the map."""
        with torch.autocast(self.device.type, enabled=False):
            plain, stretched, scores = self.maps(self.inputs(batch["image"]))
            found = {"": self._scored(plain, scores)}
            if self.as_released:
                opened = self._scored(stretched, scores)
                found = {"": opened._replace(maps=mkd.opened(opened.maps)), "map=unstretched": found[""]}
        return found

    def _scored(self, maps: Tensor, scores: Tensor) -> ScoredMaps:
        return self.head.score([maps], self.image_size)._replace(image_scores=scores)

    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of what the networks see, before the smoothing: the grey gradient (B, H, W); the released map (B, H, W), for which
        each image is stretched on its own; the image scores (B,)."""
        if self.map != "smooth_grad":
            gradient, scores = self._gradient(pixels)
            grey = mkd.grey(gradient)
            return grey, mkd.stretched(grey, 0.99), scores
        std = mkd.noise_std(pixels, self.noise_rule).view(-1, 1, 1, 1)
        plain = stretched = torch.zeros_like(pixels[:, 0])
        for number in range(self.smooth_draws):
            grey = mkd.grey(self._gradient(pixels + std * self.noise(number, pixels))[0])
            plain, stretched = plain + grey, stretched + mkd.stretched(grey, 0.99)
        with torch.no_grad():
            scores = self._score(pixels)
        return plain / self.smooth_draws, mkd.stretched(stretched / self.smooth_draws), scores

    def noise(self, draw: int, pixels: Tensor) -> Tensor:
        """Standard normal noise of a draw, (1, 3, H, W), the same for every image."""
        generator = torch.Generator().manual_seed(draw)
        return torch.randn((1, *pixels.shape[1:]), generator=generator).to(pixels)

    def _gradient(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        relu = mkd.guided_relu if self.map == "gbp" else F.relu
        return mkd.pixel_gradient(partial(self._score, relu=relu), pixels)

    def _score(self, pixels: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        levels = self.network.prepare(self.extractor.net(pixels))  # with its gradient, which its forward would cut
        return mkd.image_scores(self.network(levels, pixels, relu), self.magnitude_weight)

    def record_notes(self) -> list[str]:
        shown = f"map: {self.map}"
        if self.map == "smooth_grad":
            shown += f" ({self.smooth_draws} draws, noise rule {self.noise_rule})"
        reading = (
            "each image's map stretched to [0, 1] on its own and opened, as released; the released pixel AUROC leaves "
            "normal images out, these pixel metrics are over all test images"
            if self.as_released
            else "not stretched per image, unlike the released map"
        )
        seen = "pixels in [0, 1]" if self.input == "unit" else "normalised pixels"
        return [f"{shown}, {reading}", f"source and cloner see {seen}"]

    def prepare_import(self, state: Mapping[str, Tensor], categories: Sequence[str]) -> None:
        biased = any(name.endswith("features.0.bias") for name in state)
        if biased and not self.network.bias:
            raise DataError(
                "The checkpoint's convolutions have biases, which this cloner lacks: add --model.init_args.bias=true. A "
                "file of the source network is no cloner's."
            )
