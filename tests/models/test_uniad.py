import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from models.head import AnomalyHead
from models.layers.jitter import FeatureJitter
from models.released import load_released
from models.shortcut import shortcut_network
from models.uniad import UniAD

CHANNELS = [24, 32, 56, 160]
SIZES = [(112, 112), (56, 56), (28, 28), (14, 14)]


def small(**options) -> UniAD:
    torch.manual_seed(0)
    defaults = {"d_model": 16, "heads": 4, "feedforward": 24, "encoder_layers": 2, "decoder_layers": 2}
    return UniAD([5, 7], [(10, 12), (5, 6)], **{"neighbor_size": 3, **defaults, **options})


def features(batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in ((5, (10, 12)), (7, (5, 6)))]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parity("uniad")
def test_numbers_equal_the_released_code(case, assert_parity):
    options = case.hparams
    height, width = options["feature_size"]
    places = [place for place, on in zip(("encoder", "decoder1", "decoder2"), options["mask"], strict=True) if on]
    neighbor_size = options["neighbor_size"]
    network = UniAD(
        [options["channels"]],
        [(height, width)],
        neighbor_size=None if neighbor_size is None else tuple(neighbor_size),
        mask_places=places,
        position=options["position"],
    ).eval()
    shapes = case.key_shapes()
    for name, shape in shapes.items():  # what depends on the case's grid and channels
        if name.endswith("learned_embed.weight"):
            shape[0] = height * width
        elif name.endswith("row_embed.weight"):
            shape[0] = height
        elif name.endswith("col_embed.weight"):
            shape[0] = width
        elif name == "input_proj.weight":
            shape[1] = options["channels"]
        elif name.startswith("output_proj"):
            shape[0] = options["channels"]

    def rule(name: str, normals: torch.Tensor) -> torch.Tensor:
        return 0.05 * normals + float("norm" in name and name.endswith("weight"))

    imported = load_released(network, case.state(shapes, rule))
    assert imported.prefix == case.key_prefix
    assert all("pos_embed" in name for name in imported.unused)
    with torch.no_grad():
        pairs = network([case.input_tensor()])
        maps = AnomalyHead()(pairs, (16 * height, 16 * width)).maps
    assert_parity(pairs[0].reconstruction, case.arrays["feature_rec"])
    assert_parity(maps[:, None], case.arrays["pred"])


# An independent reading of the method in NumPy, for what no recording covers.


def linear(x, layer):
    return x @ layer.weight.numpy().T + layer.bias.numpy()


def layer_norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer.weight.numpy() + layer.bias.numpy()


def attend(layer, q, k, v, visible):
    d = q.shape[-1]
    weight, bias = layer.in_proj_weight.numpy(), layer.in_proj_bias.numpy()
    q, k, v = (x @ weight[i * d : (i + 1) * d].T + bias[i * d : (i + 1) * d] for i, x in enumerate((q, k, v)))
    out = np.empty_like(q)
    size = d // layer.heads
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        for sample in range(len(q)):
            logits = q[sample, :, part] @ k[sample, :, part].T / np.sqrt(size)
            out[sample, :, part] = special.softmax(np.where(visible, logits, -np.inf), axis=-1) @ v[sample, :, part]
    return linear(out, layer.out_proj)


def feedforward(x, layer):
    return linear(np.maximum(linear(x, layer.linear1), 0), layer.linear2)


def visible_keys(height, width, half):
    visible = np.ones((height * width, height * width), bool)
    for r in range(height):
        for c in range(width):
            for r2 in range(height):
                for c2 in range(width):
                    if abs(r - r2) <= half and abs(c - c2) <= half:
                        visible[r * width + c, r2 * width + c2] = False
    return visible


def reference_forward(network: UniAD, tokens: np.ndarray, half: int | None) -> np.ndarray:
    height, width = network.grid
    everything = np.ones((height * width, height * width), bool)
    masks = [
        visible_keys(height, width, half) if half is not None and place in network.mask_places else everything
        for place in ("encoder", "decoder1", "decoder2")
    ]
    p = network.position().numpy()
    x = linear(tokens, network.input_projection)
    for layer in network.encoder:
        x = layer_norm(x + attend(layer.attention, x + p, x + p, x, masks[0]), layer.norm1)
        x = layer_norm(x + feedforward(x, layer.feedforward), layer.norm2)
    memory = output = x
    if network.query == "first":
        output = np.broadcast_to(network.first_query.numpy(), memory.shape)
    for layer in network.decoder:
        if network.query == "layerwise":
            t = np.broadcast_to(layer.query.numpy(), memory.shape)
            t = layer_norm(t + attend(layer.attention1, t + p, memory + p, memory, masks[1]), layer.norm1)
            t = layer_norm(t + attend(layer.attention2, t + p, output + p, output, masks[2]), layer.norm2)
        else:
            t = output
            t = layer_norm(t + attend(layer.attention1, t + p, t + p, t, masks[1]), layer.norm1)
            t = layer_norm(t + attend(layer.attention2, t + p, memory + p, memory, masks[2]), layer.norm2)
        output = layer_norm(t + feedforward(t, layer.feedforward), layer.norm3)
    return linear(layer_norm(output, network.norm), network.output_projection)


