"""Folding up-sampling and convolutions into one map must change nothing but the time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.layers.linear_head import UpsampleConvolutions


@pytest.mark.parametrize("out_size", [(12, 15), (6, 5), (8, 32), (5, 5)])
def test_folded_heads_give_what_the_plain_convolutions_give_with_the_same_gradients(out_size):
    torch.manual_seed(0)
    head = UpsampleConvolutions(3, 2, (3, 5), out_size, folded=True).double()
    for convolution in head.convolutions:
        nn.init.normal_(convolution.bias)
    head._apply(lambda tensor: tensor.double())
    grid = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    plain = F.interpolate(grid, out_size, mode="bilinear", align_corners=True)
    for convolution in head.convolutions:
        plain = F.conv2d(plain, convolution.weight, convolution.bias, padding=1)
    folded = head(grid)
    assert folded.shape == (2, 2, *out_size)
    assert torch.allclose(folded, plain, rtol=0, atol=1e-6)
    direction = torch.randn_like(plain)
    inputs = [grid, *head.parameters()]
    for one, other in zip(
        torch.autograd.grad(folded, inputs, direction), torch.autograd.grad(plain, inputs, direction), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "channels", "grid", "size", "folded"),
    [
        (256, 24, 14, 112, True),
        (256, 32, 14, 56, True),
        (256, 56, 14, 28, False),
        (256, 160, 14, 14, False),
        (64, 64, 8, 64, False),
        (64, 1, 2, 4, False),  # too small for the bias image
    ],
)
def test_heads_fold_by_themselves_only_where_it_saves_work(width, channels, grid, size, folded):
    assert UpsampleConvolutions(width, channels, (grid, grid), (size, size)).folded is folded


def test_plain_and_folded_heads_load_each_others_weights():
    folded = UpsampleConvolutions(2, 3, (2, 2), (8, 8), folded=True)
    plain = UpsampleConvolutions(2, 3, (2, 2), (8, 8), folded=False)
    plain.load_state_dict(folded.state_dict())
    grid = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(folded(grid), plain(grid), atol=1e-5)


def test_a_head_that_cannot_be_folded_says_so():
    with pytest.raises(ValueError, match="at least 5x5"):
        UpsampleConvolutions(2, 2, (2, 2), (4, 4), folded=True)
