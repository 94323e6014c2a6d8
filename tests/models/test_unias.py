"""UniAS: parity with the released code, parameter counts, and what each option promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from models.head import AnomalyHead, HeadConfig
from models.layers.masks import neighbor_mask
from models.reconstruction import Pair
from models.released import load_released
from models.unias import (
    FeatureFiltering,
    MultiGranularity,
    SampleAwareQuery,
    UniAS,
    hybrid_block,
    reconstruction_loss,
    released_name,
)

MVTEC = ([24, 32, 56, 160], [(112, 112), (56, 56), (28, 28), (14, 14)])
HEAD = HeadConfig(
    distance="cosine",
    fusion="product",
    fusion_stride=2,
    align_corners=False,
    level_sigmas=(3.0, 7 / 3, 5 / 3, 1.0),
    level_kernels=(9, 7, 5, 3),
    image_score="max",
)


def small(**options) -> UniAS:
    torch.manual_seed(0)
    defaults = {
        "channels": [4, 5, 6, 7],
        "sizes": [(32, 48), (16, 24), (8, 12), (4, 6)],
        "width": 32,
        "heads": 2,
        "feedforward": 16,
        "encoder_layers": 1,
        "neighbor_size": 3,
    }
    return UniAS(**(defaults | options))


def features_of(network: UniAS, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, count, *size, generator=generator)
        for count, size in zip(network.channels, network.sizes, strict=True)
    ]


# Parity with the released code


@pytest.mark.parity("unias")
def test_authors_checkpoints_give_the_authors_reconstructions_maps_and_loss(case, assert_parity, monkeypatch):
    shapes = case.input["shape"]
    keys = case.key_shapes()
    options = {name: case.hparams[name] for name in ("neighbor_size", "heads") if name in case.hparams}
    options["attention"] = "dual" if any("Channel" in name for name in keys) else "spatial"
    network = UniAS([shape[1] for shape in shapes.values()], [shape[2:] for shape in shapes.values()], **options).eval()
    state = network.state_dict()

    def rule(name: str, normals: torch.Tensor) -> torch.Tensor:
        return 0.03 * normals + float("norm" in name.lower() and name.endswith("weight") and normals.ndim == 1)

    of_this_grid = {name: list(state[released_name(name)].shape) for name in keys}
    imported = load_released(network, case.state(of_this_grid, rule))
    assert imported.prefix == case.key_prefix
    assert not imported.unused
    targets = [case.fill(f"target:{case.tag}{level}", shape) for level, shape in shapes.items()]
    residuals = [0.3 * case.fill(f"residual:{case.tag}{level}", shape) for level, shape in shapes.items()]
    inputs = [torch.cat(both, dim=1) for both in zip(targets, residuals, strict=True)]
    monkeypatch.setattr(network.filter, "forward", lambda _: (inputs, targets))  # recordings enter after the filter
    with torch.no_grad():
        pairs = network(targets)
    image_size = tuple(2 * side for side in targets[0].shape[2:])
    found = {"pred": AnomalyHead(HEAD)(pairs, image_size).maps[:, None]}
    found |= {f"recon{level[3:]}": pair.reconstruction for level, pair in zip(shapes, pairs, strict=True)}
    found["loss_as_released"] = reconstruction_loss(pairs, weight=10.0, cosine_term="as_released")
    for name, description in case.description["arrays"].items():
        array = found[name][..., ::8, ::8] if "every 8th row and column" in description else found[name]
        assert_parity(array, case.arrays[name])


def test_importer_finds_every_parameter_once():
    keys = json.loads((Path(__file__).parent / "parity" / "unias_keys.json").read_text())
    assert sorted(map(released_name, keys)) == sorted(UniAS(*MVTEC).state_dict())
    assert released_name("backbone.conv_stem.weight") is None


# Sizes of the MVTec setting (specification of the released code)


def test_parameter_counts_are_the_released_ones():
    network = UniAS(*MVTEC)
    count = {
        name: sum(p.numel() for n, p in network.named_parameters() if n == name or n.startswith(f"{name}."))
        for name in ("pyramid", "patch_embeddings", "transformers", "hybrids", "norm", "heads", "query", "query.guide")
    }
    patches = sum(p.numel() for n, p in network.named_parameters() if ".patches." in n)
    assert sum(p.numel() for p in network.parameters()) == 53_847_523
    assert count["pyramid"] == 6_447_104
    assert sum(p.numel() for p in network.parameters()) - count["pyramid"] == 47_400_419
    assert patches == 10_224_768
    assert count["patch_embeddings"] - patches == 361_472
    assert count["transformers"] == 10_775_536
    assert network.query.table.numel() == 100_352
    assert network.query_position.numel() == 50_176
    assert count["query.guide"] == 590_080
    assert count["query"] - 590_080 - 100_352 == 5_523_811
    assert network.level_embedding.numel() == 1_024
    assert count["hybrids"] == 4 * 3_606_272 == 14_425_088
    assert sum(p.numel() for p in MultiGranularity(512, 256, gated=True).parameters()) == 5_441_280
    assert count["norm"] == 512
    assert count["heads"] == 5_347_600
    assert network.transformers["1"].channel.cross.block.heads == 4


def test_neighbour_mask_hides_the_7x7_window_around_every_token():
    hidden = ~UniAS(*MVTEC, width=32).visible
    assert hidden.shape == (196, 196)
    assert bool(hidden.diagonal().all())
    assert int(hidden[0].sum()) == 16
    assert int(hidden[7 * 14 + 7].sum()) == 49


def test_masks_codes_and_taps_are_buffers_that_no_checkpoint_carries():
    network = small()
    buffers = dict(network.named_buffers())
    assert {"visible", "position", "pyramid.position", "filter.blur.taps"} <= set(buffers)
    assert not set(buffers) & set(network.state_dict())
    assert torch.equal(buffers["visible"], neighbor_mask((4, 6), 3))


# Shapes and gradients

VARIANTS = {
    "default": {},
    "levels 4": {"levels": [4]},
    "level 2": {"levels": [2]},
    "levels 4 and 1": {"levels": [4, 1]},
    "no filter": {"feature_filter": "none"},
    "average": {"feature_filter": "average"},
    "gaussian alone": {"feature_filter": "gaussian"},
    "no sar": {"sar": "none"},
    "sar supplement": {"sar": "supplement"},
    "sar control": {"sar": "capacity_control"},
    "spatial attention": {"attention": "spatial"},
    "self-attention first": {"cross_first": False},
    "no hybrid": {"hybrid": "none"},
    "conv3": {"hybrid": "conv3"},
    "mg_cnn": {"hybrid": "mg_cnn"},
    "no mask": {"neighbor_size": 0},
    "rectangular mask": {"neighbor_size": (1, 3)},
    "folded": {"folded_heads": True, "levels": [1, 2, 3]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_of_every_variant_learns_and_outputs_fit_their_levels(options):
    network = small(**options).train()
    features = features_of(network)
    pairs = network(features)
    levels = sorted(options.get("levels", [1, 2, 3, 4]))
    expected = [features[level - 1].shape for level in levels]
    assert [pair.reconstruction.shape for pair in pairs] == expected
    assert [pair.target.shape for pair in pairs] == expected
    assert {pair.reconstruction.dtype for pair in pairs} == {torch.float32}
    reconstruction_loss(pairs).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        ([64, 256, 512, 1024], [(112, 112), (56, 56), (28, 28), (14, 14)]),  # wide_resnet50_2
        ([16, 24, 32, 96], [(120, 120), (60, 60), (30, 30), (15, 15)]),  # mobilenetv2_100 at 240: 225 tokens, 3 heads
        ([8, 8], [(32, 16), (8, 8)]),
    ],
)
def test_other_backbones_and_sizes_are_taken_as_they_come(channels, sizes):
    network = UniAS(channels, sizes, width=32, feedforward=16, encoder_layers=1, neighbor_size=3).eval()
    with torch.no_grad():
        pairs = network(features_of(network, batch=1))
    assert [tuple(pair.reconstruction.shape[1:]) for pair in pairs] == [
        (count, *size) for count, size in zip(channels, sizes, strict=True)
    ]


def test_reconstruction_in_evaluation_is_deterministic_and_of_each_sample_alone():
    network = small().eval()
    features = features_of(network, batch=3)
    with torch.no_grad():
        together, alone = network(features), network([level[1:2] for level in features])
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.reconstruction[1:2], other.reconstruction, atol=1e-5)


def test_bfloat16_stays_close_and_hands_float32_to_loss_and_scores():
    network = small().eval()
    features = features_of(network)
    with torch.no_grad():
        exact = network(features)
        with torch.autocast("cpu", torch.bfloat16):
            fast = network(features)
            loss, scored = reconstruction_loss(fast), AnomalyHead(HEAD)(fast, (64, 96))
    for one, other in zip(exact, fast, strict=True):
        assert other.target.dtype == other.reconstruction.dtype == torch.float32
        assert torch.equal(one.target, other.target)
        error = (one.reconstruction - other.reconstruction).abs().max()
        assert 0 < error < 0.05 * one.reconstruction.abs().max()
    assert torch.equal(loss, reconstruction_loss(fast))
    assert torch.equal(scored.maps, AnomalyHead(HEAD)(fast, (64, 96)).maps)


# Options


def test_filters_are_those_of_the_paper_and_targets_never_hold_the_residual():
    level = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    taps = np.exp(-0.5 * np.array([-1, 0, 1]) ** 2)
    taps /= taps.sum()
    blurred = level.double().numpy()
    for axis in (2, 3):
        blurred = ndimage.correlate1d(blurred, taps, axis=axis, mode="mirror")
    blurred = torch.from_numpy(blurred).float()
    average = torch.from_numpy(ndimage.uniform_filter(level.numpy(), (1, 1, 3, 3), mode="constant"))

    (with_residual,), (target,) = FeatureFiltering()([level])
    assert torch.allclose(target, blurred, atol=1e-6)
    assert torch.allclose(with_residual, torch.cat([blurred, level - blurred], 1), atol=1e-6)
    (alone,), (target,) = FeatureFiltering("gaussian")([level])
    assert torch.allclose(alone, blurred, atol=1e-6)
    assert torch.equal(alone, target)
    (inputs,), (target,) = FeatureFiltering("average")([level])
    assert torch.allclose(inputs, average, atol=1e-6)
    assert torch.equal(inputs, target)
    (inputs,), (target,) = FeatureFiltering("none")([level])
    assert torch.equal(inputs, level)
    assert torch.equal(target, level)


def test_jitter_has_the_released_strength_and_leaves_targets_and_evaluation_alone():
    torch.manual_seed(0)
    network = small(jitter_scale=20.0, jitter_probability=1.0, feature_filter="none")
    level = torch.full((1, 48, 200, 200), 2.0)
    noise = network.jitter(level) - level
    assert noise.std().item() == pytest.approx(20 * 2 * 48**0.5 / 48, rel=0.01)
    features = features_of(network)
    for mode in (network.train(), network.eval()):
        for pair, level in zip(mode(features), features, strict=True):
            assert torch.equal(pair.target, level)
    with torch.no_grad():
        first, second = network(features), network(features)
    assert all(torch.equal(a.reconstruction, b.reconstruction) for a, b in zip(first, second, strict=True))


def test_every_level_draws_for_itself_whether_it_is_jittered():
    torch.manual_seed(0)
    network = small(jitter_probability=0.5).train()
    seen = set()
    original = network.pyramid.forward
    clean = [network.filter([level])[0][0] for level in features_of(network)]

    def look(inputs):
        seen.add(tuple(not torch.equal(x, y) for x, y in zip(inputs, clean, strict=True)))
        return original(inputs)

    network.pyramid.forward = look
    for _ in range(30):
        network(features_of(network))
    assert len(seen) > 8  # of 16 combinations


def test_released_noise_at_test_time_is_there_only_when_asked_for():
    network = small(jitter_probability=1.0, feature_filter="none", jitter_at_test=True).eval()
    with torch.no_grad():
        first, second = (network(features_of(network))[0].reconstruction for _ in range(2))
    assert not torch.allclose(first, second)


def query_of(sar: str) -> tuple[SampleAwareQuery, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query = SampleAwareQuery(8, (2, 3), sar)
    return query, torch.randn(4, 8, 2, 3), torch.randn(4, 6, 8)


def test_sar_of_the_supplement_is_the_product_of_both_weights():
    query, top, embedding = query_of("supplement")
    grid = embedding.transpose(1, 2).reshape(4, 8, 2, 3)
    channel = torch.sigmoid(query.channel_weight(embedding.mean(1) + embedding.max(1).values))
    pooled = torch.stack([grid.mean(1), grid.max(1).values], 1)
    spatial = torch.sigmoid(F.conv2d(pooled, query.spatial_weight.weight, query.spatial_weight.bias, padding=3))
    expected = spatial.reshape(4, 6, 1) * channel[:, None] * query.table
    assert torch.allclose(query(top, embedding), expected, atol=1e-6)


def test_sar_controls_know_nothing_about_the_sample():
    for sar in ("none", "capacity_control"):
        query, top, embedding = query_of(sar)
        out = query(top, embedding)
        assert out.shape == (4, 6, 8)
        assert torch.equal(out[0], out[3])
        assert torch.equal(out, query(-top, 2 * embedding))
    query, top, embedding = query_of("released")
    assert not torch.allclose(query(top, embedding)[0], query(top, embedding)[3])


def test_sar_control_has_the_table_and_the_fusion_of_the_released_query():
    released, control = query_of("released")[0], query_of("capacity_control")[0]
    assert control.table.shape == released.table.shape == (12, 8)
    assert {n: p.shape for n, p in control.fusion.named_parameters()} == {
        n: p.shape for n, p in released.fusion.named_parameters()
    }


def test_hybrid_variants_differ_as_the_paper_says():
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    gated, linear = hybrid_block("mgg_cnn", 4), hybrid_block("mg_cnn", 4)
    linear.load_state_dict(gated.state_dict())
    branches = [branch(x) for branch in gated.branches]
    assert torch.allclose(gated(x), sum(F.gelu(b) for b in branches))
    assert torch.allclose(linear(x), sum(branches))
    assert torch.allclose(linear(2 * x) - linear(0 * x), 2 * (linear(x) - linear(0 * x)), atol=1e-5)
    assert [len(branch) for branch in gated.branches] == [1, 1, 2, 3]
    assert hybrid_block("none", 4)(x) is x
    assert hybrid_block("conv3", 4).kernel_size == (3, 3)


def test_loss_is_mse_plus_cosine_distance_and_the_released_sign_is_its_opposite():
    rng = np.random.default_rng(0)
    arrays = [(rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))) for _ in range(2)]
    mse = sum(((r - t) ** 2).mean() for t, r in arrays)
    cosine = sum(((r * t).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(t, axis=1)).mean() for t, r in arrays)
    pairs = [Pair(torch.from_numpy(t).float(), torch.from_numpy(r).float()) for t, r in arrays]
    assert reconstruction_loss(pairs, 10.0).item() == pytest.approx(10 * (mse + 2 - cosine), rel=1e-5)
    assert reconstruction_loss(pairs, 1.0, "as_released").item() == pytest.approx(mse + cosine, rel=1e-5)
    perfect = [Pair(p.target, p.target) for p in pairs]
    assert reconstruction_loss(perfect).item() == pytest.approx(0, abs=1e-4)
    assert reconstruction_loss(perfect, 1.0, "as_released").item() == pytest.approx(2, abs=1e-5)


def test_a_subset_of_levels_trains_only_what_reaches_its_output():
    whole, top, finest = small(), small(levels=[4]), small(levels=[1])
    assert list(top.transformers) == ["4"]
    assert not top.pyramid.lateral
    assert list(finest.pyramid.lateral) == list(whole.pyramid.lateral) == ["3", "2", "1"]
    assert list(finest.heads) == ["1"]


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sar": "off"}, "sar is .off.; choose one of none, supplement, released, capacity_control"),
        ({"hybrid": "conv"}, "choose one of none, conv3"),
        ({"attention": "both"}, "choose one of dual, spatial"),
        ({"feature_filter": "gauss"}, "none, average, gaussian, gaussian_residual"),
        ({"levels": [0, 1]}, "from 1 .finest. to 4"),
        ({"levels": []}, "from 1 .finest. to 4"),
        ({"levels": [2, 2]}, "different numbers"),
        ({"width": 40}, "multiple of 32"),
        ({"neighbor_size": 9}, "hides every token"),
        ({"jitter_probability": 2.0}, "must lie in"),
        ({"sizes": [(32, 32), (16, 16), (8, 8), (5, 5)]}, "whole multiple of the coarsest"),
        ({"channels": [4, 5, 6]}, "same levels"),
    ],
)
def test_impossible_settings_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_features_of_another_image_size_say_what_was_expected():
    network = small()
    with pytest.raises(ValueError, match=r"built for features .*\(4, 32, 48\).*found .*\(4, 16, 16\)"):
        network([torch.zeros(1, 4, 16, 16)])
