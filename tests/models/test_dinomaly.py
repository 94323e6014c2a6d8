import math

import pytest
import torch
from torch.nn import functional as F

from models.dinomaly import Dinomaly
from models.layers.blur import GaussianBlur
from models.layers.groups import layer_groups
from models.layers.linear_attention import linear_attention
from models.layers.mining import (
    global_cosine,
    hard_mining_scale,
    mined_cosine_loss,
    mining_share,
    scale_gradient,
    soft_mining_scale,
)
from models.optimizers import StableAdamW, WarmCosine
from models.reconstruction import Pair


def small(**options) -> Dinomaly:
    torch.manual_seed(0)
    options = {"prefix_tokens": 3, "heads": 2, "dropout": 0.0} | options
    return Dinomaly([8] * 4, [(3, 4)] * 4, **options)


def levels(prefix: int = 3, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 8, 3, 4)] * 4 + ([(batch, 8, 1, prefix)] * 4 if prefix else [])
    return [torch.randn(shape, generator=generator) for shape in shapes]


# network


def test_linear_attention_is_its_definition_token_by_token():
    query, key, value = torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    found = linear_attention(query, key, value)
    for b, h, i in [(0, 0, 0), (1, 2, 4)]:
        weights = torch.stack([(F.elu(query[b, h, i]) + 1) @ (F.elu(key[b, h, j]) + 1) for j in range(5)])
        torch.testing.assert_close(found[b, h, i], (weights / weights.sum()) @ value[b, h])
    everything = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(linear_attention(query, key, value, everything), found)


def test_grids_that_are_not_square_come_back_in_their_shape_and_in_row_major_order():
    pairs = small()(small().prepare(levels()))
    assert [tuple(pair.target.shape) for pair in pairs] == [(2, 8, 3, 4)] * 2
    assert [tuple(pair.reconstruction.shape) for pair in pairs] == [(2, 8, 3, 4)] * 2
    torch.testing.assert_close(pairs[0].target, (levels()[0] + levels()[1]) / 2)


def test_class_and_register_tokens_take_part_unless_they_are_left_out():
    features = levels()
    moved = features[:4] + [tokens + 1 for tokens in features[4:]]
    for patches_only in (False, True):
        network = small(patch_tokens_only=patches_only).eval()
        torch.nn.init.normal_(network.decoder[0].attention.qkv.weight)
        torch.nn.init.normal_(network.decoder[0].attention.proj.weight)
        one, other = (network(network.prepare(f))[0].reconstruction for f in (features, moved))
        assert torch.equal(one, other) == patches_only
    without = small(prefix_tokens=0)
    assert len(without(without.prepare(levels(prefix=0)))) == 2


def test_groups_of_unequal_size_still_feed_the_mean_of_all_levels_to_the_bottleneck():
    equal, unequal = small(groups=1), small(groups=[[0], [1, 2, 3]])
    seen = []
    for network in (equal, unequal):
        network.bottleneck.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        network(network.prepare(levels()))
    torch.testing.assert_close(seen[0], seen[1])
    assert [len(network.prepare(levels())) for network in (equal, unequal)] == [2, 6]
    assert equal.preparation != unequal.preparation  # else one's cached features would be read for the other


def test_the_last_block_answers_for_the_first_level():
    network = small(groups=4).eval()
    outputs = []
    for block in network.decoder:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    pairs = network(network.prepare(levels()))
    for pair, output in zip(pairs, outputs[::-1], strict=True):
        torch.testing.assert_close(pair.reconstruction.flatten(2).transpose(1, 2), output[:, 3:])


