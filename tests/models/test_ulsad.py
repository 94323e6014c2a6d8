import io

import pytest
import torch
import torch.nn.functional as F

from models.head import AnomalyHead, HeadConfig
from models.layers.statistics import BranchQuantiles, ChannelStatistics
from models.reconstruction import Pair
from models.ulsad import (
    FeatureAggregator,
    FeatureReconstructionNetwork,
    GlobalAutoencoder,
    ULSADDetails,
    ULSADNetwork,
    feature_attention,
    resolve_global_map,
    ulsad_distance,
)

SIZES = [(8, 8), (4, 4)]


def network(**options) -> ULSADNetwork:
    torch.manual_seed(0)
    options = {"pooled_channels": 8, **options}
    net = ULSADNetwork([16, 16], SIZES, (64, 64), **options)
    net.statistics.update(torch.randn(4, 8, 8, 8), ["set"] * 4)
    net.statistics.finish()
    return net


def batch() -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 16, 8, 8), torch.randn(4, 16, 4, 4)], torch.randn(4, 3, 64, 64)


# --- the papers' sizes ------------------------------------------------------------------------------------------------


def test_networks_have_the_released_number_of_parameters():
    with torch.device("meta"):
        local = FeatureReconstructionNetwork(384)
        whole = GlobalAutoencoder(384, (256, 256), (32, 32))
    assert sum(p.numel() for p in local.parameters()) == 65_487_744
    assert sum(p.numel() for p in whole.parameters()) == 1_030_720


def test_local_network_shapes_and_only_the_last_layer_doubles():
    with torch.device("meta"):
        double, single = FeatureReconstructionNetwork(384), FeatureReconstructionNetwork(384, double_head=False)
        u = torch.empty(2, 384, 32, 32)
        assert double(u).shape == (2, 768, 32, 32)
        assert single(u).shape == (2, 384, 32, 32)
        assert double.encoder(u).shape == (2, 1536, 8, 8)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (double, single)]
    differing = {k for k in shapes[0] if shapes[0][k] != shapes[1][k]}
    assert {k.rsplit(".", 1)[0] for k in differing} == {"decoder.6", "decoder.7"}


