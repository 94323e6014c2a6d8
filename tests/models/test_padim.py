"""PaDiM's streamed moments and triangular solves against the formulas of the paper."""

import numpy as np
import pytest
import torch

from models.padim import PaDiMNetwork

CHANNELS, SIZES = (6, 8, 10), [(8, 4), (4, 2), (2, 1)]


def levels(images: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        3 * torch.randn(images, c, *size, generator=generator) + 100 for c, size in zip(CHANNELS, SIZES, strict=True)
    ]


def network(**options) -> PaDiMNetwork:
    return PaDiMNetwork(CHANNELS, SIZES, **{"kept": 9, "generator": torch.Generator().manual_seed(1), **options})


def fitted(train: list[torch.Tensor], splits: list[int]) -> PaDiMNetwork:
    net = network()
    for part in zip(*(level.split(splits) for level in train), strict=True):
        net.update(list(part))
    net.finish()
    return net


def two_pass(net: PaDiMNetwork, train: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (P, k) and covariance (P, k, k) + epsilon by NumPy."""
    vectors = net.embed(train).flatten(2).double().numpy()
    mean = vectors.mean(0).T
    return mean, np.stack([np.cov(vectors[:, :, p].T) for p in range(vectors.shape[2])]) + net.epsilon * np.eye(
        net.kept
    )


@pytest.mark.parametrize("splits", [[12], [5, 1, 6], [1] * 12])
def test_streamed_moments_are_those_of_two_passes(splits):
    train = levels(12)
    net = fitted(train, splits)
    mean, covariance = two_pass(net, train)
    factor = net._full(net.factor)
    np.testing.assert_allclose(net.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(factor @ factor.transpose(1, 2), covariance, rtol=1e-9, atol=1e-9)


def test_triangular_solves_equal_the_explicit_inverse():
    train, test = levels(30), levels(4, seed=2)
    net = fitted(train, [30])
    mean, covariance = two_pass(net, train)
    deviation = net.embed(test).flatten(2).double().numpy().transpose(2, 0, 1) - mean[:, None]
    squared = np.einsum("pbk,pkl,pbl->bp", deviation, np.linalg.inv(covariance), deviation)
    np.testing.assert_allclose(net(test).flatten(1), np.sqrt(squared), rtol=1e-6)


def test_moments_of_several_processes_are_those_of_one():
    train = levels(12)
    whole = fitted(train, [12])
    processes = [network() for _ in range(3)]  # the third sees nothing
    for net, part in zip(processes, zip(*(level.split([7, 5]) for level in train), strict=True), strict=False):
        net.update(list(part))
    processes[2].update([level[:0] for level in train])
    parts = [net.moments() for net in processes]
    total = sum(net.factor for net in processes)
    for net in processes:
        net.factor = total.clone()
        net.merge(parts)
        net.finish()
        torch.testing.assert_close(net.factor, whole.factor, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(net.mean, whole.mean, rtol=1e-12, atol=0)


def test_an_image_equal_to_the_mean_scores_zero_and_a_constant_one_a_number():
    train = [level[:1].repeat(5, 1, 1, 1) for level in levels(1)]
    net = fitted(train, [5])
    assert not net([level[:1] for level in train])[0].any()
    assert net([torch.zeros_like(level[:1]) for level in train]).isfinite().all()


def test_distances_do_not_depend_on_autocast_or_the_batch():
    net, test = fitted(levels(12), [12]), levels(3, seed=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net(test)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, net(test))
    torch.testing.assert_close(torch.cat([net([level[i : i + 1] for level in test]) for i in range(3)]), inside)


def test_a_checkpoint_carries_channels_and_gaussians():
    net, other = fitted(levels(12), [12]), network(generator=torch.Generator().manual_seed(9))
    with pytest.raises(RuntimeError, match="estimated at the end of fit"):
        other(levels(1))
    assert not torch.equal(net.chosen, other.chosen)
    other.load_state_dict(net.state_dict())
    test = levels(2, seed=3)
    assert torch.equal(net(test), other(test))


def test_one_image_is_refused():
    net = network()
    net.update(levels(1))
    with pytest.raises(ValueError, match="at least two training images; found 1"):
        net.finish()


def test_size_is_half_a_matrix_per_position():
    # WideResNet50-2 at 224 pixels, 550 channels.
    with torch.device("meta"):
        net = PaDiMNetwork((256, 512, 1024), [(56, 56), (28, 28), (14, 14)])
    assert net.kept == 550
    assert net.state_bytes == 8 * 56 * 56 * (550 + 550 * 551 // 2)
    assert round(net.state_bytes / 1e9, 1) == 3.8
    assert PaDiMNetwork((64, 128, 256), [(56, 56), (28, 28), (14, 14)]).kept == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kept": None}, "Set model.init_args.kept"), ({"kept": 25}, "1 to 24"), ({"epsilon": 0.0}, "epsilon")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_levels_that_cannot_be_repeated_are_refused():
    with pytest.raises(ValueError, match="divisible by the highest level's stride"):
        PaDiMNetwork((4, 4), [(7, 7), (4, 4)], kept=3)
