"""FastFlow against anomalib's torch model and loss, from equal weights and equal features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="make baselines installs anomalib")

from lightning_modules.fastflow import FastFlow
from models import fastflow
from models.backbones import BackboneConfig

SIDE = 64


@pytest.fixture(scope="module")
def ours() -> FastFlow:
    torch.manual_seed(0)
    backbone = BackboneConfig("resnet18.tv_in1k", (2, 3, 4), weights="random")
    module = FastFlow(backbone, image_size=SIDE, flow_steps=2, map="probability")
    for norm in module.network.norms:  # it starts as the identity, in which no mistake would show
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return module


@pytest.fixture(scope="module")
def theirs(ours: FastFlow) -> nn.Module:
    from anomalib.models.image.fastflow.torch_model import FastflowModel

    model = FastflowModel((SIDE, SIDE), "resnet18", pre_trained=False, flow_steps=2)
    model.feature_extractor = ours.extractor
    model.fast_flow_blocks.load_state_dict(ours.network.flows.state_dict())
    model.norms.load_state_dict(ours.network.norms.state_dict())
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_released_maps_are_those_of_anomalib(ours: FastFlow, theirs: nn.Module, images: Tensor) -> None:
    found = ours.eval().evaluate({"image": images})[""]
    expected = theirs.eval()(images)
    assert found.maps.std() > 1e-3
    torch.testing.assert_close(found.maps, expected.anomaly_map[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.image_scores, expected.pred_score.flatten(), atol=1e-6, rtol=1e-5)


def test_loss_and_its_gradient_are_those_of_anomalib(ours: FastFlow, theirs: nn.Module, images: Tensor) -> None:
    from anomalib.models.image.fastflow.loss import FastflowLoss

    loss = ours.batch_loss({"image": images})
    expected = FastflowLoss()(*theirs.train()(images))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for mine, other in zip(ours.network.flows.parameters(), theirs.fast_flow_blocks.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))
    ours.zero_grad()
    theirs.zero_grad()


def test_energy_keeps_the_order_of_defects_that_the_exponential_ties() -> None:
    z = torch.tensor([15.0, 30.0]).view(1, 1, 1, 2).expand(1, 8, 1, 2)
    flowed = [fastflow.Flowed(z, torch.zeros(1))]
    energy, probability = (fastflow.level_maps(flowed, kind)[0].flatten() for kind in ("energy", "probability"))
    assert probability[0] == probability[1] == 0
    assert energy.tolist() == [112.5, 450.0]


def test_a_map_does_not_depend_on_the_batch(ours: FastFlow, images: Tensor) -> None:
    alone, beside = (ours.eval().evaluate({"image": part})[""].maps[0] for part in (images[:1], images))
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)


def test_size_of_the_papers_network() -> None:
    network = fastflow.FastFlow((256, 512), ((64, 64), (32, 32)))  # the third level takes seconds
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 4_070_400 + 8_927_232