def test_autoencoder_has_the_released_sizes_at_256():
    with torch.device("meta"):
        net = GlobalAutoencoder(384, (256, 256), (32, 32))
        assert [size[0] for size in net.decoder_sizes] == [3, 8, 15, 31, 63, 32]
        assert net.encoder(torch.empty(2, 3, 256, 256)).shape == (2, 64, 1, 1)
        assert net(torch.empty(2, 3, 256, 256)).shape == (2, 384, 32, 32)


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (192, 128), (256, 320), (512, 512), (448, 64)])
def test_autoencoder_works_at_every_image_size_divisible_by_64(size):
    with torch.device("meta"):
        grid = (size[0] // 8, size[1] // 8)
        net = GlobalAutoencoder(16, size, grid)
        assert net(torch.empty(2, 3, *size)).shape == (2, 16, *grid)


@pytest.mark.parametrize("size", [(250, 256), (256, 32), (256, 100)])
def test_an_image_size_not_divisible_by_64_is_named(size):
    with pytest.raises(ValueError, match=str(size[0] if size[0] != 256 else size[1])):
        GlobalAutoencoder(16, size, (32, 32))


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    weight = FeatureReconstructionNetwork(32).encoder[0].weight
    bound = (2 / (1 + 0.01**2)) ** 0.5 * (6 / ((32 + 64) * 9)) ** 0.5
    assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(weight.detach().abs().max()) <= bound


# --- what the outputs can be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_local_outputs_are_not_negative_and_the_autoencoder_takes_both_signs(training):
    net = network().train(training)
    features, images = batch()
    encoded = net.encode(net.aggregator(features), images)
    assert encoded.local.min() >= 0
    assert encoded.imitation.min() >= 0
    assert encoded.autoencoded.min() < 0 < encoded.autoencoded.max()
    assert encoded.target.min() < 0


def test_a_linear_local_output_takes_both_signs_and_is_the_released_one_where_that_is_positive():
    released = FeatureReconstructionNetwork(8)
    linear = FeatureReconstructionNetwork(8, details=ULSADDetails(local_output="linear"))
    linear.load_state_dict(released.state_dict())
    u = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, found = released(u), linear(u)
    assert found.min() < 0
    assert torch.equal(torch.where(found > 0, found, torch.zeros_like(found)), expected)


def test_printed_details_change_the_network_and_released_ones_do_not():
    torch.manual_seed(0)
    printed = ULSADDetails("leaky_relu", True, "printed", "relu", True)
    net = ULSADNetwork([16, 16], SIZES, (64, 64), 8, details=printed)
    net.statistics.set("set", torch.zeros(8), torch.ones(8))
    features, images = batch()
    assert net.encode(net.aggregator(features), images).autoencoded.min() >= 0
    with torch.device("meta"):
        wide = GlobalAutoencoder(
            384, (256, 256), (32, 32), ULSADDetails(decoder_sizes="printed", autoencoder_affine=True)
        )
        assert [size[0] for size in wide.decoder_sizes] == [4, 8, 16, 32, 64, 32]
        assert wide(torch.empty(2, 3, 256, 256)).shape == (2, 384, 32, 32)
    assert any("encoder.0.1.weight" in name for name, _ in wide.named_parameters())
    encoder = FeatureReconstructionNetwork(8, details=printed).encoder
    assert isinstance(encoder[8], torch.nn.LeakyReLU)
    assert isinstance(FeatureReconstructionNetwork(8).encoder[8], torch.nn.Identity)
    with pytest.raises(ValueError, match="encoder_activation"):
        ULSADDetails(encoder_activation="gelu")


def test_one_training_image_is_refused_where_batch_norm_has_nothing_to_average():
    net = GlobalAutoencoder(8, (64, 64), (8, 8))
    with pytest.raises(ValueError, match="batch of one image"):
        net(torch.randn(1, 3, 64, 64))
    assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 8, 8, 8)


# --- features ---------------------------------------------------------------------------------------------------------


def test_channel_pooling_is_the_mean_of_four_neighbours():
    torch.manual_seed(0)
    fine, coarse = torch.randn(2, 512, 4, 4), torch.randn(2, 1024, 2, 2)
    u = FeatureAggregator([512, 1024])([fine, coarse])
    both = torch.cat([fine, F.interpolate(coarse, (4, 4), mode="bilinear", align_corners=False)], 1)
    expected = torch.stack([both[:, 4 * j : 4 * j + 4].mean(1) for j in range(384)], 1)
    torch.testing.assert_close(u, expected)


def test_channel_pooling_of_other_backbones_is_adaptive():
    torch.manual_seed(0)
    fine, coarse = torch.randn(2, 7, 3, 4), torch.randn(2, 9, 3, 4)
    u = FeatureAggregator([7, 9], 5)([fine, coarse])
    both = torch.cat([fine, coarse], 1)
    expected = torch.stack(
        [both[:, (16 * j) // 5 : -(-16 * (j + 1) // 5)].mean(1) for j in range(5)], 1
    )  # adaptive windows overlap when the division leaves a remainder
    torch.testing.assert_close(u, expected)
    assert FeatureAggregator([7, 9], None)([fine, coarse]).shape[1] == 16
    with pytest.raises(ValueError, match="cannot make more"):
        FeatureAggregator([7, 9], 384)


def test_standardised_training_features_have_mean_0_and_std_1():
    torch.manual_seed(0)
    x = 1000 + torch.randn(50, 6, 5, 5) * torch.tensor([1e-2, 0.1, 1, 10, 100, 3])[:, None, None]
    statistics = ChannelStatistics(6)
    for part in x.split([7, 8, 1, 34]):
        statistics.update(part, ["set"] * len(part))
    statistics.finish()
    z = (x.double() - statistics.mean.double()) / statistics.std.double()
    assert z.mean((0, 2, 3)).abs().max() < 5e-3  # float32 storage of a mean of 1000 at a spread of 0.01
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    moments = statistics.moments()["set"]
    flat = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments[1], flat.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments[2] / moments[0], flat.var(1, correction=0), rtol=1e-10, atol=0)


def test_statistics_of_two_processes_merge_into_those_of_one():
    torch.manual_seed(0)
    x = torch.randn(10, 4, 3, 3) + 5
    whole, a, b = ChannelStatistics(4), ChannelStatistics(4), ChannelStatistics(4)
    whole.update(x, ["s"] * 10)
    a.update(x[:3], ["s"] * 3)
    b.update(x[3:], ["s"] * 7)
    a.merge(b.moments())
    for left, right in zip(a.moments()["s"], whole.moments()["s"], strict=True):
        torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=1e-13, atol=1e-13)


