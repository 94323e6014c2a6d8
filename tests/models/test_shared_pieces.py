"""Masks, positions, attention, blur and neck against independent definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from models.layers.attention import MultiHeadAttention
from models.layers.blur import GaussianBlur, border_index, gaussian_taps
from models.layers.masks import neighbor_mask, window_mask
from models.layers.neck import resize_concatenate
from models.layers.positions import LearnedPosition2d, integer_sine_position, normalized_sine_position

# masks


def test_neighbor_mask_shows_147_keys_in_the_centre_and_180_in_a_corner():
    visible = neighbor_mask((14, 14), 7).sum(dim=1)
    assert (visible.min(), visible.max()) == (147, 180)
    assert visible[0] == 180
    assert visible[7 * 14 + 7] == 147


@pytest.mark.parametrize(
    ("side", "window", "centre", "corner"), [(16, 5, 25, 9), (32, 7, 49, 16), (14, 7, 49, 16), (14, 1, 1, 1)]
)
def test_window_masks_count_as_in_the_papers(side, window, centre, corner):
    counts = window_mask((side, side), window).sum(dim=1).reshape(side, side)
    assert (counts[side // 2, side // 2], counts[0, 0], counts[-1, -1]) == (centre, corner, corner)
    assert torch.equal(neighbor_mask((side, side), window), ~window_mask((side, side), window))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_window_mask_is_its_definition_on_any_rectangle(height, width, rows, columns):
    expected = np.zeros((height * width, height * width), bool)
    for query in range(height * width):
        for key in range(height * width):
            near_row = abs(query // width - key // width) <= rows // 2
            expected[query, key] = near_row and abs(query % width - key % width) <= columns // 2
    assert np.array_equal(window_mask((height, width), (rows, columns)), expected)
    if (~expected).any(axis=1).all():
        assert np.array_equal(neighbor_mask((height, width), (rows, columns)), ~expected)
    else:
        with pytest.raises(ValueError, match="attention over nothing"):
            neighbor_mask((height, width), (rows, columns))


def test_even_windows_act_as_the_next_odd_one_as_released():
    assert torch.equal(window_mask((14, 14), 8), window_mask((14, 14), 9))


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 token"):
        window_mask((14, 14), 0)


# positions


def test_normalized_sine_is_detrs_formula():
    height, width, d = 3, 5, 16
    code = normalized_sine_position(d, (height, width)).reshape(height, width, d)
    for row in range(height):
        for column in range(width):
            for channel in range(d):
                axis, length = (row, height) if channel < d // 2 else (column, width)
                within = channel % (d // 2)
                angle = (axis + 1) / (length + 1e-6) * 2 * math.pi / 10000 ** (2 * (within // 2) / (d // 2))
                expected = math.sin(angle) if within % 2 == 0 else math.cos(angle)
                assert code[row, column, channel].item() == pytest.approx(expected, abs=1e-6)


def test_integer_sine_starts_at_zero_with_the_column_half_first():
    code = integer_sine_position(16, (4, 6)).reshape(4, 6, 16)
    torch.testing.assert_close(code[0, :, 0], torch.arange(6.0).sin())
    torch.testing.assert_close(code[:, 0, 8], torch.arange(4.0).sin())
    torch.testing.assert_close(code[2, :, 3], (torch.arange(6.0) / 10000 ** (2 / 8)).cos())


def test_position_codes_need_widths_that_divide():
    for build in (normalized_sine_position, integer_sine_position):
        with pytest.raises(ValueError, match="divisible by 4"):
            build(6, (2, 2))
    with pytest.raises(ValueError, match="even width"):
        LearnedPosition2d(5, (2, 2))


# attention


def test_attention_equals_torchs_with_positions_on_queries_and_keys_only():
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(24, 4), nn.MultiheadAttention(24, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())  # same names, same shapes
    query, key, value = torch.randn(2, 6, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    query_position, key_position = torch.randn(6, 24), torch.randn(9, 24)
    mask = torch.rand(6, 9) < 0.5
    mask[:, 0] = True
    found = ours(query, key, value, query_position=query_position, key_position=key_position, mask=mask)
    expected, _ = theirs(query + query_position, key + key_position, value, attn_mask=~mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attention_starts_as_torchs_does():
    torch.manual_seed(0)
    attention = MultiHeadAttention(256, 8)
    assert attention.in_proj_weight.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=1e-3)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()


def test_attention_drops_weights_in_training_only():
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(1, 5, 8)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    torch.testing.assert_close(attention(x, x, x), attention(x, x, x))


# blur


@pytest.mark.parametrize(("border", "scipy_mode"), [("reflect", "mirror"), ("symmetric", "reflect")])
@pytest.mark.parametrize("shape", [(40, 33), (9, 7), (3, 20), (1, 5)])
def test_blur_equals_scipy_with_either_border_even_on_maps_smaller_than_the_kernel(border, scipy_mode, shape):
    image = np.random.default_rng(0).normal(size=(2, *shape))
    expected = np.stack([ndimage.gaussian_filter(plane, 4, mode=scipy_mode, truncate=4) for plane in image])
    found = GaussianBlur(4.0, border=border)(torch.from_numpy(image))
    np.testing.assert_allclose(found, expected, atol=2e-7)


@pytest.mark.parametrize(
    ("kernel", "sigma", "taps"),
    [
        (3, 1.0, [0.2741, 0.4519]),
        (5, 5 / 3, [0.1336, 0.2292, 0.2744]),
        (7, 7 / 3, [0.0861, 0.1362, 0.1794, 0.1967]),
        (9, 3.0, [0.0630, 0.0929, 0.1226, 0.1449, 0.1532]),
    ],
)
def test_taps_are_unias_level_kernels(kernel, sigma, taps):
    found = gaussian_taps(sigma, kernel)
    assert found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found, found.flip(0))
    np.testing.assert_allclose(found[: kernel // 2 + 1], taps, atol=6e-5)


def test_sigma_4_has_33_taps_as_in_ulsad():
    assert gaussian_taps(4.0).numel() == 33


def test_borders_extend_as_numpy_pads():
    line = np.arange(6)
    for border in ("reflect", "symmetric"):
        assert np.array_equal(border_index(6, 4, border), np.pad(line, 4, mode=border))
        assert np.array_equal(border_index(3, 11, border), np.pad(np.arange(3), 11, mode=border))


def test_blur_stays_in_float32_under_autocast_and_leaves_no_trace_in_checkpoints():
    blur = GaussianBlur(1.0, kernel=3)
    image = torch.rand(1, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blur(image), GaussianBlur(1.0, kernel=3)(image))
        assert blur(image.bfloat16()).dtype == torch.float32
    assert not blur.state_dict()


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), (float("nan"),), (1.0, 4), (1.0, 0)])
def test_impossible_gaussians_are_refused(arguments):
    with pytest.raises(ValueError, match="Gaussian"):
        GaussianBlur(*arguments)


def test_unknown_border_is_refused():
    with pytest.raises(ValueError, match="border"):
        GaussianBlur(1.0, border="zero")


# neck


def test_neck_samples_sparsely_as_uniads_and_concatenates_lowest_first():
    low, high = torch.randn(2, 3, 29, 15), torch.randn(2, 5, 8, 8)
    neck = resize_concatenate([low, high], (8, 8), align_corners=True)
    assert neck.shape == (2, 8, 8, 8)
    torch.testing.assert_close(neck[:, :3], low[:, :, ::4, ::2])  # i * (H - 1) / 7 is a whole number here
    assert torch.equal(neck[:, 3:], high)


def test_neck_without_corner_alignment_averages_neighbours():
    low = torch.randn(1, 2, 8, 8)
    halves = resize_concatenate([low], (4, 4), align_corners=False)
    torch.testing.assert_close(halves, nn.functional.avg_pool2d(low, 2))
    with pytest.raises(ValueError, match="no feature level"):
        resize_concatenate([], (4, 4))
