"""CutPaste must compute what the reimplementation Runinho/pytorch-cutpaste does: pasted images, training steps, scores."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from datamodules.anomalies import cutpaste as views
from models.cutpaste import CutPasteNet, unit
from models.optimizers import HalfCosine
from models.trunk import build_trunk

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def jitter(row) -> views.Jitter:
    return views.Jitter([int(number) for number in row[:4]], [float(factor) for factor in row[4:]])


def normal(image, draws, aspect, by=None) -> np.ndarray:
    return views.paste_patch(image, draws[0], aspect, draws[1:3], draws[3:5], by)


def scar(image, draws, by=None) -> np.ndarray:
    turned = views.turned_scar(image, draws[:2], draws[2:4], draws[4], by)
    return views.paste_scar(image, turned, draws[5:7])


@pytest.mark.parity("cutpaste", having="normal_*.draws")
def test_recorded_draws_give_the_recorded_images_exactly(case):
    arrays = case.arrays
    images = arrays["images"]
    for kind in ("plain", "jitter"):
        for n, image in enumerate(images):
            by = {
                name: jitter(arrays[f"{name}_jitter.jitter"][n]) if kind == "jitter" else None
                for name in ("normal", "scar")
            }
            name = f"normal_{kind}"
            found = normal(image, arrays[f"{name}.draws"][n], arrays[f"{name}.aspect"][n], by["normal"])
            np.testing.assert_array_equal(found, arrays[f"{name}.output"][n])
            found = scar(image, arrays[f"scar_{kind}.draws"][n], by["scar"])
            np.testing.assert_array_equal(found, arrays[f"scar_{kind}.output"][n])
    image, draws, jitters = images[0], arrays["3way.draws"], arrays["3way.jitter"]
    three = [
        image,
        normal(image, draws[:5], arrays["3way.aspect"][0], jitter(jitters[0])),
        scar(image, draws[5:], jitter(jitters[1])),
    ]
    found = np.stack([((one / np.float32(255) - MEAN) / STD).transpose(2, 0, 1) for one in three])
    assert case.error(found, arrays["3way.output"]) <= 1e-6
    options = case.hparams
    assert tuple(options["area"]) == views.AREA
    assert (tuple(options["scar_width"]), tuple(options["scar_length"])) == (views.SCAR_WIDTH, views.SCAR_HEIGHT)
    assert options["rotation"] == [-views.SCAR_ANGLE, views.SCAR_ANGLE]
    assert options["aspect"][0] == views.ASPECT


@pytest.fixture
def network():
    def made(case) -> CutPasteNet:
        options = case.hparams
        trunk = build_trunk("resnet18", "scratch").net
        net = CutPasteNet(trunk, trunk.num_features, options["classes"], head=options["head_layers"])
        prefix = case.key_prefix
        state = {}
        for name, value in net.state_dict().items():
            released = name.replace("trunk.", "resnet18.", 1)
            state[name] = (
                value if name in ("mean", "precision") else case.fill_parameter(prefix + released, value.shape)
            )
        net.load_state_dict(state)
        return net

    return made


@pytest.mark.parity("cutpaste", having="train_logits")
def test_forward_and_three_steps_are_the_recorded_ones(case, network):
    options, arrays = case.hparams, case.arrays
    prefix, shape = case.key_prefix, (options["batch"], 3, options["side"], options["side"])
    net = network(case)
    parts = {"resnet18": net.trunk, "head": net.head, "out": net.out}
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == options["parameters"]
    with torch.no_grad():
        seen = net.eval()(case.fill(prefix + "eval", shape))
    errors = {
        "embedding": case.error(seen.embedding, arrays["embedding"]),
        "logits": case.error(seen.logits, arrays["logits"]),
    }
    batch = [case.fill(f"{prefix}train.{n}", shape) for n in range(options["classes"])]
    for mark in ("", "frozen."):
        net = network(case).train()
        if not mark:
            with torch.no_grad():
                errors["train_logits"] = case.error(
                    network(case).train()(torch.cat(batch)).logits, arrays["train_logits"]
                )
        optimizer = SGD(
            net.parameters(), lr=options["lr"], momentum=options["momentum"], weight_decay=options["weight_decay"]
        )
        schedule = HalfCosine(optimizer, options["epochs"])
        losses, rates = [], []
        for step in range(len(arrays[f"{mark}losses"])):
            rates.append(optimizer.param_groups[0]["lr"])
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            if mark:
                for parameter in net.trunk.parameters():
                    parameter.grad = None
            if step == 0:
                for name, parameter in net.named_parameters():
                    key = f"grad.{mark}{name.replace('trunk.', 'resnet18.', 1)}"
                    if key in arrays:
                        errors[key] = case.error(parameter.grad, arrays[key])
            optimizer.step()
            schedule.step()
            if step == 0:
                for name, value in net.state_dict().items():
                    key = f"after.{mark}{name.replace('trunk.', 'resnet18.', 1)}"
                    if key in arrays:
                        errors[key] = case.error(value, arrays[key])
            losses.append(loss.item())
        recorded = arrays[f"{mark}losses"]
        errors[f"{mark}losses"] = case.error(losses[:1], recorded[:1])
        assert case.error(losses, recorded) <= 5e-3
        np.testing.assert_allclose(rates, arrays["learning_rates"][: len(rates)], rtol=1e-6)
    print(case.tag, {name: f"{value:.1e}" for name, value in errors.items()})
    # With so few images a value near 0 that rounds to the other side of a ReLU on another processor moves gradients below
    # it by up to a hundredth; torchvision's own network and float64 both give ours.
    loose = {name: value for name, value in errors.items() if name.startswith("grad.resnet18.")}
    assert max(loose.values()) <= 1e-2, loose
    assert max(value for name, value in errors.items() if name not in loose) <= 1e-4, errors
    schedule = HalfCosine(SGD(net.parameters(), lr=options["lr"]), options["epochs"])
    rates = [options["lr"] * schedule.factor(step) for step in range(options["epochs"])]
    np.testing.assert_allclose(rates, arrays["learning_rates"], rtol=1e-6)


@pytest.mark.parity("cutpaste", having="kde_score")
def test_density_and_scores_are_the_recorded_ones(case):
    arrays = case.arrays
    train, test = (unit(case.tensor(name)) for name in ("train", "test"))
    gaussian = CutPasteNet(torch.nn.Identity(), train.shape[1])
    kernels = CutPasteNet(torch.nn.Identity(), train.shape[1], density="kernels")
    shrinkage = gaussian.fit(train)
    kernels.fit(train)
    covariance = torch.linalg.inv(gaussian.precision)
    errors = {
        "shrinkage": abs(shrinkage / float(arrays["shrinkage"]) - 1),
        "mean": case.error(gaussian.mean, arrays["mean"]),
        "covariance": case.error(covariance, arrays["covariance"]),
        "precision": case.error(gaussian.precision, arrays["precision"]),
        "score": case.error(gaussian.score(test), arrays["score"]),
        "kde_score": case.error(kernels.score(test), arrays["kde_score"]),
    }
    print(case.tag, {name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) <= 1e-4, errors


def test_views_have_labels_in_their_order():
    net = CutPasteNet(torch.nn.Flatten(), 12, head=[4])
    batch = [torch.randn(2, 3, 2, 2) for _ in range(3)]
    expected = F.cross_entropy(net(torch.cat(batch)).logits, torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(net.loss(batch), expected)