def test_each_dataset_is_standardised_by_its_own_statistics_and_they_survive_a_checkpoint():
    torch.manual_seed(0)
    statistics = ChannelStatistics(3)
    a, b = torch.randn(4, 3, 2, 2) + 10, 5 * torch.randn(4, 3, 2, 2)
    statistics.update(torch.cat([a, b]), ["a"] * 4 + ["b"] * 4)
    statistics.finish()
    z = statistics(torch.cat([b, a]), ["b"] * 4 + ["a"] * 4)
    for half in z.split(4):
        assert half.mean().abs() < 1e-5
    buffer = io.BytesIO()
    torch.save(statistics.state_dict(), buffer)
    buffer.seek(0)
    restored = ChannelStatistics(3)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.groups == ("a", "b")
    assert torch.equal(restored(torch.cat([b, a]), ["b"] * 4 + ["a"] * 4), z)
    with pytest.raises(ValueError, match="no channel statistics for c"):
        statistics(a, ["c"] * 4)
    with pytest.raises(ValueError, match="which dataset"):
        statistics(a)


def test_a_dead_channel_is_centred_not_divided_by_zero():
    statistics = ChannelStatistics(2)
    x = torch.zeros(3, 2, 2, 2)
    x[:, 1] = torch.randn(3, 2, 2)
    statistics.update(x, ["s"] * 3)
    with pytest.warns(UserWarning, match="never vary"):
        statistics.finish()
    assert torch.isfinite(statistics(x)).all()


def test_features_before_fit_are_refused():
    with pytest.raises(RuntimeError, match="training data"):
        ChannelStatistics(2)(torch.zeros(1, 2, 1, 1))


# --- attention and distances ------------------------------------------------------------------------------------------


def test_attention_equals_the_written_out_equation():
    torch.manual_seed(0)
    keys, queries = torch.randn(2, 12, 3, 4), torch.randn(2, 12, 3, 4)
    z, x = keys.flatten(2), queries.flatten(2)
    scores = torch.einsum("bcp,bcq->bpq", z, x) / 12**0.5
    weights = scores.softmax(dim=1)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 12))
    expected = torch.einsum("bpq,bcp->bcq", weights, z).reshape(2, 12, 3, 4)
    torch.testing.assert_close(feature_attention(keys, queries), expected)


def test_cross_attention_of_a_perfect_autoencoder_is_the_self_attention():
    u = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(feature_attention(u, u.clone()), feature_attention(u, u))
    constant = torch.ones(1, 8, 4, 4)
    torch.testing.assert_close(feature_attention(constant, u[:1]), constant)


def test_distance_by_hand():
    a, b = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert float(ulsad_distance(Pair(a, b), 0.0)) == pytest.approx(1.0)  # (1 + 1) / 2
    assert float(ulsad_distance(Pair(a, b), 0.5)) == pytest.approx(1.0 + 0.5 * (1 - 24 / 25))


# --- losses -----------------------------------------------------------------------------------------------------------


