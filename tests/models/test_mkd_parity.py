"""MKD must compute what the authors' released code computes, from their own names: levels, scores, maps, the first Adam
step and the released localisation AUC.

File, tag, prefix, shapes and hyperparameters come from cases_classics_mkd_us.json in PARITY_DIR (or tests/models/parity), so
that other cases of the same form run through.
"""

import json
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_modules.mkd import MKD as Module
from models import mkd
from models.backbones import BackboneConfig
from models.head import AnomalyHead, HeadConfig
from models.released import load_released

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
ALL = json.loads((FOLDER / "cases_classics_mkd_us.json").read_text())
CASES = [case for case in ALL if case["method"] == "mkd"]
TAGS = [case["tag"] for case in CASES]
STEPPED = [case for case in CASES if "lr" in case["hparams"]]


def fill(name: str, shape) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def filled(prefix: str, name: str, shape) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    values = fill(prefix + name, shape)
    if len(shape) == 4:
        return 1.4 * values / float(np.sqrt(np.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1 + 0.1 * values.abs()
    return 0.05 * values + float(name.endswith("weight"))


def stages(widths: list) -> list[list[int]]:
    """A plan in the authors' notation as a list per stage."""
    out: list[list[int]] = [[]]
    for width in widths:
        if width == "M":
            out.append([])
        else:
            out[-1].append(width)
    return out[:-1]


class Source(nn.Module):
    """The plain VGG plan, under its usual names; levels behind all pools but the first."""

    def __init__(self, widths: list) -> None:
        super().__init__()
        layers, inputs = [], 3
        for width in widths:
            layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = inputs if width == "M" else width
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = []
        for layer in self.features:
            x = layer(x)
            levels += [x] if isinstance(layer, nn.MaxPool2d) else []
        return levels[1:]


class Recording:
    """A case with its arrays, and source and cloner built and loaded as it says."""

    def __init__(self, case: dict) -> None:
        self.case, self.options, self.tag = case, case["hparams"], case["tag"]
        own = f"{self.tag}."
        with np.load(FOLDER / case["file"]) as stored:
            self.arrays = {name.removeprefix(own): stored[name] for name in stored.files if name.startswith(own)}
        self.source = Source(self.options["source_widths"])
        plan = stages(self.options["cloner_widths"])
        ends = [widths[-1] for widths in stages(self.options["source_widths"])][1:]
        strides = [2 ** (number + 2) for number in range(len(ends))]
        self.network = mkd.MKD(ends, strides, pooled=False, stages=plan)
        self.states = {}
        for part, shapes in (("source", self.source.state_dict()), ("cloner", self.network.state_dict())):
            stored = {
                name.removeprefix(f"state.{part}."): torch.from_numpy(np.asarray(values))
                for name, values in self.arrays.items()
                if name.startswith(f"state.{part}.")
            }
            prefix = f"{case['key_prefix']}{part}."
            self.states[part] = stored or {name: filled(prefix, name, t.shape) for name, t in shapes.items()}
        self.source.load_state_dict(self.states["source"])
        imported = load_released(self.network, self.states["cloner"])
        assert not imported.unused
        self.source.eval().requires_grad_(False)
        self.network.eval()
        self.weight = self.options["lamda"]

    def input(self, name: str = "input") -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def pairs(self, x: torch.Tensor, relu=F.relu) -> list:
        return self.network(self.network.prepare(self.source(x)), x, relu)

    def score(self, x: torch.Tensor, relu=F.relu) -> torch.Tensor:
        return mkd.image_scores(self.pairs(x, relu), self.weight)

    def smoothed(self, maps: torch.Tensor) -> torch.Tensor:
        config = HeadConfig(smoothing_sigma=self.options["sigma"], smoothing_border="symmetric")
        return AnomalyHead(config).score([maps], tuple(maps.shape[-2:])).maps

    def check(self, found: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
        """Compares what is recorded, to a part of the largest recorded value."""
        errors = {}
        for name, ours in found.items():
            if name not in self.arrays:
                continue
            values, ours = self.arrays[name], ours.detach().numpy()
            assert ours.shape == values.shape, name
            errors[name] = float(np.abs(ours - values).max() / max(np.abs(values).max(), 1e-30))
        assert errors
        print(self.tag, {name: f"{error:.1e}" for name, error in errors.items()})
        assert max(errors.values()) <= tolerance, errors


@pytest.fixture(params=CASES, ids=TAGS)
def recording(request) -> Recording:
    return Recording(request.param)


def test_released_weights_give_the_released_levels_losses_and_scores(recording):
    pairs = recording.pairs(recording.input())
    cosine, square = mkd.differences(pairs)
    found = {"cosine": cosine, "mse": square}
    for number, (target, level) in enumerate(pairs):
        found |= {f"source.{number}": target, f"cloner.{number}": level}
        found |= {f"source_mean.{number}": target.mean(1), f"cloner_mean.{number}": level.mean(1)}
    found |= {"loss": mkd.loss(pairs, recording.weight), "loss_direction": mkd.loss(pairs, 0)}
    found |= {"score": mkd.image_scores(pairs, recording.weight), "score_direction": mkd.image_scores(pairs, 0)}
    recording.check(found)


def test_maps_are_the_released_ones(recording):
    found = {}
    for kind, relu in (("gradients", F.relu), ("gbp", mkd.guided_relu)):
        gradient, _ = mkd.pixel_gradient(partial(recording.score, relu=relu), recording.input())
        gray = mkd.stretched(mkd.grey(gradient), 0.99)
        found |= {f"grad.{kind}": gradient, f"gray.{kind}": gray, f"map.{kind}": recording.smoothed(gray)}
    assert all(parameter.grad is None for parameter in recording.network.parameters())
    recording.check(found)


@pytest.mark.parametrize("case", [c for c in CASES if "smooth_draws" in c["hparams"]])
def test_the_mean_over_noisy_copies_is_the_released_one(case):
    recording = Recording(case)
    images, prefix = recording.input(), case["key_prefix"]
    std = mkd.noise_std(images, "released")
    total = torch.zeros_like(images[:, 0])
    for draw in range(recording.options["smooth_draws"]):
        noise = torch.cat([fill(f"{prefix}noise.{b}.{draw}", (1, *images.shape[1:])) for b in range(len(images))])
        gradient, _ = mkd.pixel_gradient(recording.score, images + std.view(-1, 1, 1, 1) * noise)
        total += mkd.stretched(mkd.grey(gradient), 0.99)
    map_ = recording.smoothed(mkd.stretched(total / recording.options["smooth_draws"]))
    recording.check({"noise_std": std, "map.smooth_grad": map_})


@pytest.mark.parametrize("case", [c for c in CASES if "opening_thresholds" in c["hparams"]])
def test_a_threshold_of_the_opened_map_is_the_released_opening_and_gives_its_auc(case):
    recording = Recording(case)
    map_, mask = torch.from_numpy(recording.arrays["map.gradients"]), recording.arrays["mask"]
    opened = mkd.opened(map_)
    for threshold in recording.options["opening_thresholds"]:
        assert np.array_equal((opened >= threshold).numpy(), recording.arrays[f"opening.{threshold}"].astype(bool))
    thresholds = np.arange(1000) / 1000
    above = np.stack([(opened.numpy() >= t).astype(np.float64) for t in thresholds])
    rates = [(above * part).sum((1, 2, 3)) / part.sum() for part in (mask.astype(np.float64), 1.0 - mask)]
    area = -np.trapezoid(rates[0], rates[1])
    assert area == pytest.approx(float(recording.arrays["released_localisation_auc"]), abs=1e-4)


@pytest.mark.parametrize("case", STEPPED)
def test_the_first_steps_of_adam_are_the_released_ones(case):
    recording = Recording(case)
    network, images = recording.network.train(), recording.input("train_input")
    optimizer = torch.optim.Adam(network.parameters(), lr=recording.options["lr"], betas=recording.options["betas"])
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    losses = []
    for number in range(len(recording.arrays["train_losses"])):
        optimizer.zero_grad()
        pairs = recording.pairs(images)
        loss = mkd.loss(pairs, recording.weight)
        losses.append(loss.detach())
        loss.backward()
        if number == 0:
            cosine, square = mkd.differences(pairs)
            found = {"train_cosine": cosine.mean(0), "train_mse": square.mean(0)}
            found |= {f"param_grad.{name}": p.grad.clone() for name, p in network.named_parameters()}
            found |= {f"after.{name}": value for name, value in network.named_buffers()}
            recording.check(found)
        optimizer.step()
        if number == 0:
            recording.check({f"step.{n}": p - before[n] for n, p in network.named_parameters()}, 2e-3)
    recorded = recording.arrays["train_losses"]
    assert losses[0].item() == pytest.approx(float(recorded[0]), rel=1e-4)
    recording.check({"train_losses": torch.stack(losses)}, 2e-3)


@pytest.mark.parametrize("case", [c for c in CASES if "fill" in c])
def test_the_method_on_a_vgg_from_a_file_gives_the_released_scores_and_maps(case, tmp_path):
    recording = Recording(case)
    torch.save(recording.states["source"], tmp_path / "source.pth")
    images = recording.input()
    module = Module(
        BackboneConfig("vgg16.tv_in1k", (2, 3, 4, 5), weights=str(tmp_path / "source.pth")),
        image_size=tuple(images.shape[-2:]),
        magnitude_weight=recording.weight,
    ).eval()
    load_released(module.network, recording.states["cloner"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (module.extractor.mean, module.extractor.std))
    module.set_protocol("as_released", "last")
    with torch.inference_mode():
        found = module.evaluate({"image": (images - mean) / std})
    recording.check({"score": found[""].image_scores}, 1e-4)
    opened = mkd.opened(torch.from_numpy(recording.arrays["map.gradients"]))
    assert (found[""].maps - opened).abs().max() <= 1e-4


def test_the_default_is_the_released_cloner():
    keys = json.loads((FOLDER / "mkd_keys.json").read_text())
    channels, strides = (128, 256, 512, 512), (4, 8, 16, 32)
    for name, options in (("cloner", {}), ("cloner_with_bias", {"bias": True})):
        with torch.device("meta"):
            network = mkd.MKD(channels, strides, **options)
        assert {key: list(value.shape) for key, value in network.state_dict().items()} == keys[name]
        count = sum(p.numel() for p in network.parameters())
        assert count == (345_536 if options else 343_984)
    with torch.device("meta"):
        network = mkd.MKD(channels, strides, equal_size=True)
    assert sum(p.numel() for p in network.parameters()) == 14_715_968
