"""DeSTSeg's parts beyond the recordings of the released code: starts, losses, options."""

import math

import pytest
import torch
from torch import nn

from models.destseg import Block, DeSTSeg, cosine_loss, distances, focal_loss, small_mask, unit
from models.reconstruction import Pair

CHANNELS = (6, 8, 10)


def small(**options) -> DeSTSeg:
    torch.manual_seed(0)
    return DeSTSeg(CHANNELS, stem=6, segmentation_width=12, **options)


def teacher(batch: int = 2, side: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    strides = zip(CHANNELS, (4, 8, 16), strict=True)
    return DeSTSeg.prepare(None, [torch.randn(batch, c, side // s, side // s, generator=generator) for c, s in strides])


def images(batch: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))


def test_levels_have_the_teachers_shapes_also_for_rectangles():
    network = small().eval()
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.rand(1, c, 64 // s, 96 // s, generator=generator) for c, s in zip(CHANNELS, (4, 8, 16), strict=True)
    ]
    pairs = network(levels, torch.randn(1, 3, 64, 96))
    assert [tuple(pair.reconstruction.shape) for pair in pairs] == [tuple(level.shape) for level in levels]
    assert network.segment(pairs).shape == (1, 1, 16, 24)


def test_the_networks_start_as_released():
    network = DeSTSeg([64, 128, 256])
    encoder = [m for m in network.student.encoder.modules() if isinstance(m, Block)]
    decoder = [m for m in network.student.decoder.modules() if isinstance(m, Block)]
    assert all(not block.bn2.weight.any() for block in encoder)
    assert all(bool((block.bn2.weight == 1).all()) for block in decoder)
    assert network.segmentation.blocks[1].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)
    uniform = 1 / math.sqrt(3 * 256 * 9)  # of torch's default: uniform up to 1 / sqrt(fan-in)
    assert network.segmentation.head[1].weight.std().item() == pytest.approx(uniform, rel=0.01)


def test_equal_features_are_at_distance_zero_and_their_products_sum_to_minus_one():
    levels = [level + 0.1 for level in teacher()]
    pairs = [Pair(unit(level), unit(3 * level)) for level in levels]
    for distance in distances(pairs):
        assert distance.abs().max() < 1e-6
    products = small().segmentation_inputs(pairs)
    assert products.shape[1] == sum(CHANNELS)
    torch.testing.assert_close(products[:, : CHANNELS[0]].sum(1), -torch.ones(2, 16, 16))


def test_a_zero_vector_has_no_direction_and_breaks_no_gradient():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit(features).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_the_students_loss_is_a_sum_over_images():
    pairs = [Pair(unit(t), unit(torch.rand_like(t))) for t in teacher()]
    twice = [Pair(torch.cat([t, t]), torch.cat([s, s])) for t, s in pairs]
    assert float(cosine_loss(twice)) == pytest.approx(2 * float(cosine_loss(pairs)), rel=1e-5)


def test_a_cell_of_the_small_mask_is_its_central_four_pixels_and_ties_count():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[0, 0, 1, 1:3] = True  # two of the central four of the first cell
    mask[0, 0, 5, 5] = True  # one of the last
    mask[0, 0, 0, 4:] = True  # only the border of the second
    assert small_mask(mask, (2, 2))[0, 0].tolist() == [[1, 0], [0, 0]]


def test_the_focal_loss_is_finite_for_sure_and_wrong():
    probability = torch.tensor([[[[1.0, 0.0, 0.5]]]])
    mask = torch.tensor([[[[0.0, 1.0, 1.0]]]])
    loss = focal_loss(probability, mask, 4.0)
    assert torch.isfinite(loss)
    sure = focal_loss(torch.tensor([[[[0.9]]]]), torch.ones(1, 1, 1, 1), 4.0)
    assert float(sure) == pytest.approx(-(0.1**4) * math.log(0.9), rel=1e-4)


@pytest.mark.parametrize(("kind", "channels"), [("products", 24), ("concatenated", 48), ("cosine", 3)])
def test_every_input_of_the_segmentation_network_has_its_channels(kind, channels):
    network = small(segmentation_input=kind).eval()
    pairs = network(teacher(), images())
    assert network.segmentation_inputs(pairs).shape == (2, channels, 16, 16)
    assert network.segment(pairs).shape == (2, 1, 16, 16)


def test_without_a_decoder_the_student_is_the_encoders_first_three_stages():
    network = small(decoder=False)
    assert [tuple(level.shape) for level in network.student(images())] == [(2, 6, 16, 16), (2, 8, 8, 8), (2, 10, 4, 4)]
    pairs = network(teacher(), images())
    cosine_loss(pairs).backward()
    assert all(p.grad is not None for p in network.student.parameters())


def test_every_parameter_is_trained_in_its_phase():
    network = small()
    pairs = network(teacher(), images())
    cosine_loss(pairs).backward()
    assert all(p.grad is not None for p in network.student.parameters())
    assert all(p.grad is None for p in network.segmentation.parameters())
    network.segment([Pair(t, s.detach()) for t, s in pairs]).mean().backward()
    assert all(p.grad is not None for p in network.segmentation.parameters())


def test_the_teacher_is_rectified_which_leaves_a_resnet_alone():
    levels = teacher()
    assert all(torch.equal(a, b) for a, b in zip(levels, DeSTSeg.prepare(None, levels), strict=True))
    assert float(DeSTSeg.prepare(None, [torch.tensor([[[[-1.0]]]])])[0]) == 0.0


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((6, 8), {}, "three levels"),
        (CHANNELS, {"segmentation_input": "sum"}, "segmentation_input names"),
        (CHANNELS, {"widths": (6, 8, 10)}, "four stages"),
        (CHANNELS, {"widths": (5, 8, 10, 20), "decoder": False}, "as wide as the teacher"),
    ],
)
def test_wrong_options_are_named(channels, options, message):
    with pytest.raises(ValueError, match=message):
        DeSTSeg(channels, **options)


def test_nothing_but_batch_norm_differs_between_training_and_scoring():
    kinds = {type(module) for module in small().modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}