def touched(net: ULSADNetwork, term: str) -> tuple[bool, bool]:
    """Whether the gradient of one loss term reaches the local network and the autoencoder."""
    features, images = batch()
    net.train().zero_grad()
    net.losses(net.encode(net.aggregator(features), images))[term].backward()
    return tuple(
        part is not None and any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        for part in (net.local_network, net.global_network)
    )


@pytest.mark.parametrize(
    ("term", "reaches"),
    [("pl", (True, False)), ("pg", (False, True)), ("pg_d", (False, True)), ("lg", (True, True))],
)
def test_each_loss_trains_exactly_the_networks_of_the_paper(term, reaches):
    assert touched(network(terms=("pl", "pg", "pg_d", "lg")), term) == reaches


def test_no_gradient_reaches_the_backbone_features_or_the_statistics():
    net = network().train()
    features, images = batch()
    features = [f.requires_grad_() for f in features]
    sum(net.losses(net.encode(net.aggregator(features), images)).values()).backward()
    assert all(f.grad is None for f in features)
    assert not list(net.statistics.parameters())


def test_losses_are_the_equations():
    net = network(lambda_l=0.3, lambda_g=0.7, terms=("pl", "pg", "pg_d", "lg")).eval()
    features, images = batch()
    f = net.encode(net.aggregator(features), images)

    def distance(a, b, weight):
        cosine = F.cosine_similarity(a, b, dim=1)
        return ((a - b) ** 2).mean() + weight * (1 - cosine).mean()

    a, a_hat = feature_attention(f.target, f.target), feature_attention(f.target, f.autoencoded)
    expected = {
        "pl": distance(f.target, f.local, 0.3),
        "pg": distance(a_hat, a, 0.7),
        "pg_d": distance(f.autoencoded, f.target, 0.7),
        "lg": distance(f.autoencoded, f.imitation, 0.7),
    }
    losses = net.losses(f)
    assert list(losses) == list(expected)
    for term in expected:
        torch.testing.assert_close(losses[term], expected[term])


@pytest.mark.parametrize(
    ("terms", "branches", "global_map", "double"),
    [
        (("pl",), ("local",), "none", False),
        (("pl", "pg"), ("local", "global"), "attention", False),
        (("pl", "pg_d"), ("local", "global"), "direct", False),
        (("pl", "pg", "lg"), ("local", "global"), "bridge", True),
        (("pl", "pg_d", "lg"), ("local", "global"), "bridge", True),
        (("pg", "lg"), ("global",), "bridge", True),
        (("pg",), ("global",), "attention", None),
    ],
)
def test_every_row_of_the_loss_ablation_builds_the_networks_and_maps_it_needs(terms, branches, global_map, double):
    net = network(terms=terms).eval()
    assert net.branches == branches
    assert net.global_map == global_map
    assert (net.local_network is None) if double is None else net.local_network.double_head == double
    assert (net.global_network is not None) == (terms != ("pl",))
    features, images = batch()
    with torch.no_grad():
        pairs = net(net.prepare(features), images)
    assert len(pairs) == len(branches)
    assert net.branch_maps(pairs).shape == (4, len(branches), 8, 8)
    assert set(net.losses(net.encode(net.aggregator(features), images))) == set(terms)


def test_both_named_global_maps_work_without_the_bridge():
    features, images = batch()
    net = network(terms=("pl", "pg"), global_map="direct").eval()
    f = net.encode(net.aggregator(features), images)
    assert torch.equal(net.pairs(f)[1].reconstruction, f.autoencoded)
    net.global_map = "attention"
    torch.testing.assert_close(net.pairs(f)[1].reconstruction, feature_attention(f.target, f.autoencoded))