@pytest.mark.parametrize("query", ["none", "first", "layerwise"])
@pytest.mark.parametrize("places", [(), ("encoder",), ("decoder1",), ("decoder2", "encoder")])
@pytest.mark.parametrize("position", ["learned", "sine"])
def test_every_query_and_mask_place_computes_what_it_says_on_a_rectangular_grid(query, places, position):
    network = small(query=query, mask_places=places, position=position).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # equal layers would hide a mix-up
            parameter += 0.1 * torch.randn_like(parameter)
        pair = network(features())[0]
        tokens = pair.target.flatten(2).transpose(1, 2).numpy()
        expected = reference_forward(network, tokens, half=1)
    assert pair.reconstruction.shape == (2, 12, 5, 6)
    np.testing.assert_allclose(pair.reconstruction.flatten(2).transpose(1, 2), expected, atol=2e-5)


def test_parameter_counts_are_the_papers_so_ablations_compare_equal_networks():
    assert parameters(UniAD(CHANNELS, SIZES)) == 7_717_392
    counts = [
        parameters(shortcut_network(kind, CHANNELS, SIZES))
        for kind in ("mlp", "cnn", "transformer_one_query", "transformer_no_query")
    ]
    assert counts == [7_403_024, 7_227_152, 7_566_864, 7_516_688]


def test_initialisation_is_the_released_one():
    network = UniAD(CHANNELS, SIZES)
    first, second = network.decoder[0], network.decoder[1]
    for one, other in ((first, second), (first, network.decoder[3])):
        assert torch.equal(one.query, other.query)
        assert torch.equal(one.attention1.in_proj_weight, other.attention1.in_proj_weight)
        assert torch.equal(one.attention2.in_proj_weight, other.attention2.in_proj_weight)
        assert not torch.equal(one.attention1.out_proj.weight, other.attention1.out_proj.weight)
        assert not torch.equal(one.feedforward.linear1.weight, other.feedforward.linear1.weight)
    assert not torch.equal(first.attention1.in_proj_weight, first.attention2.in_proj_weight)
    assert torch.equal(network.encoder[0].attention.in_proj_weight, network.encoder[3].attention.in_proj_weight)

    def bound(weight):
        return weight.detach().abs().max().item()

    assert bound(first.attention1.in_proj_weight) == pytest.approx((6 / 1024) ** 0.5, rel=1e-3)
    assert bound(first.attention1.out_proj.weight) == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
    assert bound(first.feedforward.linear1.weight) == pytest.approx((6 / 1280) ** 0.5, rel=1e-3)
    assert bound(network.input_projection.weight) == pytest.approx((6 / 528) ** 0.5, rel=1e-3)
    assert first.query.std().item() == pytest.approx(1, abs=0.02)
    assert 0 <= network.position.row_embed.weight.min() < 0.01
    assert 0.99 < network.position.col_embed.weight.max() < 1
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()


def test_learned_position_is_column_part_then_row_part():
    network = small()
    code = network.position().detach()
    row, column = 3, 4
    expected = torch.cat([network.position.col_embed.weight[column], network.position.row_embed.weight[row]])
    torch.testing.assert_close(code[row * 6 + column], expected.detach())


def test_jitter_has_the_papers_strength_and_only_in_training():
    torch.manual_seed(0)
    jitter = FeatureJitter(scale=20.0)
    tokens = torch.randn(8, 196, 272) * torch.rand(8, 196, 1)
    noise = jitter(tokens) - tokens
    ratio = (noise.norm(dim=-1) / tokens.norm(dim=-1)).mean().item()
    assert ratio == pytest.approx(20 / 272**0.5, rel=0.01)  # 1.21
    assert jitter.eval()(tokens) is tokens


