"""DRAEM against anomalib's torch model and losses, from equal weights and equal images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="make baselines installs anomalib")

from lightning_modules.draem import DRAEM
from models import draem

SIDE = 64


@pytest.fixture(scope="module")
def ours() -> DRAEM:
    torch.manual_seed(0)
    module = DRAEM(image_size=SIDE, reconstructive_width=8, discriminative_width=8).eval()
    with torch.no_grad():  # untrained logits are so small that no mistake would show
        module.network.discriminative.decoder_segment.fin_out[0].weight.mul_(300)
    return module


@pytest.fixture(scope="module")
def theirs(ours: DRAEM) -> nn.Module:
    from anomalib.models.image.draem.torch_model import (
        DiscriminativeSubNetwork,
        DraemModel,
        ReconstructiveSubNetwork,
    )

    model = DraemModel()
    model.reconstructive_subnetwork = ReconstructiveSubNetwork(base_width=8)
    model.discriminative_subnetwork = DiscriminativeSubNetwork(6, 2, base_width=8)
    model.reconstructive_subnetwork.load_state_dict(ours.network.reconstructive.state_dict())
    model.discriminative_subnetwork.load_state_dict(ours.network.discriminative.state_dict())
    return model.eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def normalised(module: DRAEM, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in module.normalisation)
    return (pixels - mean) / std


@torch.no_grad()
def test_the_softmax_of_the_map_is_anomalibs_map(ours: DRAEM, theirs: nn.Module, pixels: Tensor) -> None:
    found = ours.evaluate({"image": normalised(ours, pixels)})[""]
    expected = theirs(pixels)
    assert expected.anomaly_map.std() > 1e-3
    torch.testing.assert_close(found.maps.sigmoid(), expected.anomaly_map, atol=1e-5, rtol=0)
    # The released score; anomalib's is the largest pixel.
    means = nn.AvgPool2d(21, stride=1, padding=10)(expected.anomaly_map[:, None])
    torch.testing.assert_close(found.image_scores, means.flatten(1).amax(1), atol=1e-5, rtol=0)


def test_losses_are_anomalibs_but_for_the_weight_of_normal_pixels(pixels: Tensor) -> None:
    from anomalib.models.image.draem.loss import DraemLoss
    from kornia.losses import FocalLoss

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 2, SIDE, SIDE, generator=generator).requires_grad_()
    mask = torch.rand(2, 1, SIDE, SIDE, generator=generator) < 0.2
    loss = draem.focal_loss(logits, mask)
    # kornia's mean is over pixels and classes. Its logarithm is not smoothed by 1e-5.
    unweighted = 2 * FocalLoss(alpha=None, gamma=2.0, reduction="mean")(logits, mask[:, 0].long())
    torch.testing.assert_close(loss, unweighted, rtol=1e-3, atol=0)
    loss.backward()
    assert (logits.grad[:, 0][~mask[:, 0]].abs() > 0).all()

    theirs, noisy = DraemLoss(), (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    other = logits.detach().requires_grad_()
    theirs.focal_loss(other, mask[:, 0].long()).backward()
    assert (other.grad[:, 0][~mask[:, 0]] == 0).all(), "why DraemLoss is not used"
    # kornia reflects the border where the released code, and this one, have zeros.
    torch.testing.assert_close(
        1 - draem.StructuralSimilarity()(noisy, pixels), 2 * theirs.ssim_loss(noisy, pixels), rtol=0.1, atol=0
    )


def test_pixels_whose_softmax_ties_keep_their_order() -> None:
    logits = torch.tensor([[40.0, 0.0], [0.0, 60.0], [0.0, 50.0]]).T.view(1, 2, 1, 3)
    assert logits.softmax(1)[0, 1, 0].tolist()[1:] == [1.0, 1.0]
    maps, _ = draem.anomaly(logits)
    assert maps.flatten().tolist() == [-40.0, 60.0, 50.0]


def test_size_of_the_papers_networks() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in draem.DRAEM().parameters()) == 97_422_725