@pytest.mark.parametrize(
    ("global_map", "terms", "message"),
    [
        ("bridge", ("pl", "pg"), "second head"),
        ("attention", ("pl",), "trained autoencoder"),
        ("auto", ("pl", "pg", "pg_d"), "set global_map"),
        ("none", ("pg",), "no anomaly map"),
        ("brige", ("pl",), "allowed are"),
    ],
)
def test_a_map_of_an_untrained_network_is_refused_with_the_reason(global_map, terms, message):
    with pytest.raises(ValueError, match=message):
        resolve_global_map(global_map, terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": ()}, "nothing would be trained"),
        ({"terms": ("lg",)}, "only to each other"),
        ({"terms": ("pl", "pq")}, "unknown loss term"),
        ({"double_head": False}, "second head"),
        ({"lambda_l": -0.1}, "lambda_l"),
    ],
)
def test_impossible_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_feature_grid_not_divisible_by_4_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        ULSADNetwork([16, 16], [(6, 8), (3, 4)], (64, 64), 8)


# --- maps -------------------------------------------------------------------------------------------------------------


def test_quantile_normalised_maps_put_alpha_at_0_and_beta_at_a_tenth():
    head = AnomalyHead(
        HeadConfig(
            distance="mse_cosine", cosine_weight=0.5, fusion="mean", align_corners=False,
            smoothing_sigma=4.0, smoothing_kernel=33, image_score="max",
        )
    )  # fmt: skip
    maps = torch.rand(20, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = head.score([maps], (64, 64)).maps
    qa, qb = torch.quantile(raw, torch.tensor([0.9, 0.995])).tolist()
    scale = 0.1 / (qb - qa)
    affine = (torch.tensor([scale]), torch.tensor([-qa * scale]))
    normalised = head.score([maps], (64, 64), level_affine=affine).maps
    assert float(torch.quantile(normalised, 0.9)) == pytest.approx(0.0, abs=1e-6)
    assert float(torch.quantile(normalised, 0.995)) == pytest.approx(0.1, abs=1e-6)
    quantiles = BranchQuantiles()
    quantiles.set({"set": {"local": {0.9: qa, 0.995: qb}}})
    for ours, expected in zip(quantiles.affine(["local"], None, 0.9, 0.995), affine, strict=True):
        torch.testing.assert_close(ours.flatten(), expected)
    constant = head.score([torch.full((1, 8, 8), 3.0)], (64, 64)).maps
    torch.testing.assert_close(constant, torch.full((1, 64, 64), 3.0))


def test_each_dataset_is_scaled_by_its_own_quantiles_and_they_survive_a_checkpoint():
    net = network()
    values = {"a": {"local": {0.5: 1.0, 0.9: 3.0}, "global": {0.5: 0.0, 0.9: 1.0}},
              "b": {"local": {0.5: 2.0, 0.9: 2.5}, "global": {0.5: 1.0, 0.9: 5.0}}}  # fmt: skip
    net.quantiles.set(values)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    restored = network()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    scale, shift = restored.quantiles.affine(("local", "global"), ["b", "a", "a"], 0.5, 0.9)
    assert scale.shape == shift.shape == (2, 3, 1, 1)
    for row, branch in enumerate(("local", "global")):
        for column, group in enumerate("baa"):
            low, high = values[group][branch].values()
            at_low, at_high = (float(scale[row, column] * q + shift[row, column]) for q in (low, high))
            assert (at_low, at_high) == pytest.approx((0.0, 0.1), abs=1e-6)


@pytest.mark.parametrize(
    ("groups", "alpha", "message"),
    [
        (["c"], 0.5, "no quantiles for c"),
        (None, 0.5, "which dataset"),
        (["a"], 0.7, "0.7 quantile"),
        (["b"], 0.5, "constant"),
    ],
)
def test_a_missing_quantile_is_named(groups, alpha, message):
    quantiles = BranchQuantiles()
    quantiles.set({"a": {"local": {0.5: 1.0, 0.9: 3.0}}, "b": {"local": {0.5: 1.0, 0.9: 1.0}}})
    with pytest.raises(ValueError, match=message):
        quantiles.affine(["local"], groups, alpha, 0.9)
    with pytest.raises(RuntimeError, match="no quantiles"):
        BranchQuantiles().affine(["local"], None, 0.5, 0.9)
