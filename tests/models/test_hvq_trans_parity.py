"""HVQ-Trans must compute what the authors' released code computes, from their own names: outputs, gradients, the codebooks
after a training step, and the step itself.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.head import AnomalyHead
from models.hvq_trans import HVQTrans, released_name
from models.released import load_released

pytestmark = pytest.mark.parity("hvqtrans")

COMMITMENT = 0.25
STEP_TOLERANCE = 2e-3  # differences of float32 weights


def parameter(name: str, values: torch.Tensor) -> torch.Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("embed", "embed_avg"):
        return values
    if leaf == "cluster_size":
        return 1 + values.abs()
    return 0.05 * values + float("norm" in name and leaf == "weight")


def shape_of(name: str, options: dict) -> list[int]:
    """A released tensor's shape under a case's hyperparameters."""
    d, c, k, hidden = (options[key] for key in ("embed_dim", "channels", "codes", "feedforward"))
    width = d if name.startswith(("encoder.", "quantize_list_5")) else 2 * d
    if name.startswith("quantize_list"):
        return [k] if name.endswith("cluster_size") else [width, k]
    if name.startswith("pos_embed"):
        return [options["feature_size"]["col_embed" in name], d // 2]
    if name.startswith("quantize_conv_t"):
        return [d, c, 1, 1] if name.endswith("weight") else [d]
    if name.startswith("input_proj"):
        return [d, c] if name.endswith("weight") else [d]
    if name.startswith("output_proj"):
        return [c, 2 * d] if name.endswith("weight") else [c]
    if "in_proj" in name:
        return [3 * width, width] if name.endswith("weight") else [3 * width]
    if "linear1" in name:
        return [hidden, width] if name.endswith("weight") else [hidden]
    if "linear2" in name:
        return [width, hidden] if name.endswith("weight") else [width]
    return [width, width] if "out_proj.weight" in name else [width]


def kept(name: str, options: dict) -> bool:
    """Whether a released tensor exists in a case of fewer classes or layers."""
    parts = name.split(".")
    if parts[0].startswith(("quantize_list", "output_proj_list")):
        return int(parts[1]) < options["classes"]
    if parts[1:2] == ["layers"]:
        return int(parts[2]) < options[f"{parts[0]}_layers"]
    return True


class Recording:
    """A case, and the network built and loaded as it says."""

    def __init__(self, case, prefix: str | None = None) -> None:
        self.case, options = case, case.hparams
        self.prefix = case.key_prefix if prefix is None else prefix
        self.options = options
        keys = case.tensors("state.")
        if keys:
            self.state = {self.prefix + name: value for name, value in keys.items()}
            self.features, self.labels = case.tensor("input"), case.arrays["labels"].tolist()
        else:
            shapes = {name: shape_of(name, options) for name in case.key_shapes() if kept(name, options)}
            self.state = case.state(shapes, parameter)
            self.features, self.labels = case.input_tensor(), options["labels"]
        self.training = "optimizer" in options
        self.network = HVQTrans(
            [options["channels"]],
            [tuple(options["feature_size"])],
            options["classes"],
            d_model=options["embed_dim"],
            heads=options["heads"],
            feedforward=options["feedforward"],
            encoder_layers=options["encoder_layers"],
            decoder_layers=options["decoder_layers"],
            codes=options["codes"],
            dropout=options.get("dropout", 0.1),
            transport_weight=options["ot_weight"],
        ).train(self.training)
        self.imported = load_released(self.network, self.state)

    def expected(self) -> dict[str, np.ndarray]:
        return {
            name: values
            for name, values in self.case.arrays.items()
            if not name.startswith("state.") and name not in ("input", "labels")
        }


def outputs(recording: Recording) -> dict[str, torch.Tensor]:
    """Everything that a case may have recorded of a forward pass, under its names."""
    network, features, labels = recording.network, recording.features, recording.labels
    tokens = features.flatten(2).transpose(1, 2)
    restored = network([features], labels)
    mse = F.mse_loss(restored.pair.reconstruction, restored.pair.target)
    found = {
        "feature_rec": restored.pair.reconstruction,
        "indices": torch.stack([level.indices for level in restored.levels.values()]),
        "residual": torch.linalg.vector_norm(restored.pair.reconstruction - restored.pair.target, dim=1),
        **{f"latent_{number}": level.commitment for number, level in restored.levels.items()},
        "latent_loss": restored.commitment,
        "feature_loss": mse,
        "loss": mse + COMMITMENT * restored.commitment,
    }
    found["quantized"] = torch.stack([restored.levels[level].tokens for level in sorted(restored.levels)[-2::-1]])
    if network.training:
        return found
    encoded = network.encode(tokens)
    start, memories, _ = network.quantize(encoded, labels)
    size = tuple(16 * side for side in network.grid)
    head, transport = AnomalyHead(), network.transport_maps(restored, labels)

    def image_map(level_map: torch.Tensor) -> torch.Tensor:
        return head.score([level_map], size).maps[:, None]

    pred = image_map(network.distance_map(restored, labels))
    return found | {
        "encoder_levels": torch.stack(encoded),
        "decoded": network.decode(start, memories),
        "ot": transport[0],
        "pred": pred[:, :, ::4, ::4] if recording.case.arrays["pred"].shape != tuple(pred.shape) else pred,
        "pred_without_ot": image_map(found["residual"]),
    }


def steps(recording: Recording, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients, codebooks and the optimiser's step of a training case, under the released names."""
    network, options = recording.network, recording.options
    named, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    found = {}
    for name in recording.state:
        own = released_name(name)
        if own in buffers:
            found[f"after.{name}"] = buffers[own].clone()
    loss.backward()
    ours = {name: own for name in recording.state if (own := released_name(name)) in named}
    for name, own in ours.items():
        if named[own].grad is not None:
            found[f"grad.{name}"] = named[own].grad.reshape(recording.state[name].shape).clone()
    before = {name: named[own].detach().clone() for name, own in ours.items()}
    found["grad_norm"] = torch.nn.utils.clip_grad_norm_(network.parameters(), options["clip_grad_norm"])
    torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4).step()
    for name, own in ours.items():
        found[f"step.{name}"] = (named[own].detach() - before[name]).reshape(recording.state[name].shape)
    return found


