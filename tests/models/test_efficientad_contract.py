"""EfficientAD against anomalib's torch model, from equal weights and equal images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="make baselines installs anomalib")

from lightning_modules.efficientad import EfficientAD
from models import efficientad

SIDE = 256


@pytest.fixture(scope="module")
def ours() -> EfficientAD:
    torch.manual_seed(0)
    module = EfficientAD(teacher="not read here", image_size=SIDE).eval()
    with torch.no_grad():  # untrained descriptors are so small that no mistake would show
        for part in (module.network.teacher, module.network.student):
            part.conv4.weight.mul_(30)
    mean = torch.randn(efficientad.CHANNELS) * 0.1
    module.network.statistics.set("all", mean, torch.rand(efficientad.CHANNELS) + 0.5)
    local, overall = ({0.9: low, 0.995: high} for low, high in ((0.2, 0.9), (0.1, 0.3)))
    module.network.quantiles.set({"all": {"local": local, "global": overall}})
    return module


@pytest.fixture(scope="module")
def theirs(ours: EfficientAD) -> nn.Module:
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel

    model, network = EfficientAdModel(), ours.network
    model.teacher.load_state_dict(network.teacher.state_dict())
    model.student.load_state_dict(network.student.state_dict())
    model.ae.load_state_dict(network.autoencoder.state_dict())
    model.mean_std.update({"mean": network.statistics.mean, "std": network.statistics.std})
    numbers = {"qa_st": 0.2, "qb_st": 0.9, "qa_ae": 0.1, "qb_ae": 0.3}
    model.quantiles.update({name: torch.tensor(value) for name, value in numbers.items()})
    return model.eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_maps_and_scores_are_those_of_anomalib(ours: EfficientAD, theirs: nn.Module, pixels: Tensor) -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ours.normalisation)
    found = ours.evaluate({"image": (pixels - mean) / std})[""]
    expected = theirs(pixels)
    assert expected.anomaly_map.std() > 1e-3
    torch.testing.assert_close(found.maps, expected.anomaly_map[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.image_scores, expected.pred_score.flatten(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_losses_are_those_of_anomalib(ours: EfficientAD, theirs: nn.Module, pixels: Tensor) -> None:
    penalty = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # for the jitter; neither draws dropout in eval mode
    found = ours.network.losses(pixels, penalty)
    _, distances = theirs.compute_student_teacher_distance(pixels)
    torch.manual_seed(3)
    student, autoencoder, both = theirs.compute_losses(pixels, penalty, distances)
    torch.testing.assert_close(found["hard"] + found["penalty"], student, rtol=1e-4, atol=0)
    torch.testing.assert_close(found["autoencoder"], autoencoder, rtol=1e-4, atol=0)
    torch.testing.assert_close(found["student_autoencoder"], both, rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [1, 1000, 1001, 4321])
def test_the_hardest_are_those_that_reach_the_quantile(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    expected = values[values >= torch.quantile(values, 0.999)].mean()
    torch.testing.assert_close(efficientad.hardest(values), expected)


def test_a_teacher_of_other_names_is_taken_and_one_of_another_size_refused(ours: EfficientAD) -> None:
    network = ours.network
    before = {name: value.clone() for name, value in network.teacher.state_dict().items()}
    numbers = [f"{place}.{part}" for place in (0, 3, 6, 8) for part in ("weight", "bias")]
    named = dict(zip(numbers, (value + 1 for value in before.values()), strict=True))
    network.load_teacher(named, "file")
    assert torch.equal(network.teacher.state_dict()["conv1.weight"], before["conv1.weight"] + 1)
    network.teacher.load_state_dict(before)
    with pytest.raises(ValueError, match=r"^file"):
        network.load_teacher({**named, "0.weight": torch.zeros(2, 3, 4, 4)}, "file")


def test_no_teacher_and_small_images_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"init_args\.teacher"):
        EfficientAD()
    with pytest.raises(ValueError, match="at least 256"):
        EfficientAD(teacher="x", image_size=224)


def test_sizes_of_the_papers_networks() -> None:
    with torch.device("meta"):
        for size, trained in (("small", 5_363_712), ("medium", 12_711_808)):
            network = efficientad.EfficientAD(size=size)
            assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trained
