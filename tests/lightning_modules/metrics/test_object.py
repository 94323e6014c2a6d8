"""`AnomalyMetrics` is a plain object: what a user may do with it, and what it is not."""

from __future__ import annotations

import copy
import pickle

import pandas as pd
import pytest
import torchmetrics

from lightning_modules.metrics import AnomalyMetrics


def test_it_does_not_pretend_to_be_a_torchmetrics_metric():
    metrics = AnomalyMetrics()
    assert not isinstance(metrics, torchmetrics.Metric)
    assert not hasattr(metrics, "state_dict")
    with pytest.raises(ValueError, match="not a instance of"):
        torchmetrics.MetricCollection([metrics])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metrics: pickle.loads(pickle.dumps(metrics))])
def test_a_copy_has_its_own_samples(problem, duplicate):
    p = problem(43, images=9, categories=2)
    metrics = p.feed(AnomalyMetrics(["c0", "c1"]), order=range(6))
    before = metrics.compute().table
    other = duplicate(metrics)
    pd.testing.assert_frame_equal(before, other.compute().table, check_exact=True)
    p.feed(other, order=range(6, 9))
    pd.testing.assert_frame_equal(before, metrics.compute().table, check_exact=True)
    pd.testing.assert_frame_equal(p.compute().table, other.compute().table, check_exact=True)
    metrics.reset()
    pd.testing.assert_frame_equal(p.compute().table, other.compute().table, check_exact=True)


def test_maps_on_disk_are_not_copied_but_the_reason_is_said(problem, tmp_path):
    metrics = problem(44).feed(AnomalyMetrics(maps_directory=tmp_path))
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="keep them in memory"):
            duplicate(metrics)


def test_a_result_can_be_pickled(problem):
    result = problem(45).compute()
    again = pickle.loads(pickle.dumps(result))
    pd.testing.assert_frame_equal(result.table, again.table, check_exact=True)
    assert (again.version, again.definitions) == (result.version, result.definitions)
