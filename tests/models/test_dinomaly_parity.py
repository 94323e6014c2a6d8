"""Dinomaly and Dinomaly2 must compute what the authors' released code computes, from their own parameter names.

Forward pass, maps, score, loss, gradients, encoder, optimiser and schedule. Parameters and inputs are filled by a rule,
so no weight file is needed.
"""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from models.dinomaly import Dinomaly, released_name
from models.layers.mining import hard_mining_scale, mined_cosine_loss, position_distance
from models.optimizers import StableAdamW, WarmCosine
from models.released import load_released
from models.vit_tokens import PrefixGetterNet, use_released_position


def parameter(name: str, values: torch.Tensor) -> torch.Tensor:
    return 0.05 * values + (".norm" in name and name.endswith("weight"))


def linear(name: str, outputs: int, inputs: int) -> dict:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def released_shapes(h: dict) -> dict:
    dim, narrow = h["dim"], h.get("narrow")
    if narrow:
        shapes = linear("bottleneck.0.0", narrow, dim)
        shapes |= linear("bottleneck.1.0", 4 * dim, narrow) | linear("bottleneck.1.3", dim, 4 * dim)
    else:
        shapes = linear("bottleneck.0.fc1", 4 * dim, dim) | linear("bottleneck.0.fc2", dim, 4 * dim)
    for layer in range(h["layers"]):
        for norm in ("norm1", "norm2"):
            shapes |= {f"decoder.{layer}.{norm}.{leaf}": [dim] for leaf in ("weight", "bias")}
        shapes |= linear(f"decoder.{layer}.attn.qkv", 3 * dim, dim) | linear(f"decoder.{layer}.attn.proj", dim, dim)
        shapes |= linear(f"decoder.{layer}.mlp.fc1", 4 * dim, dim) | linear(f"decoder.{layer}.mlp.fc2", dim, 4 * dim)
    return shapes


def levels(case) -> list[torch.Tensor]:
    """Maps (B, C, side, side), then prefix tokens (B, C, 1, P), as the feature extractor gives them."""
    side, tokens = case.hparams["side"], case.layer_tokens()
    prefix = 1 + case.hparams["registers"]
    maps = [t[:, prefix:].transpose(1, 2).unflatten(2, (side, side)) for t in tokens]
    return maps + [t[:, :prefix].transpose(1, 2)[:, :, None] for t in tokens]


def network_of(case) -> Dinomaly:
    h = case.hparams
    network = Dinomaly(
        [h["dim"]] * h["layers"],
        [(h["side"],) * 2] * h["layers"],
        prefix_tokens=1 + h["registers"],
        groups=h["groups"],
        heads=h["heads"],
        attention="softmax" if h["attention"] == "softmax" else "linear",
        neighbor_size=h["neighbor_size"],
        patch_tokens_only=h["patch_tokens_only"],
        dropout=h["dropout"],
        narrow=h.get("narrow"),
        recenter=h.get("recenter", False),
        attention_epsilon=1e-8 if h.get("version") == 2 else 0.0,
    )
    assert not load_released(network, case.state(released_shapes(h), parameter)).unused
    return network.eval()


def check(case, check_decoder):
    h = case.hparams
    network = network_of(case)
    pairs = network(network.prepare(levels(case)))
    scales = [hard_mining_scale(position_distance(pair), h["p"], h["factor"]) for pair in pairs]
    loss = mined_cosine_loss(pairs, scales)
    check_decoder(case, network, released_name, pairs, loss)


@pytest.mark.parity("dinomaly")
def test_dinomaly_gives_the_released_outputs_loss_and_gradients(case, check_decoder):
    check(case, check_decoder)


@pytest.mark.parity("dinomaly2")
def test_dinomaly2_gives_the_released_outputs_loss_and_gradients(case, check_decoder):
    check(case, check_decoder)


