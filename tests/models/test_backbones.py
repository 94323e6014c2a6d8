import subprocess

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import models.backbones as backbones
from models.backbones import BackboneConfig, FeatureExtractor, resolve_auto

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


def test_the_efficientnet_port_that_uniad_loads_is_understood(tmp_path):
    """lukemelas' names, written out by hand for stem, a block without and one with expansion."""
    torch.manual_seed(0)
    plain = timm.create_model("tf_efficientnet_b0").eval()
    state, renamed = plain.state_dict(), {}
    index = 0
    for stage in range(7):
        for block in range(len(plain.blocks[stage])):
            bn = ["_bn1", "_bn2"] if stage == 0 else ["_bn0", "_bn1", "_bn2"]
            names = {f"bn{i}": name for i, name in enumerate(bn, 1)}
            names |= {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            names |= {"conv_pw": "_project_conv" if stage == 0 else "_expand_conv", "conv_pwl": "_project_conv"}
            for name, value in state.items():
                if name.startswith(f"blocks.{stage}.{block}."):
                    module, leaf = name.split(".", 3)[3].rsplit(".", 1)
                    renamed[f"_blocks.{index}.{names[module]}.{leaf}"] = value
            index += 1
    renamed |= {f"_bn0.{k.removeprefix('bn1.')}": v for k, v in state.items() if k.startswith("bn1.")}
    renamed["_conv_stem.weight"] = state["conv_stem.weight"]
    renamed["_fc.weight"] = torch.zeros(1000, 1280)
    torch.save(renamed, tmp_path / "efficientnet.pth")
    net = extractor("tf_efficientnet_b0", (1, 2, 3, 4, 5), weights=str(tmp_path / "efficientnet.pth"))
    torch.testing.assert_close(net(images()), expected_features(plain, (1, 2, 3, 4, 5)))
    assert net.provenance["note"] == "unused in the file: _fc.weight"


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


@pytest.mark.parametrize(("run", "answer"), [(finishes(0), "imagenet"), (finishes(1), "random"), (hangs, "random")])
def test_auto_takes_imagenet_only_if_it_comes_in_time(monkeypatch, capsys, run, answer):
    monkeypatch.setattr(subprocess, "run", run)
    assert resolve_auto("resnet18.a1_in1k") == answer
    backbones.main(["resnet18.a1_in1k"])
    assert capsys.readouterr().out.splitlines()[-1] == answer
    backbones.main(["resnet18.a1_in1k", "--weights", "random"])
    assert capsys.readouterr().out.splitlines()[-1] == "random"


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