def test_jitter_probability_is_one_draw_per_batch():
    torch.manual_seed(0)
    jitter = FeatureJitter(scale=20.0, probability=0.3)
    tokens = torch.ones(4, 3, 8)
    hit = [(jitter(tokens) != tokens).all(dim=(1, 2)) for _ in range(400)]
    assert all(each.all() or not each.any() for each in hit)
    assert np.mean([each.all() for each in hit]) == pytest.approx(0.3, abs=0.06)
    assert FeatureJitter(20.0, 0.0)(tokens) is tokens


def test_jitter_along_the_channels_of_a_map_is_the_same_rule():
    torch.manual_seed(0)
    maps = torch.randn(4, 48, 10, 10)
    noise = FeatureJitter(20.0, dim=1)(maps) - maps
    assert (noise.norm(dim=1) / maps.norm(dim=1)).mean().item() == pytest.approx(20 / 48**0.5, rel=0.02)


def test_target_stays_clean_and_eval_is_deterministic():
    network = small().train()
    clean, noisy = network(features())[0], network(features())[0]
    torch.testing.assert_close(clean.target, noisy.target)
    assert not torch.equal(clean.reconstruction, noisy.reconstruction)
    network.eval()
    torch.testing.assert_close(network(features())[0].reconstruction, network(features())[0].reconstruction)


def test_every_parameter_is_trained():
    for query in ("none", "first", "layerwise"):
        network = small(query=query)
        pair = network(features())[0]
        (pair.reconstruction - pair.target).square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_mixed_precision_reconstructs_the_same_within_its_precision():
    network = small().eval()
    exact = network(features())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(features())[0]
    assert torch.equal(mixed.target, exact.target)
    torch.testing.assert_close(mixed.reconstruction.float(), exact.reconstruction, atol=0.1, rtol=0.1)


def test_masks_and_codes_are_buffers_that_do_not_bloat_checkpoints():
    network = small(position="sine")
    assert not any("mask" in name or "position" in name for name in network.state_dict())
    assert {"mask", "position.code"} <= {name for name, _ in network.named_buffers()}


def test_a_neighbourhood_that_hides_everything_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"5x6 hides every token from 2 of the 30 positions of a 5x6 grid"):
        small(neighbor_size=(5, 6))
    small(neighbor_size=11, mask_places=())  # no mask, nothing to refuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "layer-wise"}, "query names"),
        ({"position": "sin"}, "position names"),
        ({"mask_places": ("decoder",)}, "mask_places names"),
        ({"heads": 5}, "heads must divide"),
        ({"decoder_layers": 0}, "at least one decoder layer"),
        ({"jitter_scale": -1.0}, "scale must not be negative"),
        ({"jitter_probability": 1.5}, "probability must lie in"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer_one_query", "transformer_no_query"])
def test_shortcut_networks_keep_the_grid_and_take_the_controls(kind):
    torch.manual_seed(0)
    options = {"dropout": 0.0} if kind.startswith("transformer") else {}
    network = shortcut_network(kind, [4, 4], [(6, 8), (3, 4)], hidden=8, **options).train()
    inputs = [torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 4)]
    pair = network(inputs)[0]
    assert pair.target.shape == pair.reconstruction.shape == (2, 8, 3, 4)
    torch.testing.assert_close(pair.reconstruction, network(inputs)[0].reconstruction)  # neither dropout nor jitter
    jittered = shortcut_network(kind, [4, 4], [(6, 8), (3, 4)], hidden=8, jitter_scale=20.0, **options).train()
    assert not torch.equal(jittered(inputs)[0].reconstruction, jittered(inputs)[0].reconstruction)


def test_mlp_sees_one_token_and_cnn_its_surroundings():
    reach = {"mlp": 1, "cnn": 9 * 9}
    for kind, count in reach.items():
        torch.manual_seed(0)
        network = shortcut_network(kind, [4], [(11, 11)], hidden=16)
        image = torch.randn(1, 4, 11, 11, requires_grad=True)
        network([image])[0].reconstruction[0, :, 5, 5].sum().backward()
        assert 0 < int((image.grad.abs().sum(1) > 0).sum()) <= count
        assert (image.grad[0, :, 5, 5] != 0).any()


def test_shortcut_networks_that_cannot_show_the_shortcut_are_refused():
    with pytest.raises(ValueError, match="identity"):
        shortcut_network("mlp", CHANNELS, SIZES, hidden=128)
    with pytest.raises(ValueError, match="has no dropout"):
        shortcut_network("cnn", CHANNELS, SIZES, dropout=0.1)
    with pytest.raises(ValueError, match="no shortcut network"):
        shortcut_network("rnn", CHANNELS, SIZES)