@pytest.mark.parity("dinomaly_optimizer")
def test_optimiser_and_schedule_take_the_released_steps(case, assert_parity):
    h, name = case.hparams, f"optimizer:{case.tag}:"
    shapes = dict(zip("pq", case.input["shape"], strict=True))
    parameters = {key: torch.nn.Parameter(case.fill(name + key, shape)) for key, shape in shapes.items()}
    optimizer = StableAdamW(
        list(parameters.values()),
        lr=h["lr"],
        betas=tuple(h["betas"]),
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        amsgrad=h["amsgrad"],
        clip_threshold=h["clip_threshold"],
    )
    schedule = WarmCosine(optimizer, h["total"], h["warmup"], final_ratio=h["final_lr"] / h["lr"])
    scales = case.arrays["scales"]
    recorded = {key: case.arrays[key] for key in ("p", "q", "lr")}
    for step, scale in enumerate(scales):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(recorded["lr"][step], rel=1e-9, abs=1e-15)
        for key, parameter in parameters.items():
            parameter.grad = float(scale) * case.fill(f"{name}g{key}{step}", shapes[key])
        before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        optimizer.step()
        schedule.step()
        for key, parameter in parameters.items():
            assert_parity(parameter, recorded[key][step], tolerance=1e-6)
            if step:  # what was moved, not only where it lies; float32 rounds p by 1e-7 of its value
                moved = recorded[key][step] - recorded[key][step - 1]
                error = np.abs((parameter - before[key]).detach().numpy() - moved).max()
                assert error <= 4e-7 * np.abs(recorded[key][step]).max() + 1e-4 * np.abs(moved).max()


@pytest.mark.parity("dinomaly")
def test_the_cases_shapes_are_those_of_the_released_state_dict(case):
    recorded = case.key_shapes()
    if case.tag in recorded:
        assert {k: list(v) for k, v in recorded[case.tag].items()} == released_shapes(case.hparams)


def test_released_checkpoints_of_all_sizes_load_and_have_the_published_number_of_parameters():
    for width, blocks, narrow, count in (
        (384, 8, None, 15_377_280),
        (768, 8, None, 61_425_408),
        (1024, 8, None, 109_163_520),
        (384, 8, 256, 15_279_232),
        (768, 8, 256, 60_049_408),
        (1024, 8, 256, 106_280_192),
    ):
        with torch.device("meta"):
            network = Dinomaly([width] * blocks, [(28, 28)] * blocks, prefix_tokens=5, narrow=narrow)
        assert sum(parameter.numel() for parameter in network.parameters()) == count
        shapes = released_shapes({"dim": width, "narrow": narrow, "layers": blocks})
        ours = {name: list(value.shape) for name, value in network.state_dict().items()}
        assert {released_name(name): shape for name, shape in shapes.items()} == ours


@pytest.mark.parity("dinomaly_encoder")
def test_the_released_position_codes_and_all_tokens_come_through_timms_encoder(case, assert_parity):
    h = case.hparams
    vit = VisionTransformer(
        img_size=h["native"],
        patch_size=h["patch"],
        embed_dim=h["dim"],
        depth=h["depth"],
        num_heads=h["heads"],
        init_values=1.0,
        reg_tokens=h["registers"],
        no_embed_class=True,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()

    def parameter(name: str, values: torch.Tensor) -> torch.Tensor:
        if name.endswith(("pos_embed", "cls_token", "register_tokens")):
            return values
        if name.endswith("gamma"):
            return 0.5 + 0.05 * values
        return 0.05 * values + (name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")))

    theirs = {"reg_token": "register_tokens"}
    shapes = {name: list(value.shape) for name, value in vit.state_dict().items()}
    shapes["pos_embed"][1] += 1  # DINOv2's own has one for the class token
    released = case.state({theirs.get(name, name): shape for name, shape in shapes.items()}, parameter)
    state = {name: released[case.key_prefix + theirs.get(name, name)] for name in shapes}
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    vit.load_state_dict(state)

    use_released_position(vit, "this one")
    image = case.input_tensor()
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(image))
        getter = PrefixGetterNet(vit, out_indices=tuple(h["record"]))
        levels = getter(image)
    assert_parity(tokens, case.arrays["tokens"])
    count = len(h["record"])
    for block, patches, prefix_tokens in zip(h["record"], levels[:count], levels[count:], strict=True):
        found = torch.cat([t.flatten(2).transpose(1, 2) for t in (prefix_tokens, patches)], dim=1)
        assert_parity(found, case.arrays[f"block{block}"])
