"""The training-free methods against a loop that compares every patch with every other."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.anomaly_dino import AnomalyDINONetwork
from models.rad import RADNetwork

CHANNELS, SIZES = (6, 9), [(5, 4), (3, 2)]


def levels(images: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, c, *size, generator=generator) + 0.5 for c, size in zip(CHANNELS, SIZES, strict=True)]


def test_anomaly_dino_is_one_minus_the_largest_cosine_and_its_score_the_mean_of_the_highest_patches():
    net = AnomalyDINONetwork(CHANNELS[:1], SIZES[:1], top_fraction=0.1)
    train, test = levels(4)[:1], levels(3, seed=1)[:1]
    bank = net.prepare(train)[0].permute(0, 2, 3, 1).flatten(0, 2)
    net.bank.set(bank)
    maps, scores = net(net.prepare(test))
    patches = test[0].flatten(2).transpose(1, 2)
    normal = train[0].flatten(2).transpose(1, 2).flatten(0, 1)
    expected = 1 - F.cosine_similarity(patches[:, :, None], normal[None, None], dim=3).amax(dim=2)
    torch.testing.assert_close(maps.flatten(1), expected, rtol=0, atol=1e-6)
    highest = expected.sort(dim=1, descending=True).values[:, :2]  # int(20 x 0.1)
    torch.testing.assert_close(scores, highest.mean(dim=1), rtol=0, atol=1e-6)


def brute_force(net: RADNetwork, train: list[torch.Tensor], test: list[torch.Tensor]) -> list[np.ndarray]:
    """Patch by patch, as the authors' code does it."""
    unit = [[F.normalize(level.double(), dim=1).numpy() for level in part] for part in (train, test)]
    means = [part[-1].mean((2, 3)) for part in unit]
    means = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in means]
    maps = []
    for bank, images, (H, W) in zip(unit[0], unit[1], SIZES, strict=True):
        found = np.zeros((len(images), H, W))
        for n, image in enumerate(images):
            chosen = np.argsort(-means[0] @ means[1][n])[: net.images]
            for y in range(H):
                for x in range(W):
                    near = bank[chosen]
                    if net.positional:
                        r = net.radius
                        near = near[:, :, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
                    found[n, y, x] = 1 - np.einsum("kchw,c->khw", near, image[:, y, x]).max()
        maps.append(found)
    return maps


@pytest.mark.parametrize("options", [{}, {"radius": 0}, {"radius": 9}, {"positional": False}, {"images": 3}])
def test_rad_finds_what_a_loop_over_all_patches_finds(monkeypatch, options):
    monkeypatch.setattr("models.rad.CHUNK", 4)
    net = RADNetwork(CHANNELS, SIZES, **options)
    train, test = levels(10), levels(3, seed=2)
    net.set_banks(net.prepare(train))
    for found, expected in zip(net(net.prepare(test)), brute_force(net, train, test), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_training_image_is_at_distance_zero_and_banks_travel_in_the_state_dict():
    net, other = RADNetwork(CHANNELS, SIZES), RADNetwork(CHANNELS, SIZES)
    with pytest.raises(RuntimeError, match="filled at the end of fit"):
        other(other.prepare(levels(1)))
    net.set_banks(net.prepare(levels(6)))
    assert net.bank_bytes_per_image * 6 == sum(bank.nbytes for bank in net.banks)
    other.load_state_dict(net.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = other(other.prepare(levels(6)))
    for found in maps:
        assert found.dtype == torch.float32
        assert found.abs().max() < 1e-6  # the cosine of a unit vector with itself, in float32


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (AnomalyDINONetwork, {"neighbors": 0}),
        (AnomalyDINONetwork, {"top_fraction": 0.0}),
        (RADNetwork, {"images": 0}),
        (RADNetwork, {"radius": -1}),
    ],
)
def test_impossible_options_are_refused(network, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        network(CHANNELS, SIZES, **options)
