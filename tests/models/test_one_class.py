"""What Patch SVDD, CutPaste and FCDD must keep: distances of nearly equal embeddings, whole images as patches, densities."""

import numpy as np
import pytest
import torch

from models import fcdd
from models.cutpaste import CutPasteNet, unit
from models.layers.gaussian import ledoit_wolf, merged, moments
from models.layers.nearest import nearest
from models.patch_svdd import PatchSVDD
from models.trunk import build_trunk

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def network() -> PatchSVDD:
    torch.manual_seed(0)
    net = PatchSVDD((80, 96), dim=8).eval()
    net.mean_image.copy_(torch.rand(3, 80, 96, generator=GENERATOR))
    return net


@torch.no_grad()
def test_the_whole_image_at_once_is_every_patch_cut_out(network):
    images = torch.rand(2, 3, 80, 96, generator=GENERATOR)
    moved = images - network.mean_image
    for side, found in network.embed(images).items():
        stride = {64: 16, 32: 4}[side]
        cut = moved.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5)
        assert found.shape[:3] == cut.shape[:3]
        each = network.encoder(cut.flatten(0, 2)).view(found.shape)
        torch.testing.assert_close(found, each, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_training_image_is_0_everywhere_and_a_constant_in_all_images_changes_nothing(network):
    images = torch.rand(2, 3, 80, 96, generator=GENERATOR)
    for side, bank in network.banks.items():
        bank.set(network.embed(images)[side].flatten(0, 2))
    maps = network(images)
    assert all(float(found.abs().max()) == 0 for found in maps.values())
    other = torch.rand(1, 3, 80, 96, generator=GENERATOR)
    before = network(other)
    network.mean_image += 0.25
    after = network(other + 0.25)
    network.mean_image -= 0.25
    for side in (64, 32):
        torch.testing.assert_close(before[side], after[side], rtol=1e-3, atol=1e-6)
        assert (before[side] > 0).all()  # patches cover every pixel


def test_nearly_collapsed_embeddings_keep_their_order():
    rng = np.random.default_rng(0)
    bank = 0.05 + 1e-6 * rng.standard_normal((500, 64))
    queries = 0.05 + 1e-6 * rng.standard_normal((200, 64))
    bank, queries = bank.astype(np.float32), queries.astype(np.float32)
    exact = np.linalg.norm(queries[:, None].astype(np.float64) - bank[None].astype(np.float64), axis=2).min(1)
    found = nearest(torch.from_numpy(queries), torch.from_numpy(bank))[0][:, 0].sqrt().numpy()
    ranks = [np.argsort(np.argsort(values)) for values in (exact, found)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9999


def test_an_untrained_class_weight_gets_no_gradient_and_a_trained_one_does():
    for rule in ("fixed", "trained"):
        net = PatchSVDD((64, 64), dim=4, widths=[4] * 7, hidden=4, last_weight=rule)
        direction, near = net.losses(torch.rand(3, 2, 3, 32, 32), torch.tensor([0, 3, 7]), torch.rand(3, 2, 3, 32, 32))
        (direction + near).backward()
        assert (net.cls_32.fc3.weight.grad is None) == (rule == "fixed")


def test_equal_near_patches_give_no_nan():
    net = PatchSVDD((64, 64), dim=4, widths=[4] * 7, hidden=4)
    patches = torch.rand(2, 1, 3, 32, 32).expand(-1, 2, -1, -1, -1)
    sum(net.losses(patches, torch.tensor([0, 1]), patches)).backward()
    assert all(p.grad.isfinite().all() for p in net.encoder.enc.parameters())


def test_the_shrunk_covariance_is_scikit_learns_however_it_is_summed_up():
    covariance = pytest.importorskip("sklearn.covariance")
    rng = np.random.default_rng(1)
    vectors = torch.from_numpy(0.3 + 1e-3 * rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)))
    oracle = covariance.LedoitWolf().fit(vectors.numpy())
    for centre in (vectors.mean(0), vectors[0]):
        parts = [moments(part, centre) for part in vectors.split(64)]
        total = parts[0]
        for part in parts[1:]:
            total = merged(total, part)
        found = ledoit_wolf(total, centre)
        np.testing.assert_allclose(found.shrinkage, oracle.shrinkage_, rtol=1e-6)
        np.testing.assert_allclose(found.mean, oracle.location_, rtol=1e-9)
        np.testing.assert_allclose(found.covariance, oracle.covariance_, rtol=1e-6, atol=1e-15)


