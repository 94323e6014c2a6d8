"""RLR: parity with the released code, counts, masks, and what each option promises."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.layers.masks import neighbor_mask, window_mask
from models.reconstruction import Pair
from models.released import load_released
from models.rlr import (
    LevelNetwork,
    RLRNetwork,
    WindowAttention,
    feature_jitter,
    level_loss,
    released_width,
    token_masking,
    window_side,
)


def small(**options) -> LevelNetwork:
    torch.manual_seed(0)
    defaults = {"channels": 6, "size": (6, 5), "width": 16, "window": 3, "layers": 2, "heads": 2}
    return LevelNetwork(**(defaults | options))


# Parity


def released_shapes(hparams: dict) -> dict[str, list[int]]:
    """Names and shapes of one level's released state dict, written down from the released module structure."""
    c, d, tokens = hparams["channels"], hparams["d_model"], hparams["side"] ** 2
    shapes = {"ref_mca": [1, hparams["references"] * tokens, c]}
    for embedding in ("embedding", "ref_mca_embedding"):
        shapes[f"{embedding}.project_embedding.project.weight"] = [d, c, 1]
        shapes[f"{embedding}.project_embedding.project.bias"] = [d]
    for layer in range(hparams["layers"]):
        start = f"encoder.encode_layers.{layer}."
        for attention in ("mca", "nsa"):
            shapes[f"{start}{attention}.in_proj_weight"] = [3 * d, d]
            shapes[f"{start}{attention}.in_proj_bias"] = [3 * d]
            shapes[f"{start}{attention}.out_proj.weight"] = [d, d]
            shapes[f"{start}{attention}.out_proj.bias"] = [d]
        for norm in ("norm1", "norm2"):
            shapes |= {f"{start}{norm}.weight": [d], f"{start}{norm}.bias": [d]}
        shapes |= {f"{start}ffn.fc1.weight": [4 * d, d], f"{start}ffn.fc1.bias": [4 * d]}
        shapes |= {f"{start}ffn.fc2.weight": [d, 4 * d], f"{start}ffn.fc2.bias": [d]}
    shapes |= {"encoder.norm.weight": [d], "encoder.norm.bias": [d]}
    shapes |= {"projection.weight": [c, d], "projection.bias": [c]}
    if hparams["fusion"] == "theta":
        shapes["encoder.gate"] = [hparams["layers"], 2]
    return shapes


def parameter(name: str, values: torch.Tensor) -> torch.Tensor:
    if name.endswith("ref_mca"):
        return values
    return 0.05 * values + (name.endswith("encoder.gate") or ("norm" in name and name.endswith("weight")))


def network_of(hparams: dict, **options) -> LevelNetwork:
    size = (hparams["side"], hparams["side"])
    return LevelNetwork(
        hparams["channels"],
        size,
        hparams["d_model"],
        window_side(size),
        hparams["layers"],
        hparams["heads"],
        fusion=hparams["fusion"],
        references=hparams["references"],
        **options,
    )


@pytest.mark.parity("rlr")
def test_an_imported_checkpoint_computes_what_the_released_code_computes(case):
    network = network_of(case.hparams)
    imported = load_released(network, case.state(released_shapes(case.hparams), parameter))
    assert not imported.unused
    with torch.no_grad():
        found = network.eval()(case.input_tensor())
    case.check({"": found})


@pytest.mark.parametrize(
    ("group", "hparams"),
    [
        ("level3_16x16", {"channels": 200, "side": 16, "d_model": 512, "layers": 4, "fusion": "alpha"}),
        ("level2_32x32", {"channels": 72, "side": 32, "d_model": 256, "layers": 4, "fusion": "alpha"}),
        ("level3_16x16_theta", {"channels": 200, "side": 16, "d_model": 512, "layers": 4, "fusion": "theta"}),
    ],
)
def test_the_importer_knows_every_name_of_the_published_checkpoints(parity_keys, group, hparams):
    assert released_shapes(hparams | {"references": 1}) == parity_keys("rlr")[group]