def test_released_weights_give_the_released_numbers(case):
    recording = Recording(case)
    found = outputs(recording)
    if recording.training:
        found |= steps(recording, found["loss"])
        without = {name.rsplit(".", 1)[0] if name.startswith("output_proj") else name
                   for name in recording.state if released_name(name) in dict(recording.network.named_parameters())
                   and f"grad.{name}" not in found}  # fmt: skip
        unused = {name for name in case.hparams["parameters_without_gradient"] if not name.startswith("input_proj.")}
        assert without == unused
    worst = {}
    for name, expected in recording.expected().items():
        values = found[name].detach().numpy()
        assert values.shape == expected.shape, name
        if name == "indices":
            np.testing.assert_array_equal(values, expected)
            continue
        # A gradient that is zero but for rounding (the bias of attention's keys) is compared with the largest gradient.
        floor = 1e-6 * max(np.abs(a).max() for n, a in recording.case.arrays.items() if n.startswith("grad.")) \
            if name.startswith("grad.") else 1e-30  # fmt: skip
        error = np.abs(values - expected).max() / max(np.abs(expected).max(), floor)
        kind = name.split(".")[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
        assert error <= (STEP_TOLERANCE if kind == "step" else 1e-4), f"{name}: {error:.2e}"
    print(recording.case.tag, {kind: f"{error:.1e}" for kind, error in worst.items()})
    assert [
        name for name in recording.imported.unused if not name.removeprefix(recording.prefix).startswith("input_proj.")
    ] == []


def test_every_name_of_the_released_checkpoint_has_a_place(parity_keys):
    keys = parity_keys("hvqtrans")
    assert {name for name in keys if released_name(name) is None} == {"input_proj.weight", "input_proj.bias"}


def test_the_released_size_is_the_papers():
    with torch.device("meta"):
        network = HVQTrans([24, 32, 56, 160], [(112, 112), (56, 56), (28, 28), (14, 14)], 15)
    unused = 272 * 256 + 256  # the authors' `input_proj`, which they never call
    assert sum(p.numel() for p in network.parameters()) == 18_014_192 - unused
    assert sum(b.numel() for n, b in network.named_buffers() if n.endswith(".codes")) == 17_694_720


@pytest.mark.parametrize("prefix", ["module.", "model.module."])
def test_a_checkpoint_of_a_wrapped_model_with_its_backbone_is_imported(parity_cases, prefix):
    case = next(case for case in parity_cases("hvqtrans") if case.tensors("state."))
    recording = Recording(case, prefix)
    assert recording.imported.prefix == prefix
    state = {**recording.state, prefix + "enc._conv_stem.weight": torch.zeros(3)}
    assert prefix + "enc._conv_stem.weight" in load_released(recording.network, state).unused
    missing = next(name for name in state if name.endswith("embed"))
    with pytest.raises(ValueError, match=r"codebooks\.\d\.books\.0\.codes"):
        load_released(recording.network, {name: value for name, value in state.items() if name != missing})
