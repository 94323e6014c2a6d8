"""RD4AD's sizes, its loss and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from models.rd4ad import RD4AD, cosine_loss
from models.reconstruction import Pair

SIZES = [(8, 8), (4, 4), (2, 2)]


BASIC = {"block": "basic", "width_per_group": 64, "embedding_blocks": 2, "decoder_blocks": (2, 2, 2)}


@pytest.mark.parametrize(
    ("options", "channels", "embedding", "decoder"),
    [
        ({}, (256, 512, 1024), 67_277_824 - 8_392_704, 24_917_504),
        (BASIC, (64, 128, 256), 12_205_312 - 525_312, 3_703_168),
    ],
)
def test_released_sizes_without_what_nothing_uses(options, channels, embedding, decoder):
    with torch.device("meta"):
        net = RD4AD(channels, [(64, 64), (32, 32), (16, 16)], **options)
        pairs = net([torch.empty(2, c, s, s) for c, s in zip(channels, (64, 32, 16), strict=True)])
    assert sum(p.numel() for p in net.embedding.parameters()) == embedding
    assert sum(p.numel() for p in net.decoder.parameters()) == decoder
    assert [pair.reconstruction.shape for pair in pairs] == [pair.target.shape for pair in pairs]


def test_loss_takes_one_cosine_per_image_and_level():
    generator = torch.Generator().manual_seed(0)
    pairs = [Pair(*(torch.rand(3, 5, s, s, generator=generator) for _ in range(2))) for s in (4, 2)]
    expected = 0.0
    for target, output in pairs:
        for a, b in zip(target, output, strict=True):
            expected += (1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) / 3
    assert cosine_loss(pairs).item() == pytest.approx(float(expected), abs=1e-6)


def test_every_parameter_is_trained_and_outputs_are_rectified_as_the_teachers():
    torch.manual_seed(0)
    net = RD4AD((8, 16, 32), SIZES, decoder_blocks=(1, 2, 1), embedding_blocks=2)
    pairs = net([torch.rand(2, c, s, s) for c, (s, _) in zip((8, 16, 32), SIZES, strict=True)])
    loss = cosine_loss(pairs)
    loss.backward()
    assert 0 <= loss.item() <= 3
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all((pair.reconstruction >= 0).all() for pair in pairs)


@pytest.mark.parametrize(
    ("channels", "sizes", "options", "message"),
    [
        ((8, 16), SIZES[:2], {}, "levels are 2, 3 and 4"),
        ((8, 16, 32), [(8, 8), (4, 4), (4, 4)], {}, "8x8, 4x4, 4x4"),
        ((8, 16, 32), [(12, 12), (6, 6), (3, 3)], {}, "divisible by twice"),
        ((6, 16, 32), SIZES, {}, "divisible by 4"),
        ((8, 16, 32), SIZES, {"block": "wide"}, "bottleneck, basic"),
        ((8, 16, 32), SIZES, {"decoder_blocks": (1, 0, 1)}, "at least one block"),
    ],
)
def test_what_does_not_fit_is_refused(channels, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        RD4AD(channels, sizes, **options)


def test_a_single_position_in_training_is_refused_with_the_reason():
    net = RD4AD((8, 16, 32), SIZES)
    features = [torch.rand(1, c, s, s) for c, (s, _) in zip((8, 16, 32), SIZES, strict=True)]
    with pytest.raises(ValueError, match="more than one image per batch"):
        net(features)
    net.eval()(features)
