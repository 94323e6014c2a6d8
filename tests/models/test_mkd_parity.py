"""MKD must compute what the authors' released code computes, from their own names: levels, scores, maps, the first Adam
step and the released localisation AUC.
"""

from functools import partial

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

pytestmark = pytest.mark.parity("mkd")


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

    def __init__(self, case) -> None:
        self.case, self.options, self.weight = case, case.hparams, case.hparams["lamda"]
        self.source = Source(self.options["source_widths"])
        plan = stages(self.options["cloner_widths"])
        ends = [widths[-1] for widths in stages(self.options["source_widths"])][1:]
        strides = [2 ** (number + 2) for number in range(len(ends))]
        self.network = mkd.MKD(ends, strides, pooled=False, stages=plan)
        self.states = {}
        for part, shapes in (("source", self.source.state_dict()), ("cloner", self.network.state_dict())):
            self.states[part] = case.tensors(f"state.{part}.") or {
                name: case.fill_parameter(f"{case.key_prefix}{part}.{name}", value.shape, gain=1.4)
                for name, value in shapes.items()
            }
        self.source.load_state_dict(self.states["source"])
        imported = load_released(self.network, self.states["cloner"])
        assert not imported.unused
        self.source.eval().requires_grad_(False)
        self.network.eval()

    def input(self, name: str = "input") -> torch.Tensor:
        return self.case.tensor(name)

    def pairs(self, x: torch.Tensor, relu=F.relu) -> list:
        return self.network(self.network.prepare(self.source(x)), x, relu)

    def score(self, x: torch.Tensor, relu=F.relu) -> torch.Tensor:
        return mkd.image_scores(self.pairs(x, relu), self.weight)

    def smoothed(self, maps: torch.Tensor) -> torch.Tensor:
        config = HeadConfig(smoothing_sigma=self.options["sigma"], smoothing_border="symmetric")
        return AnomalyHead(config).score([maps], tuple(maps.shape[-2:])).maps


@pytest.fixture
def recording(case) -> Recording:
    return Recording(case)


def test_released_weights_give_the_released_levels_losses_and_scores(recording):
    pairs = recording.pairs(recording.input())
    cosine, square = mkd.differences(pairs)
    found = {"cosine": cosine, "mse": square}
    for number, (target, level) in enumerate(pairs):
        found |= {f"source.{number}": target, f"cloner.{number}": level}
        found |= {f"source_mean.{number}": target.mean(1), f"cloner_mean.{number}": level.mean(1)}
    found |= {"loss": mkd.loss(pairs, recording.weight), "loss_direction": mkd.loss(pairs, 0)}
    found |= {"score": mkd.image_scores(pairs, recording.weight), "score_direction": mkd.image_scores(pairs, 0)}
    recording.case.check(found)


def test_maps_are_the_released_ones(recording):
    found = {}
    for kind, relu in (("gradients", F.relu), ("gbp", mkd.guided_relu)):
        gradient, _ = mkd.pixel_gradient(partial(recording.score, relu=relu), recording.input())
        gray = mkd.stretched(mkd.grey(gradient), 0.99)
        found |= {f"grad.{kind}": gradient, f"gray.{kind}": gray, f"map.{kind}": recording.smoothed(gray)}
    assert all(parameter.grad is None for parameter in recording.network.parameters())
    recording.case.check(found)


@pytest.mark.parity("mkd", having="smooth_draws")
def test_the_mean_over_noisy_copies_is_the_released_one(case):
    recording = Recording(case)
    images, prefix = recording.input(), case.key_prefix
    std = mkd.noise_std(images, "released")
    total = torch.zeros_like(images[:, 0])
    for draw in range(recording.options["smooth_draws"]):
        noise = torch.cat([case.fill(f"{prefix}noise.{b}.{draw}", (1, *images.shape[1:])) for b in range(len(images))])
        gradient, _ = mkd.pixel_gradient(recording.score, images + std.view(-1, 1, 1, 1) * noise)
        total += mkd.stretched(mkd.grey(gradient), 0.99)
    map_ = recording.smoothed(mkd.stretched(total / recording.options["smooth_draws"]))
    recording.case.check({"noise_std": std, "map.smooth_grad": map_})


@pytest.mark.parity("mkd", having="opening_thresholds")
def test_a_threshold_of_the_opened_map_is_the_released_opening_and_gives_its_auc(case):
    recording = Recording(case)
    map_, mask = case.tensor("map.gradients"), recording.case.arrays["mask"]
    opened = mkd.opened(map_)
    for threshold in recording.options["opening_thresholds"]:
        assert np.array_equal((opened >= threshold).numpy(), recording.case.arrays[f"opening.{threshold}"].astype(bool))
    thresholds = np.arange(1000) / 1000
    above = np.stack([(opened.numpy() >= t).astype(np.float64) for t in thresholds])
    rates = [(above * part).sum((1, 2, 3)) / part.sum() for part in (mask.astype(np.float64), 1.0 - mask)]
    area = -np.trapezoid(rates[0], rates[1])
    assert area == pytest.approx(float(recording.case.arrays["released_localisation_auc"]), abs=1e-4)


@pytest.mark.parity("mkd", having="lr")
def test_the_first_steps_of_adam_are_the_released_ones(case):
    recording = Recording(case)
    network, images = recording.network.train(), recording.input("train_input")
    optimizer = torch.optim.Adam(network.parameters(), lr=recording.options["lr"], betas=recording.options["betas"])
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    losses = []
    for number in range(len(recording.case.arrays["train_losses"])):
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
            recording.case.check(found)
        optimizer.step()
        if number == 0:
            recording.case.check({f"step.{n}": p - before[n] for n, p in network.named_parameters()}, 2e-3)
    recorded = recording.case.arrays["train_losses"]
    assert losses[0].item() == pytest.approx(float(recorded[0]), rel=1e-4)
    recording.case.check({"train_losses": torch.stack(losses)}, 2e-3)


@pytest.mark.parity("mkd", having="fill")
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
    recording.case.check({"score": found[""].image_scores}, 1e-4)
    opened = mkd.opened(case.tensor("map.gradients"))
    assert (found[""].maps - opened).abs().max() <= 1e-4


def test_the_default_is_the_released_cloner(parity_keys):
    keys = parity_keys("mkd")
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
