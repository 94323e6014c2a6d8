"""The core: maps sorted one by one, and counts in stretches of the axis of scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_modules.metrics import AnomalyMetrics, pixels
from lightning_modules.metrics.keys import HIGHEST, LOWEST, float_to_key, key_to_float
from lightning_modules.metrics.regions import find_regions
from lightning_modules.metrics.store import Maps

FLOATS = np.array(
    [
        -np.finfo(np.float32).max,
        -1,
        -1e-45,
        -0.0,
        0.0,
        1e-45,
        1,
        np.nextafter(np.float32(1), 2),
        np.finfo(np.float32).max,
    ],
    dtype=np.float32,
)


@pytest.fixture
def tiny_stretches(monkeypatch):
    """Every score is the lower edge of a stretch."""
    monkeypatch.setattr(pixels, "STRETCH", 1)
    monkeypatch.setattr(pixels, "STRETCHES", 1 << 30)
    monkeypatch.setattr(pixels, "SAMPLES", 1 << 30)


def test_keys_are_ordered_like_the_scores_and_come_back():
    keys = float_to_key(FLOATS)
    assert (np.diff(keys) >= 0).all()
    assert ((np.diff(keys) == 0) == (np.diff(FLOATS) == 0)).all()  # zeros of both signs have one key
    assert [key_to_float(int(key)) for key in keys] == FLOATS.tolist()
    assert LOWEST < keys.min() < keys.max() < HIGHEST
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            float_to_key(np.array([0, value, 1], dtype=np.float32))


def test_a_sorted_map_holds_every_pixel_once_and_the_area_of_its_region():
    rng = np.random.default_rng(0)
    masks = np.stack([np.zeros((5, 6), bool), np.ones((5, 6), bool), rng.random((5, 6)) < 0.5])
    maps = Maps()
    scores = rng.integers(0, 9, (3, 30)).astype(np.float32)
    found = find_regions(masks)
    for values, regions in zip(scores, found, strict=True):
        maps.append(float_to_key(values), regions)
    for number, row in enumerate(maps.read()):
        mask = masks[number].ravel()
        assert maps.size(number) == 30
        np.testing.assert_array_equal(row.normal, np.sort(float_to_key(scores[number][~mask])))
        areas = np.zeros(30, dtype=int)
        areas[found[number].index()] = found[number].areas[np.repeat(found[number].labels, found[number].lengths)]
        expected = sorted(zip(float_to_key(scores[number]).tolist(), areas.tolist(), strict=True))
        expected = [pair for pair in expected if pair[1]]
        assert list(zip(row.anomalous.tolist(), row.areas.tolist(), strict=True)) == expected


@pytest.mark.parametrize("levels", [0, 3, 12])
@pytest.mark.parametrize("seed", range(4))
def test_stretches_of_single_scores_equal_the_slow_reference(problem, reference, tiny_stretches, seed, levels):
    p = problem(seed, levels=levels)
    result = p.compute()
    for name, value in reference(p.maps, p.masks).all().items():
        assert result.value(name, "c0") == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("small", [False, True])
def test_scores_on_both_sides_of_zero_and_of_every_magnitude_equal_the_slow_reference(reference, request, small):
    if small:
        request.getfixturevalue("tiny_stretches")
    rng = np.random.default_rng(3)
    maps = rng.choice(FLOATS, (4, 7, 8))
    maps[2:] = np.copysign(10.0 ** rng.uniform(-44, 38, (2, 7, 8)), rng.normal(size=(2, 7, 8)))
    masks = rng.random(maps.shape) < 0.3
    masks[3] = False
    metrics = AnomalyMetrics()
    metrics.update(maps, masks, np.zeros(4), masks.any(axis=(1, 2)).astype(int), ["c"] * 4, range(4))
    result = metrics.compute()
    for name, value in reference(maps, masks).all().items():
        assert result.value(name, "c") == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_a_score_that_most_pixels_share_needs_no_memory_for_them(problem, monkeypatch):
    monkeypatch.setattr(pixels, "STRETCH", 1)
    p = problem(5, images=8, size=(30, 30))
    p.maps = np.maximum(p.maps, 0)  # half of the pixels are zero, as behind a ReLU
    before = p.compute().table
    longest = []
    count = pixels._count
    monkeypatch.setattr(
        pixels, "_count", lambda s, normal, *rest: longest.append(len(normal[0])) or count(s, normal, *rest)
    )
    after = p.compute(pooled=False, threads=1).table
    category = before[before.scope == "category"].reset_index(drop=True)
    pd.testing.assert_frame_equal(after[after.scope == "category"].reset_index(drop=True), category, check_exact=True)
    assert 0 < max(longest) < p.maps.size / 10


def test_maps_in_any_memory_layout_are_read_alike(problem, tmp_path):
    p = problem(42, images=5, size=(8, 8))
    before = p.compute().table
    p.maps = np.asfortranarray(p.maps)
    for options in ({}, {"maps_directory": tmp_path}):
        metrics = AnomalyMetrics(**options)
        metrics.update(p.maps, p.masks, p.scores, p.labels, p.categories, range(5))
        pd.testing.assert_frame_equal(before, metrics.compute().table, check_exact=True)