class Spelled(nn.Module):
    """K references with plain `nn.MultiheadAttention`, dense masks and loops: slow, and hard to get wrong."""

    def __init__(self, state: dict, hparams: dict) -> None:
        super().__init__()
        self.state, self.h = state, hparams

    def attention(self, name, q, k, v, mask):
        width = self.h["d_model"]
        module = nn.MultiheadAttention(width, self.h["heads"], batch_first=True)
        module.load_state_dict({key.removeprefix(name): v for key, v in self.state.items() if key.startswith(name)})
        return module(q, k, v, attn_mask=mask)[0]

    def embed(self, name, x):
        weight = self.state[f"{name}.project_embedding.project.weight"]
        y = F.conv1d(x.transpose(1, 2), weight, self.state[f"{name}.project_embedding.project.bias"]).transpose(1, 2)
        side, d = self.h["side"], self.h["d_model"]
        for token in range(x.shape[1]):
            row, column = divmod(token % side**2, side)
            for i in range(d // 2):
                wave = np.sin if i % 2 == 0 else np.cos
                frequency = 10000 ** (-(i - i % 2) / (d / 2))
                y[:, token, i] += float(wave(column * frequency))
                y[:, token, d // 2 + i] += float(wave(row * frequency))
        return y

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @torch.no_grad()
    def forward(self, x):
        side, half = self.h["side"], window_side((self.h["side"],) * 2) // 2
        length = side * side
        outside = torch.zeros(length, length, dtype=torch.bool)
        for query in range(length):
            for key in range(length):
                far_row = abs(query // side - key // side) > half
                outside[query, key] = far_row or abs(query % side - key % side) > half
        y = self.embed("embedding", x)
        references = self.embed("ref_mca_embedding", self.state["ref_mca"].expand(len(x), -1, -1)).split(length, dim=1)
        for layer in range(self.h["layers"]):
            name = f"encoder.encode_layers.{layer}."
            local = sum(self.attention(name + "mca.", y, r, r, outside) for r in references)
            away = self.attention(name + "nsa.", y, references[-1], y, ~outside)
            z = self.norm(name + "norm1", 2 * local + away)
            y = self.norm(name + "norm2", z + self.linear(name + "ffn.fc2", F.gelu(self.linear(name + "ffn.fc1", z))))
        return self.linear("projection", self.norm("encoder.norm", y))


@pytest.mark.parametrize("references", [1, 3])
def test_several_references_are_summed_and_the_last_is_the_key_as_released(references):
    hparams = {"channels": 6, "side": 8, "d_model": 16, "heads": 2, "layers": 2, "fusion": "alpha"}
    hparams["references"] = references
    draws = torch.Generator().manual_seed(0)
    shapes = released_shapes(hparams)
    state = {f"m.{name}": parameter(name, torch.randn(shape, generator=draws)) for name, shape in shapes.items()}
    network = network_of(hparams)
    load_released(network, state)
    tokens = torch.randn(2, 64, 6, generator=draws)
    expected = Spelled({k.removeprefix("m."): v for k, v in state.items()}, hparams)(tokens)
    with torch.no_grad():
        found = network(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Counts and facts


def test_the_published_setting_has_the_published_number_of_parameters():
    network = RLRNetwork((72, 200), ((32, 32), (16, 16)))
    counts = [sum(p.numel() for p in level.parameters()) for level in network.levels]
    assert counts == [4_341_832, 17_172_680]
    assert [tuple(level.reference.shape) for level in network.levels] == [(1, 1024, 72), (1, 256, 200)]
    assert not [name for name, _ in network.named_buffers() if name in network.state_dict()]


def test_theta_adds_one_scalar_per_layer_and_attention():
    with_theta, without = small(layers=4, fusion="theta"), small(layers=4)
    assert sum(p.numel() for p in with_theta.parameters()) - sum(p.numel() for p in without.parameters()) == 4 * 2


@pytest.mark.parametrize(("stride", "width"), [(4, 128), (8, 256), (16, 512)])
def test_widths_follow_the_released_rule(stride, width):
    assert released_width(stride) == width


@pytest.mark.parametrize(("side", "window", "centre", "corner"), [(16, 5, 25, 9), (32, 7, 49, 16), (64, 11, 121, 36)])
def test_every_released_grid_has_the_released_window_and_key_counts(side, window, centre, corner):
    assert window_side((side, side)) == window
    inside, outside = (
        WindowAttention((side, side), window, flag, block_rows=side).strip == 0 for flag in (True, False)
    )
    middle = side // 2 * side + side // 2
    assert inside[middle].sum() == centre
    assert inside[middle, middle]
    assert inside[0].sum() == corner
    assert outside[middle].sum() == side * side - centre
    assert torch.equal(inside, ~outside)
    assert torch.equal(inside, window_mask((side, side), window))
    assert torch.equal(outside, neighbor_mask((side, side), window))


@pytest.mark.parametrize("side", range(4, 130))
def test_any_grid_gets_an_odd_window_that_leaves_something_outside(side):
    window = window_side((side, side + 3))
    assert window % 2 == 1
    assert window >= 3
    assert window // 2 < side // 2


def test_the_sine_code_counts_columns_first():
    network = small(size=(4, 6), width=16)
    code = network.embedding.position.reshape(4, 6, 16)
    assert torch.allclose(code[2, :, 0], torch.arange(6.0).sin(), atol=1e-6)
    assert torch.allclose(code[:, 3, 8], torch.arange(4.0).sin(), atol=1e-6)


# Blocked attention


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("size", "rows"), [((9, 7), 1), ((9, 7), 4), ((8, 8), 4), ((12, 5), 11)])
def test_attention_in_blocks_of_rows_equals_dense_attention(size, rows, inside):
    torch.manual_seed(0)
    heads = torch.randn(3, 2, 2, size[0] * size[1], 4, dtype=torch.float64)
    dense, blocked = (WindowAttention(size, 5, inside, block_rows=b).double() for b in (size[0], rows))
    mask = window_mask(size, 5)
    reference = F.scaled_dot_product_attention(*heads, attn_mask=mask if inside else ~mask)
    assert torch.allclose(dense(*heads), reference, atol=1e-12)
    assert torch.allclose(blocked(*heads), reference, atol=1e-12)


def test_a_64x64_level_never_holds_a_4096x4096_mask():
    network = LevelNetwork(4, (64, 64), 16, window_side((64, 64)), layers=1, heads=2)
    held = sum(buffer.numel() for name, buffer in network.named_buffers() if "strip" in name)
    assert held < 0.3 * 4096 * 4096
    assert network(torch.randn(1, 4096, 4)).isfinite().all()


# What no anomaly may pass: the paths through a layer


def test_no_residual_carries_a_token_to_its_own_place():
    network = small(layers=1)
    tokens = torch.randn(1, 30, 6, requires_grad=True)
    # The query does see its own token, so routing is frozen here: with constant queries only values carry content.
    lca, mlka = network.layers[0].attention["lca"], network.layers[0].attention["mlka"]
    with torch.no_grad():
        for attention in (lca, mlka):
            attention.in_proj_weight[:16] = 0
    middle = 2 * 5 + 2
    network(tokens)[0, middle].sum().backward()
    touched = tokens.grad[0].abs().sum(-1).reshape(6, 5) > 0
    near = torch.zeros(6, 5, dtype=torch.bool)
    near[1:4, 1:4] = True
    assert not touched[near].any()
    assert touched[~near].all()


@pytest.mark.parametrize(("key", "read"), [("last", [2]), ("first", [0]), ("mean", [0, 1, 2])])
def test_with_several_references_mlka_reads_the_one_that_is_named(key, read):
    network = small(references=3, key_reference=key)
    with torch.no_grad():
        for layer in network.layers:
            layer.attention["lca"].out_proj.weight.zero_()
    network(torch.randn(2, 30, 6)).square().sum().backward()
    reached = [index for index, grad in enumerate(network.reference.grad[0].split(30)) if grad.abs().sum() > 0]
    assert reached == read


def test_every_reference_learns_through_lca():
    network = small(references=3)
    network(torch.randn(2, 30, 6)).square().sum().backward()
    assert all(grad.abs().sum() > 0 for grad in network.reference.grad[0].split(30))


# Fusion


def test_theta_started_at_alpha_is_the_constant_model_and_started_at_one_is_alpha_one():
    tokens = torch.randn(2, 30, 6)
    state = small().state_dict()

    def output(**options) -> torch.Tensor:
        network = small(**options)
        network.load_state_dict(state, strict=False)
        return network(tokens)

    assert torch.equal(output(fusion="theta_from_alpha"), output(fusion="alpha"))
    assert torch.equal(output(fusion="theta"), output(fusion="alpha", alpha=1.0))
    assert not torch.allclose(output(fusion="theta"), output(fusion="alpha"))


def test_the_gate_weighs_each_sample_by_itself_and_its_weights_sum_to_one():
    network = small(fusion="gate_net", blocks=("lca", "mlka", "sa"))
    tokens = torch.randn(3, 30, 6)
    weights = network.fusion(0, network.embedding(tokens))
    assert weights.shape == (3, 3, 1, 1)
    assert torch.allclose(weights.sum(0), torch.ones(3, 1, 1))
    assert torch.allclose(network(tokens)[1:2], network(tokens[1:2]), atol=1e-6)


@pytest.mark.parametrize("blocks", [("lca",), ("mlka",), ("ca", "msa"), ("msa",), ("sa",), ("sa", "mlka", "lca", "ca")])
def test_every_choice_of_blocks_trains_all_its_parameters(blocks):
    network = small(blocks=blocks)
    assert (network.reference is None) == (not set(blocks) & {"lca", "ca", "mlka"})
    network(torch.randn(2, 30, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_alpha_multiplies_the_cross_attentions_only():
    weights = small(blocks=("sa", "mlka", "ca", "lca"), alpha=3.0).fusion(0, torch.empty(0))
    assert weights.tolist() == [3.0, 3.0, 1.0, 1.0]


# Diversity


def test_diversity_is_the_mean_cosine_over_pairs_and_half_of_it_as_released():
    network = small(references=3)
    r = network.reference.detach().reshape(3, 30, 6).numpy()
    cosines = [
        np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(r[i], r[j], strict=True)])
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert network.diversity("pairs").item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert network.diversity("released").item() == pytest.approx(np.mean(cosines) / 2, abs=1e-6)
    assert small().diversity().item() == 0


# The whole network


def test_targets_are_the_pooled_clean_features_also_while_the_input_is_corrupted():
    network = RLRNetwork((3, 5), ((8, 8), (4, 4)), widths=(16, 16), layers=1, heads=2)
    features = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    pairs = network.train()(features)
    for feature, pair in zip(features, pairs, strict=True):
        padded = F.pad(feature, (1, 1, 1, 1))
        expected = sum(
            padded[:, :, i : i + feature.shape[2], j : j + feature.shape[3]] for i in range(3) for j in range(3)
        )
        assert torch.allclose(pair.target, expected / 9, atol=1e-6)
        assert pair.reconstruction.shape == feature.shape
    network.eval()
    assert torch.equal(network(features)[0].reconstruction, network(features)[0].reconstruction)
    assert not torch.equal(network.train()(features)[0].reconstruction, network(features)[0].reconstruction)


def test_levels_share_nothing():
    network = RLRNetwork((3, 5), ((8, 8), (4, 4)), widths=(16, 16), layers=1, heads=2)
    pairs = network([torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)])
    level_loss(pairs[0]).backward()
    assert all(p.grad is not None for p in network.levels[0].parameters())
    assert all(p.grad is None for p in network.levels[1].parameters())


def test_the_default_widths_are_the_released_ones_for_three_levels_and_other_image_sizes():
    for sizes in (((64, 64), (32, 32), (16, 16)), ((56, 84), (28, 42), (14, 21)), ((57, 57), (29, 29), (15, 15))):
        network = RLRNetwork((2, 2, 2), sizes, layers=1)
        assert [level.projection.in_features for level in network.levels] == [128, 256, 512]


def test_jitter_has_the_stated_size_and_leaves_the_stated_share_alone():
    torch.manual_seed(0)
    tokens = torch.randn(4, 500, 32)
    noise = feature_jitter(tokens, scale=4, probability=0.7) - tokens
    still = (noise == 0).all(-1)
    assert still.sum(1).tolist() == [150] * 4
    measured = (noise[~still] / (4 * tokens.norm(dim=-1) / 32)[~still][:, None]).std().item()
    assert measured == pytest.approx(1, abs=0.02)


def test_masking_zeroes_the_stated_share_of_each_sample():
    masked = token_masking(torch.randn(3, 100, 4), 0.25)
    assert (masked == 0).all(-1).sum(1).tolist() == [25] * 3


def test_the_loss_is_mse_plus_one_minus_cosine():
    torch.manual_seed(0)
    target, reconstruction = torch.randn(2, 2, 3, 4, 4).unbind()
    a, b = target.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), reconstruction.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = ((a - b) ** 2).mean() + (1 - cosine).mean()
    assert level_loss(Pair(target, reconstruction)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 11}, "covers all of it"),
        ({"window": 4}, "odd"),
        ({"blocks": ("lca", "nsa")}, "lca, ca, msa, mlka, sa"),
        ({"blocks": ()}, "one or more"),
        ({"references": 2, "blocks": ("mlka",)}, "needs lca"),
        ({"references": 0}, "at least 1"),
        ({"fusion": "beta"}, "alpha, theta, theta_from_alpha, gate_net"),
        ({"key_reference": "all"}, "last, first, mean"),
        ({"width": 18}, "multiple"),
    ],
)
def test_an_impossible_level_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16,)}, "widths has 1"),
        ({"corruption": "masking"}, "every token"),
        ({"corruption": "noise"}, "jitter, masking or none"),
        ({"corruption_probability": 1.5}, "from 0 to 1"),
    ],
)
def test_an_impossible_network_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        RLRNetwork((3, 5), ((8, 8), (4, 4)), **options)
