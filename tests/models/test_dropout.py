"""The quick dropout is a dropout: the same probability, the same expectation, and nothing in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.layers import attention as attention_module
from models.layers.attention import attention
from models.layers.dropout import Dropout, dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_it_hides_its_share_and_keeps_the_expectation(probability):
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 1000), probability)
    deviation = (probability * (1 - probability) / 1e6) ** 0.5
    assert abs((out == 0).double().mean().item() - probability) < 5 * deviation + 1 / 65536
    assert abs(out.double().mean().item() - 1) < 5 * deviation / (1 - probability)
    assert len(out.unique()) == 2


def test_neighbouring_elements_are_independent():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(4_000_000), 0.5) > 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert abs((kept[:-distance] * kept[distance:]).mean().item()) < 5 * 0.25 / 2000


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 0, 3)])
def test_any_shape_and_its_gradient(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.25)
    out.sum().backward()
    assert out.shape == x.shape
    torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, out / x).detach())


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends_are_all_and_nothing(probability, expected):
    assert (Dropout(probability)(torch.ones(100)) == expected).all()


def test_it_follows_the_global_seed_and_rests_in_eval_mode():
    x, layer = torch.randn(50), Dropout(0.5)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)


def test_a_probability_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Dropout(1.5)


def test_attention_with_dropout_is_torchs_attention_around_the_dropped_weights(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    mask = torch.rand(6, 6, generator=generator) > 0.3
    mask.fill_diagonal_(True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    monkeypatch.setattr(attention_module, "dropout", lambda weights, probability: weights)
    torch.testing.assert_close(attention(query, key, value, mask, 0.1), expected)
    monkeypatch.setattr(attention_module, "dropout", lambda weights, probability: 2 * weights)
    torch.testing.assert_close(attention(query, key, value, mask, 0.1), 2 * expected)
