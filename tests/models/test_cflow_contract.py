"""CFLOW against anomalib's torch model, from equal weights and equal features: likelihoods, maps, and a training step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="make baselines installs anomalib")

from lightning_modules.cflow import CFLOW
from models import cflow
from models.backbones import BackboneConfig

LAYERS = ("layer1", "layer2")
SIDE = 64
CONDITION = 16


class Handed(nn.Module):
    """Stands where anomalib's model has its encoder: our extractor's levels under its names of them."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(LAYERS, self.extractor(images), strict=True))


@pytest.fixture(scope="module")
def ours() -> CFLOW:
    torch.manual_seed(0)
    backbone = BackboneConfig("resnet18.tv_in1k", (2, 3), weights="random")
    return CFLOW(backbone, image_size=SIDE, condition=CONDITION, coupling_blocks=2, fibre_batch=64, lr_scheduler=None)


@pytest.fixture
def theirs(ours: CFLOW) -> Iterator[nn.Module]:
    from anomalib.models.image.cflow.torch_model import CflowModel

    model = CflowModel(
        "resnet18", LAYERS, pre_trained=False, fiber_batch_size=64, condition_vector=CONDITION, coupling_blocks=2
    )
    model.encoder = Handed(ours.extractor)
    model.decoders.load_state_dict(ours.network.flows.state_dict())
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_maps_are_those_of_anomalib_on_its_scale_up_to_a_constant(
    ours: CFLOW, theirs: nn.Module, images: Tensor
) -> None:
    # anomalib takes the batch's largest likelihoods, and subtracts the sum from its largest pixel.
    likelihoods = ours.network(ours.extractor(images))
    ours.network.highest.copy_(torch.stack([values.max() for values in likelihoods]))
    found = ours.evaluate({"image": images})[""]
    expected = theirs.eval()(images)
    shift = expected.anomaly_map - found.maps
    assert found.maps.std() > 0.01
    torch.testing.assert_close(shift, shift.mean().expand_as(shift), atol=2e-5, rtol=0)
    torch.testing.assert_close(expected.pred_score - found.image_scores, shift.mean().expand(3), atol=2e-5, rtol=0)


def test_a_map_does_not_depend_on_the_batch_as_anomalibs_does(ours: CFLOW, theirs: nn.Module, images: Tensor) -> None:
    ours.network.highest.fill_(-1.0)
    alone, beside = (ours.evaluate({"image": part})[""].maps[0] for part in (images[:1], images))
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)
    theirs.eval()
    assert (theirs(images[:1]).anomaly_map[0] - theirs(images).anomaly_map[0]).abs().max() > 1e-3


def test_a_training_step_moves_the_flows_as_anomalibs_does(
    ours: CFLOW, theirs: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 * 256 and 3 * 64 fibres of 64: no rest, which the two treat differently.
    from anomalib.models.image.cflow.lightning_model import Cflow

    def step(module: type, this: object, batch: object) -> None:
        torch.manual_seed(7)
        module.training_step(this, batch, 0)

    adam = torch.optim.Adam(theirs.decoders.parameters(), lr=1e-4)
    other = SimpleNamespace(
        model=theirs, optimizers=lambda: adam, manual_backward=lambda loss: loss.backward(), log=lambda *_, **__: None
    )
    step(Cflow, other, SimpleNamespace(image=images))

    mine = torch.optim.Adam(ours.network.flows.parameters(), lr=1e-4)
    monkeypatch.setattr(ours, "optimizers", lambda: mine)
    monkeypatch.setattr(ours, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(ours, "watch", lambda loss, batch: None)
    before = {name: value.clone() for name, value in ours.network.flows.state_dict().items()}
    try:
        step(CFLOW, ours, {"image": images, "label": torch.zeros(3)})
        moved = 0.0
        for name, value in theirs.decoders.state_dict().items():
            torch.testing.assert_close(ours.network.flows.state_dict()[name], value, atol=1e-6, rtol=1e-4)
            moved = max(moved, float((value - before[name]).abs().max()))
        assert moved > 5e-4, "twelve and three steps of 1e-4 in one direction"
    finally:
        ours.network.flows.load_state_dict(before)


def test_outliers_keep_their_order_where_the_exponential_ties(ours: CFLOW) -> None:
    ours.network.highest.zero_()
    worse = [torch.tensor([[[-1000.0, -2000.0]]], dtype=torch.float64)] * 2
    probability, log = (ours.network.level_maps(worse, kind)[0].flatten() for kind in ("probability", "log"))
    assert probability[0] == probability[1]
    assert log[0] < log[1]


def test_size_of_the_papers_flows() -> None:
    # Two of the three levels; the third takes seconds. Published sum: 81,647,616, of it 59,049,984 for 2048 channels.
    network = cflow.CFLOW((512, 1024), ((2, 2), (1, 1)))
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 81_647_616 - 59_049_984