def test_few_embeddings_of_many_numbers_score_and_normal_ones_score_lower():
    train = unit(1 + 0.01 * torch.randn(20, 64, generator=GENERATOR))
    away = unit(1 + 0.05 * torch.randn(5, 64, generator=GENERATOR))
    for density in ("gaussian", "kernels"):
        net = CutPasteNet(torch.nn.Identity(), 64, density=density)
        with pytest.raises(RuntimeError, match="no density yet"):
            net.score(train)
        net.fit(train)
        again = CutPasteNet(torch.nn.Identity(), 64, density=density)
        again.load_state_dict(net.state_dict())
        assert again.score(away).min() > again.score(train).max()


def test_a_trunk_from_a_package_or_a_file_starts_from_its_weights(tmp_path):
    packaged = build_trunk("tf_efficientnet_lite0.in1k", "packaged")
    assert packaged.extractor.provenance["weights"] == "packaged"
    assert packaged.extractor.std == (128 / 255,) * 3
    torch.save(packaged.net.state_dict(), tmp_path / "weights.pth")
    file = build_trunk("tf_efficientnet_lite0.in1k", str(tmp_path / "weights.pth"))
    assert all(torch.equal(value, packaged.net.state_dict()[name]) for name, value in file.net.state_dict().items())
    assert file.extractor.provenance["source"] == "weights.pth"


@torch.no_grad()
def test_losses_of_maps_are_the_printed_ones():
    net = fcdd.FCDD(fcdd.Small(), std=4.0)
    cells = torch.rand(2, 4, 4, generator=GENERATOR)
    maps = net.spread(cells, (32, 32))
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    means = maps.mean((1, 2))
    expected = torch.stack([means[0], -torch.log(1 - torch.exp(-means[1]))])
    torch.testing.assert_close(fcdd.losses(maps, masks), expected)


def test_small_outputs_do_not_become_0_and_constant_images_no_nan():
    assert (fcdd.pseudo_huber(torch.tensor([1e-5, 1e-4])) > 0).all()
    assert float(fcdd.pseudo_huber(torch.tensor(2.0))) == pytest.approx(5**0.5 - 1)
    assert fcdd.contrast(torch.full((1, 3, 4, 4), 0.3)).isfinite().all()


def test_the_upsampling_is_a_transposed_convolution_and_normalised_maps_of_ones_are_ones():
    cells = torch.rand(1, 1, 5, 5, generator=GENERATOR)
    reception = fcdd.Reception(4, 7, 0.0)
    steps = torch.arange(7.0) - 3
    kernel = torch.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / (2 * 2.0**2))
    whole = torch.nn.functional.conv_transpose2d(cells, kernel[None, None], stride=4)[0, 0, 3:, 3:]
    found = fcdd.spread(cells[:, 0], (20, 20), reception, 2.0)[0]
    torch.testing.assert_close(found, whole[:20, :20])
    ones = fcdd.spread(torch.ones(1, 8, 8), (64, 64), fcdd.VGG.reception, 12.0, normalised=True)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    centre = fcdd.spread(torch.ones(1, 28, 28), (224, 224), fcdd.VGG.reception, 12.0)[0]
    assert float(centre[112, 112]) == pytest.approx(3.72, abs=0.02)
    assert float(centre[0, 0]) == pytest.approx(0.99, abs=0.02)
    assert float(centre.mean()) == pytest.approx(3.39, abs=0.02)


def test_wrong_networks_are_named():
    with pytest.raises(ValueError, match="seven convolutions"):
        PatchSVDD((64, 64), widths=[4, 4])
    with pytest.raises(ValueError, match="batch, running"):
        fcdd.build("vgg11_bn", "scratch", "frozen")
    with pytest.raises(ValueError, match="names no layer"):
        CutPasteNet(torch.nn.Identity(), 4, head=[])
    with pytest.raises(ValueError, match="knows no trunk"):
        build_trunk("resnet81", "scratch")