def test_recentering_takes_the_class_token_off_the_target_only():
    plain, recentred = small().eval(), small(recenter=True).eval()
    features = plain.prepare(levels())
    (one, _), (other, _) = plain(features), recentred(features)
    assert torch.equal(one.reconstruction, other.reconstruction)
    assert other.target.mean(dim=1).abs().max() < 1e-6
    patches = one.target - features[2][:, :, :, :1]
    cosine = F.cosine_similarity(patches - patches.mean(dim=1, keepdim=True), other.target, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "does not divide the 4 layers"),
        ({"groups": [[0, 4]]}, "positions 0 to 3"),
        ({"groups": [[0, 0]]}, "different layer positions"),
        ({"heads": 3}, "must divide the token width 8, found 3"),
        ({"attention": "relu"}, "linear, softmax"),
        ({"prefix_tokens": 0, "recenter": True}, "class token"),
        ({"neighbor_size": 9}, "hides every token"),
        ({"narrow": 0}, "found 0"),
        ({"attention_epsilon": -1.0}, "attention_epsilon must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_convolutional_levels_of_different_size_are_refused_with_the_name_of_a_backbone_that_fits():
    with pytest.raises(ValueError, match=r"vit_base_patch14_reg4_dinov2"):
        Dinomaly([24, 40], [(32, 32), (16, 16)])
    with pytest.raises(ValueError, match="another configuration's cached features"):
        small()(levels())


def test_layer_groups_name_every_published_variant():
    assert layer_groups(2, 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layer_groups(8, 8) == tuple((layer,) for layer in range(8))
    assert layer_groups([[7]], 8) == ((7,),)


# losses


def pair() -> Pair:
    target, reconstruction = torch.randn(2, 2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    return Pair(target, reconstruction.requires_grad_())


def test_mining_changes_the_gradient_and_not_one_bit_of_the_loss():
    target, reconstruction = pair()
    scale = torch.rand(2, 3, 3)
    plain = global_cosine(target, reconstruction)
    mined = mined_cosine_loss([Pair(target, reconstruction)], [scale])
    assert torch.equal(plain, mined)
    (gradient,) = torch.autograd.grad(plain, reconstruction)
    (scaled,) = torch.autograd.grad(mined, reconstruction)
    torch.testing.assert_close(scaled, gradient * scale[:, None])


def test_three_of_four_positions_get_a_tenth_of_their_gradient_over_the_whole_batch():
    distance = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0))
    scale = hard_mining_scale(distance, 0.75, 0.1)
    assert (scale == 1).sum() == 25
    assert scale[distance >= distance.flatten().sort().values[-25]].eq(1).all()
    assert torch.allclose(scale[distance < distance.flatten().sort().values[-25]], torch.tensor(0.1))
    assert hard_mining_scale(distance, 0.0, 0.1).eq(1).all()
    assert (hard_mining_scale(distance[:1, :2, :2], 0.9, 0.1) == 1).sum() == 1  # int(0.4) would keep none
    with pytest.raises(ValueError, match=r"found 1\.5"):
        hard_mining_scale(distance, 1.5, 0.1)


def test_the_share_grows_from_nothing_to_nine_tenths_in_a_thousand_steps():
    assert [mining_share(step) for step in (0, 500, 1000, 9999)] == [0.0, 0.45, 0.9, 0.9]
    assert mining_share(0, 0.5, steps=0) == 0.5


def test_soft_mining_weighs_a_position_by_the_third_power_of_its_relative_distance():
    distance = torch.tensor([[[1.0, 1.0], [1.0, 5.0]]])
    torch.testing.assert_close(soft_mining_scale(distance, 3), (distance / 2) ** 3)
    assert soft_mining_scale(distance, 0).eq(1).all()


def test_soft_mining_stays_finite_where_rounding_puts_a_distance_below_zero_or_all_are_zero():
    distance = torch.tensor([[[-5e-7, 1.0]]])
    torch.testing.assert_close(soft_mining_scale(distance, 0.5), torch.tensor([[[0.0, math.sqrt(2)]]]))
    assert soft_mining_scale(torch.zeros(1, 2, 2), 3).eq(0).all()


def test_gradient_scaling_keeps_values_that_rounding_would_change():
    values = torch.rand(1000) * 1e3
    assert torch.equal(scale_gradient(values, torch.rand(1000)), values)


# optimiser and schedule


def reference_step(p, g, state, *, lr, betas=(0.9, 0.999), eps=1e-10, decay=1e-4, amsgrad=True):
    """One tensor, float64, in the words of the specification."""
    state["t"] += 1
    p = p * (1 - lr * decay)
    state["m"] = betas[0] * state["m"] + (1 - betas[0]) * g
    state["v"] = betas[1] * state["v"] + (1 - betas[1]) * g * g
    state["max"] = torch.maximum(state["max"], state["v"]) if amsgrad else state["v"]
    denominator = state["max"].sqrt() / math.sqrt(1 - betas[1] ** state["t"]) + eps
    shortening = max(1.0, (g / denominator).square().mean().sqrt().item())
    return p - lr / (1 - betas[0] ** state["t"]) / shortening * state["m"] / denominator


@pytest.mark.parametrize("amsgrad", [True, False])
def test_many_tensors_are_moved_as_one_by_one_also_after_saving_and_loading(amsgrad):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), ())]
    expected = [value.clone() for value in values]
    states = [{"t": 0, "m": 0 * v, "v": 0 * v, "max": 0 * v} for v in values]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = StableAdamW(parameters, amsgrad=amsgrad)
    for step in range(12):
        if step == 6:
            saved = optimizer.state_dict()
            optimizer = StableAdamW(parameters, amsgrad=amsgrad)
            optimizer.load_state_dict(saved)
        for n, parameter in enumerate(parameters):
            if n == 1 and step < 3:
                parameter.grad = None  # a tensor that joins later has its own count of steps
                continue
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 4)
            expected[n] = reference_step(expected[n], parameter.grad, states[n], lr=2e-3, amsgrad=amsgrad)
        optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)


def test_a_step_with_a_broken_gradient_can_be_left_out():
    for skip in (True, False):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = StableAdamW([parameter], skip_nonfinite=skip)
        parameter.grad = torch.tensor([1.0, float("nan"), 1.0])
        optimizer.step()
        assert parameter.isfinite().all() == skip
        assert bool(optimizer.state) != skip


def test_stable_adamw_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="clip_threshold=0"):
        StableAdamW([torch.nn.Parameter(torch.ones(1))], clip_threshold=0)


def test_warm_cosine_starts_at_nothing_peaks_at_the_end_of_the_warm_up_and_ends_at_its_tenth():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-3)
    schedule = WarmCosine(optimizer, total_steps=10_000)
    rates = [schedule.factor(step) * 2e-3 for step in range(10_001)]
    assert optimizer.param_groups[0]["lr"] == 0
    assert rates[99] == rates[100] == max(rates) == 2e-3
    assert rates[5050] == pytest.approx(1.1e-3)
    assert rates[-1] == pytest.approx(2e-4)
    assert {WarmCosine(optimizer, 200, final_ratio=1.0).factor(step) for step in range(100, 300)} == {1.0}
    with pytest.raises(ValueError, match="warmup_steps=100 of total_steps=20"):
        WarmCosine(optimizer, 20)


# maps


def test_blur_with_zeros_outside_darkens_the_border_as_a_padded_convolution_does():
    blur = GaussianBlur(4.0, 5, border="zeros")
    images = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(0))
    kernel = torch.outer(blur.taps, blur.taps)[None, None]
    torch.testing.assert_close(blur(images), F.conv2d(images, kernel, padding=2))
