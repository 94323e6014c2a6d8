"""SegF1 in both readings against counting pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_modules.metrics import AnomalyMetrics


def brute(maps, masks, limit):
    hit = false = missed = 0
    single = []
    for one, mask in zip(maps, masks, strict=True):
        said = one.astype(np.float64) > limit
        tp, fp, fn = (said & mask).sum(), (said & ~mask).sum(), (~said & mask).sum()
        hit, false, missed = hit + tp, false + fp, missed + fn
        single.append(2 * tp / (2 * tp + fp + fn) if mask.any() else float(not said.any()))
    return 2 * hit / (2 * hit + false + missed), np.mean(single)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    maps = (rng.integers(-3, 12, (14, 9, 8)) / np.float32(10)).astype(np.float32)  # ties, also with the thresholds
    masks = rng.random(maps.shape) < 0.2
    labels = np.arange(14) % 3 > 0
    masks[~labels] = False
    return maps, masks, labels, ["a" if n < 8 else "b" for n in range(14)]


def test_both_readings_equal_counting(sample):
    maps, masks, labels, categories = sample
    metrics = AnomalyMetrics({"a": "mvtec_ad_2", "b": "mvtec_ad_2"})
    metrics.update(maps, masks, maps.max((1, 2)), labels.astype(int), categories, np.arange(14))
    metrics.compute()
    for limits in ({"a": 0.7, "b": 0.2}, {"a": float(np.float32(0.7)), "b": 1.05}, {"a": -0.3, "b": -1.0}):
        found = metrics.segmentation(limits)
        expected = {}
        for name in "ab":
            mine = np.array([c == name for c in categories])
            expected[name] = brute(maps[mine], masks[mine], limits[name])
            for metric, value in zip(("seg_f1", "seg_f1_images"), expected[name], strict=True):
                assert found.value(metric, name) == pytest.approx(value, abs=1e-15)
            assert found.value("seg_f1_threshold", name) == limits[name]
        for place, metric in enumerate(("seg_f1", "seg_f1_images")):
            mean = np.mean([pair[place] for pair in expected.values()])
            assert found.value(metric) == pytest.approx(mean, abs=1e-15)
        assert "mean + 3 standard deviations" in found.definitions["seg_f1"]


def test_a_category_without_a_threshold_or_a_defect_has_a_reason_and_no_value(sample):
    maps, masks, labels, categories = sample
    masks = masks & (np.array(categories) == "a")[:, None, None]
    metrics = AnomalyMetrics(["a", "b", "c"])
    metrics.update(maps, masks, maps.max((1, 2)), labels.astype(int), categories, np.arange(14))
    metrics.update(maps[:1], masks[:1], [0.0], [0], ["c"], [20])
    metrics.compute()
    table = metrics.segmentation({"a": 0.5, "b": 0.5}).table
    reasons = table[table.metric == "seg_f1"].set_index("category").reason
    assert reasons["a"] == ""
    assert reasons["b"] == "no anomalous pixel in the masks"
    assert reasons["c"] == "no normal image for a threshold"
    assert reasons[""] == "undefined in b, c"


def test_without_kept_maps_it_is_refused(sample):
    metrics = AnomalyMetrics(metrics=["image_auroc"])
    with pytest.raises(ValueError, match="needs all maps"):
        metrics.segmentation({})
