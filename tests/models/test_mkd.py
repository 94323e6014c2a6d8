"""MKD's cloner and maps: what a score reads, and that an image's map is its own."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import mkd
from models.reconstruction import Pair

CHANNELS, STRIDES = (6, 8), (2, 4)


@pytest.fixture
def network() -> mkd.MKD:
    torch.manual_seed(0)
    return mkd.MKD(CHANNELS, STRIDES, pooled=False).eval()


def targets(images: int, side: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(images, c, side // s, side // s, generator=generator) for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]


def test_the_cloner_gives_rectified_levels_of_the_sources_shapes_and_all_of_it_is_trained(network):
    pairs = network.train()(targets(3), torch.rand(3, 3, 16, 16))
    assert [pair.reconstruction.shape for pair in pairs] == [pair.target.shape for pair in pairs]
    assert all((pair.reconstruction >= 0).all() for pair in pairs)
    mkd.loss(pairs, 0.5).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_lowest_level_is_learned_but_not_scored_and_the_weight_is_the_squares(network):
    pairs = network(targets(2), torch.rand(2, 3, 16, 16))
    expected_score, expected_loss = np.zeros(2), 0.0
    for number, (target, clone) in enumerate(pairs):
        for b in range(2):
            x, y = (part[b].double().flatten().detach().numpy() for part in (target, clone))
            distance = 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) + 0.3 * np.mean((x - y) ** 2)
            expected_loss += distance / 2
            expected_score[b] += distance * (number > 0)
    np.testing.assert_allclose(mkd.image_scores(pairs, 0.3).detach(), expected_score, rtol=1e-5)
    assert mkd.loss(pairs, 0.3).item() == pytest.approx(expected_loss, rel=1e-5)


def test_an_images_gradient_does_not_depend_on_its_batch_and_works_in_inference_mode(network):
    images, levels = torch.rand(3, 3, 16, 16), targets(3)

    def score(pick):
        return lambda x: mkd.image_scores(network([level[pick] for level in levels], x), 0.5)

    with torch.inference_mode():
        alone = [mkd.pixel_gradient(score(slice(b, b + 1)), images[b : b + 1])[0] for b in range(3)]
        together, scores = mkd.pixel_gradient(score(slice(0, 3)), images)
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.abs().amax() > 0
    torch.testing.assert_close(scores, score(slice(0, 3))(images).detach())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_stretching_goes_by_an_images_own_99th_percentile_and_a_constant_map_stays_finite():
    maps = torch.stack([torch.rand(20, 30) * 7 + 3, torch.full((20, 30), 4.0)])
    found = mkd.stretched(maps, 0.99)
    grey = maps[0].numpy()
    low, high = grey.min(), np.percentile(grey, 99)
    np.testing.assert_allclose(found[0], np.clip((grey - low) / (high - low), 0, 1), atol=1e-6)
    assert (found[1] == 0).all()


def test_guided_relus_let_only_positive_gradients_of_active_units_through():
    x = torch.tensor([-1.0, 2.0, 3.0, -4.0], requires_grad=True)
    y = mkd.guided_relu(x)
    assert torch.equal(y.detach(), F.relu(x).detach())
    y.backward(torch.tensor([5.0, -6.0, 7.0, -8.0]))
    assert x.grad.tolist() == [0, 0, 7, 0]


def test_opening_removes_what_is_smaller_than_the_cross_also_at_the_border():
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 1] = 1  # a single pixel
    maps[0, 4, 3:6] = maps[0, 3:6, 4] = 2  # the cross itself
    maps[0, :2, 6:] = 3  # a corner: outside the image nothing is eroded
    found = mkd.opened(maps)
    assert found[0, 1, 1] == 0
    assert (found[0, 4, 3:6] == 2).all()
    assert (found[0, 3:6, 4] == 2).all()
    assert found[0, 0, 7] == 3


def test_negative_values_of_a_source_are_not_to_be_learned(network):
    levels = network.prepare([level - 0.5 for level in targets(1)])
    assert min(level.min().item() for level in levels) == 0
    pooled = mkd.MKD(CHANNELS, STRIDES, pooled=True).prepare(targets(1))
    assert [level.shape[-1] for level in pooled] == [4, 2]


def test_the_noise_of_both_rules_scales_with_the_images_range():
    images = torch.stack([torch.rand(3, 8, 8), torch.rand(3, 8, 8) * 0.5])
    span = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    torch.testing.assert_close(mkd.noise_std(images, "smoothgrad"), 0.05 * span)
    torch.testing.assert_close(mkd.noise_std(images, "released"), (0.05 / span) ** 2)


@pytest.mark.parametrize(
    ("channels", "strides", "options", "message"),
    [
        ((8,), (4,), {}, "at least two levels"),
        ((8, 8), (4, 12), {}, "powers of two"),
        ((8, 8), (4, 4), {}, "powers of two"),
        ((8, 8), (2, 4), {"stages": [[4, 8]]}, "needs 2 stages"),
        ((8, 8), (2, 4), {"stages": [[4, 8], [4, 9]]}, "must end in the 8 channels"),
        ((8, 8), (2, 4), {"stages": [[4, 8], [4, 8]], "equal_size": True}, "give one of them"),
    ],
)
def test_a_plan_that_does_not_fit_the_source_is_refused(channels, strides, options, message):
    with pytest.raises(ValueError, match=message):
        mkd.MKD(channels, strides, **options)


def test_a_perfect_cloner_scores_zero():
    levels = targets(2)
    scores = mkd.image_scores([Pair(level, level.clone()) for level in levels], 0.5)
    assert scores.abs().max() < 1e-6
