"""Undefined is NaN with a reason, never 0 or 1."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_modules.metrics import METRICS, PIXEL_METRICS, AnomalyMetrics

MAPS = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
NONE = np.zeros((4, 5, 6), dtype=bool)
SOME = NONE.copy()
SOME[:2, 1:3, 1:4] = True


def compute(masks, labels, **options):
    metrics = AnomalyMetrics()
    metrics.update(MAPS, masks, MAPS.max(axis=(1, 2)), labels, ["x"] * 4, range(4), **options)
    return metrics.compute()


def reasons(result, metrics, scope="category"):
    rows = result.table[(result.table.scope == scope) & result.table.metric.isin(metrics)]
    assert rows.value.isna().all()
    return set(rows.reason)


def test_without_an_anomalous_image_nothing_is_defined():
    assert reasons(compute(NONE, [0] * 4), METRICS) == {"no anomalous image"}


def test_without_masks_the_image_metrics_remain():
    result = compute(NONE, [1, 1, 0, 0], has_mask=[False, False, True, True])
    assert reasons(result, PIXEL_METRICS) == {"no mask for any anomalous image"}
    assert not math.isnan(result.value("image_auroc", "x"))


def test_empty_masks_of_anomalous_images_are_said_to_be_empty():
    assert reasons(compute(NONE, [1, 1, 0, 0]), PIXEL_METRICS) == {"no anomalous pixel in the masks"}


def test_without_a_normal_image_only_the_areas_are_undefined():
    result = compute(SOME[[0, 0, 0, 0]], [1] * 4)
    assert reasons(result, ["image_auroc"]) == {"no normal image"}
    assert result.value("image_ap", "x") == 1
    assert result.value("image_f1max", "x") == 1
    assert not math.isnan(result.value("pixel_auroc", "x"))


def test_when_every_pixel_is_anomalous_precision_is_perfect_and_areas_are_undefined():
    result = compute(np.ones_like(NONE), [1] * 4)
    assert reasons(result, ["pixel_auroc", "pixel_aupro"]) == {"no normal pixel"}
    for name in ("pixel_ap", "pixel_f1max", "dsc", "iou"):
        assert result.value(name, "x") == 1


def test_an_image_without_a_mask_does_not_enter_the_pixel_metrics():
    with_all = AnomalyMetrics()
    with_all.update(
        MAPS, SOME, MAPS.max(axis=(1, 2)), [1, 1, 0, 0], ["x"] * 4, range(4), has_mask=[True, False, True, True]
    )
    without = AnomalyMetrics()
    keep = [0, 2, 3]
    without.update(MAPS[keep], SOME[keep], MAPS[keep].max(axis=(1, 2)), [1, 0, 0], ["x"] * 3, range(3))
    first, second = with_all.compute(), without.compute()
    for name in PIXEL_METRICS:
        assert first.value(name, "x") == second.value(name, "x")
    assert first.table.query("metric == 'image_ap' and scope == 'category'").n.item() == 4
    assert first.table.query("metric == 'pixel_ap' and scope == 'category'").n.item() == 3


def test_a_mean_says_how_many_categories_were_defined_and_which_were_not():
    metrics = AnomalyMetrics(["good", "bad", "unseen"])
    metrics.update(MAPS, SOME, MAPS.max(axis=(1, 2)), [1, 1, 0, 0], ["good"] * 4, range(4))
    metrics.update(MAPS, NONE, MAPS.max(axis=(1, 2)), [0] * 4, ["bad"] * 4, range(4, 8))
    result = metrics.compute()
    row = result.table.query("metric == 'pixel_ap' and scope == 'mean'").iloc[0]
    assert (row.n, row.reason) == (1, "undefined in bad")
    assert row.value == result.value("pixel_ap", "good")
    assert "unseen" not in set(result.table.category)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_any_sample_everything_is_undefined():
    result = AnomalyMetrics().compute()
    assert result.table.value.isna().all()
    assert set(result.table[result.table.scope == "mean"].reason) == {"no sample"}
