import pytest
import torch

from models.noisy_bottleneck import NoisyBottleneckNetwork


def small(**options) -> NoisyBottleneckNetwork:
    torch.manual_seed(0)
    return NoisyBottleneckNetwork([4, 6], [(8, 6), (4, 3)], **{"width": 8, "heads": 2} | options)


def levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 8, 6, generator=generator) * 5 + 3, torch.randn(2, 6, 4, 3, generator=generator)]


@pytest.mark.parametrize("attention", ["linear", "softmax", "none"])
def test_features_come_back_on_the_grid_with_every_attention(attention):
    (pair,) = small(attention=attention)(levels())
    assert pair.target.shape == pair.reconstruction.shape == (2, 10, 4, 3)


def test_prepared_features_give_what_the_levels_give():
    network = small().eval()
    (one,), (other,) = network(levels()), network(network.prepare(levels()))
    assert torch.equal(one.reconstruction, other.reconstruction)


def test_channels_are_compared_on_the_scale_of_the_training_images_and_it_is_saved():
    network = small()
    (features,) = network.prepare(levels())
    network.standardise(features.mean((0, 2, 3)), features.std((0, 2, 3)))
    loaded = small()
    loaded.load_state_dict(network.state_dict())
    target = loaded([features])[0].target
    torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std((0, 2, 3)), torch.ones(10))


def test_without_attention_a_position_sees_no_other():
    for attention in ("none", "linear"):
        network = small(attention=attention).eval()
        (features,) = network.prepare(levels())
        moved = features.clone()
        moved[:, :, 0, 0] += 1
        one, other = (network([f])[0].reconstruction for f in (features, moved))
        alone = torch.equal(one[:, :, 1:], other[:, :, 1:])
        assert alone == (attention == "none")


def test_noise_acts_in_training_only():
    network = small(dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(network(levels())[0].reconstruction, network(levels())[0].reconstruction)
    network.eval()
    assert torch.equal(network(levels())[0].reconstruction, network(levels())[0].reconstruction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "relu"}, "linear, softmax, none"),
        ({"heads": 3}, "found 3"),
        ({"blocks": -1}, "found -1"),
        ({"width": 0}, "width=0"),
        ({"grid": (0, 0)}, "must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
