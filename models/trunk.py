"""Networks that a method trains itself, from scratch or from ImageNet weights, and what it has in place of a backbone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from models.backbones import IMAGENET_MEAN, IMAGENET_STD, load_backbone_file
from models.pretrained import package_of
from models.weight_files import file_sha256, state_sha256

STARTS = "scratch, imagenet (timm's), packaged (those inside a Python package) or the path of a weight file"


class NoBackbone(nn.Module):
    """Stands where other methods have a frozen feature extractor: it gives no level.

    Args:
        mean: normalisation of the pixels, for pixels in [0, 1].
        std: See `mean`.
        name: what the run's record says of the trunk in its place: its name, what it started from, where that came from,
            its hash, and a remark.
        weights: See `name`.
        source: See `name`.
        sha256: See `name`.
        note: See `name`.
    """

    def __init__(
        self,
        name: str = "none",
        weights: str = "scratch",
        source: str = "",
        sha256: str = "",
        note: str = "",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.channels: list[int] = []
        self.strides: list[int] = []
        self.prefix_tokens = 0
        self.provenance = {
            "name": name,
            "weights": weights,
            "source": source,
            "sha256": sha256,
            "padding": "default",
            "note": note,
        }

    def sizes(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Of no level."""
        return []

    def forward(self, images: Tensor) -> list[Tensor]:
        """No level."""
        return []


class Trunk(NamedTuple):
    """net: a timm model without a classifier; extractor: what the base of all methods is given in place of a backbone."""

    net: nn.Module
    extractor: NoBackbone


def build_trunk(name: str, start: str) -> Trunk:
    """A network to be trained: images (B, 3, H, W) -> its pooled numbers (B, C), or its parts one by one.

    name: timm model. start: `scratch` (timm's initial weights, drawn from torch's generator), `imagenet`, `packaged` or a
    path.

    Raises ValueError for an unknown model, or weights that are not to be had.
    """
    architecture = name.partition(".")[0]
    import timm  # late: it takes seconds, see models.backbones

    if not timm.is_model(architecture):
        raise ValueError(f'timm {timm.__version__} knows no trunk "{name}"; `timm.list_models()` names them all.')
    net = timm.create_model(
        name if start == "imagenet" else architecture, pretrained=start == "imagenet", num_classes=0
    )
    if start == "scratch" and isinstance(net, timm.models.resnet.ResNet):
        net.init_weights(zero_init_last=False)  # as torchvision, on which papers build
    mean, std, sha256, source = IMAGENET_MEAN, IMAGENET_STD, "", start
    if start == "imagenet":
        mean, std = (tuple(net.pretrained_cfg[key]) for key in ("mean", "std"))
        sha256 = state_sha256(net.state_dict())
    elif start == "packaged":
        package = package_of(name)
        if package is None:
            raise ValueError(f'start is "packaged", but no package holds weights of {name}: choose {STARTS}.')
        load_backbone_file(net, str(package.path()), name)
        mean, std, sha256, source = package.mean, package.std, package.sha256, f"{package.package} {package.version}"
    elif start != "scratch":
        load_backbone_file(net, start, name)
        sha256, source = file_sha256(start), start.rpartition("/")[2]
    weights = start if start in ("scratch", "imagenet", "packaged") else "file"
    return Trunk(net, NoBackbone(name, weights, source, sha256, "trained with the method", mean, std))
