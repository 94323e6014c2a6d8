"""RD4AD must compute and train as the authors' released code does, from their own parameter names."""

import pytest
import torch

from models.head import AnomalyHead, HeadConfig
from models.rd4ad import RD4AD, cosine_loss, released_name
from models.released import load_released

pytestmark = pytest.mark.parity("rd4ad")


def network(case) -> RD4AD:
    hparams, features = case.hparams, inputs(case)
    net = RD4AD(
        hparams["level_channels"],
        [tuple(level.shape[-2:]) for level in features],
        block=hparams["block"],
        width_per_group=hparams["width_per_group"],
        embedding_blocks=hparams["ocbe_blocks"],
        decoder_blocks=hparams["decoder_blocks"],
    )
    state = case.tensors(f"state.{case.key_prefix}")
    unused = [name for name in load_released(net, state).unused if "num_batches_tracked" not in name]
    expected = {name for name in state if ".conv4." in name or (".bn4." in name and "num_batches" not in name)}
    assert set(unused) == expected
    assert set(case.hparams["unused_parameters"]) <= expected
    return net


def inputs(case) -> list[torch.Tensor]:
    return [case.tensor(f"input.{level}") for level in range(len(case.input["shape"]))]


def trained(case, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Losses, first gradients and running statistics of the recorded steps; with a seed from inputs changed by 1e-7."""
    net, features = network(case).train(), inputs(case)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        features = [level * (1 + 1e-7 * torch.randn(level.shape, generator=generator)) for level in features]
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.5, 0.999))
    losses, found = [], {}
    for step in range(len(case.arrays["train_losses"])):
        loss = cosine_loss(net(features))
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in net.named_parameters():
                found[f"grad.{name}"] = parameter.grad.clone()
            for name, value in net.state_dict().items():
                found[f"after.{name}"] = value.clone()
        optimizer.step()
    return {"train_losses": torch.stack(losses), **found}


def test_the_folder_has_a_case_for_rd4ad(parity_cases):
    assert parity_cases("rd4ad")


def test_outputs_maps_and_scores(case):
    net, features = network(case).eval(), inputs(case)
    ours = sum(p.numel() for p in net.parameters())
    unused = sum(case.arrays[f"state.{name}"].size for name in case.hparams["unused_parameters"])
    assert ours + unused == case.hparams["parameters"]
    with torch.no_grad():
        case.check({"embedding": net.embedding(features)})
        pairs = net(features)
        for level, pair in enumerate(pairs):
            case.check({f"output.{level}": pair.reconstruction})
        case.check({"loss": cosine_loss(pairs)})
    size = case.hparams["image"]
    size = tuple(size) if isinstance(size, list) else (size, size)
    common = {"distance": "cosine", "fusion": "sum", "align_corners": True, "image_score": "max"}
    case.check({"map_raw": AnomalyHead(HeadConfig(**common))(pairs, size).maps})
    for prefix, border in (("", "symmetric"), ("anomalib.", "reflect")):
        config = HeadConfig(**common, smoothing_sigma=case.hparams["sigma"], smoothing_border=border)
        scored = AnomalyHead(config)(pairs, size)
        case.check({f"{prefix}map": scored.maps})
        case.check({f"{prefix}score": scored.image_scores})


def test_first_three_training_steps(case):
    ours = trained(case)
    # Rectifiers switch by rounding, and Adam turns that into steps of full length: an array is compared as closely as
    # this training repeats itself when its inputs change in the last bit. No tighter bound follows from float64: in the
    # bottleneck case a float64 run of this network is 1.1e-2 from the released float32 gradient of the embedding's first
    # convolution and 1.0e-2 from its third loss, so the released numbers themselves are that far from exact (ours in float32:
    # 1.1e-2 and 1.2e-3). In the basic case, where no rectifier switches, all agree within 1e-5.
    others = [trained(case, seed) for seed in range(1, 6)]
    assert case.error(ours["train_losses"][:1], case.arrays["train_losses"][:1]) <= 1e-4
    for name, expected in case.tensors().items():
        kind, _, parameter = name.partition(".")
        if kind in ("train_losses", "grad", "after"):
            found = name if not parameter else f"{kind}.{released_name(parameter)}"
            spread = max(float((other[found] - ours[found]).abs().max()) for other in others)
            stated = 2e-3 if kind == "train_losses" else 1e-4
            case.check({name: ours[found]}, max(stated, 2 * spread / float(expected.abs().max())))
