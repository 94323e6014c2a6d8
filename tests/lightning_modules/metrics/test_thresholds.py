"""Thresholds from normal images: what they promise, and that they keep it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_modules.metrics import (
    PixelCollector,
    RateError,
    images_needed,
    lowest_rate,
    p_values,
    threshold,
)


@pytest.mark.parametrize(("alpha", "n"), [(0.05, 19), (0.1, 29), (0.1, 33), (0.29, 99), (0.5, 4)])
@pytest.mark.parametrize("draw", ["normal", "lognormal", "tied"])
def test_false_alarms_are_no_more_than_promised_and_hardly_fewer_without_ties(alpha, n, draw):
    """Coverage over many draws of n held-out images and one new good image each, whatever the distribution."""
    rng = np.random.default_rng(n)
    trials = 4000
    scores = {
        "normal": lambda: rng.normal(size=(trials, n + 1)),
        "lognormal": lambda: rng.lognormal(sigma=3, size=(trials, n + 1)),
        "tied": lambda: rng.integers(0, 6, (trials, n + 1)).astype(float),
    }[draw]()
    found = [threshold(row[:-1], alpha=alpha) for row in scores]
    alarms = np.mean(scores[:, -1] > [one.value for one in found])
    rate = found[0].rate
    assert rate <= alpha
    error = 4 * math.sqrt(rate * (1 - rate) / trials)  # four standard errors
    assert alarms <= rate + error
    if draw != "tied":
        assert alarms >= rate - error
        assert rate > alpha - 1 / (n + 1)  # no more is given away than the step between two images


def test_the_default_is_the_highest_normal_score_with_the_rate_that_it_implies():
    found = threshold([0.3, 0.9, 0.5])
    assert (found.value, found.rule, found.n) == (0.9, "max", 3)
    assert found.rate == pytest.approx(1 / 4)


@pytest.mark.parametrize("alpha", [0.3, 0.1, 0.07, 0.05, 0.01, 0.003])
def test_the_images_a_rate_needs_are_the_fewest_that_do_not_refuse_it(alpha):
    rng = np.random.default_rng(0)
    n = images_needed(alpha)
    assert threshold(rng.normal(size=n), alpha=alpha).rate <= alpha
    with pytest.raises(RateError, match=rf"lowest that they can is 1/{n} .*needs {n}"):
        threshold(rng.normal(size=n - 1), alpha=alpha)
    assert lowest_rate(n) <= alpha < lowest_rate(n - 1)


def test_a_p_value_is_at_most_alpha_exactly_above_the_threshold():
    rng = np.random.default_rng(3)
    normal = rng.integers(0, 40, 57) / 8  # ties
    scores = np.concatenate([normal, rng.uniform(-1, 6, 200)])
    for alpha in (0.02, 0.05, 0.1, 0.5):
        above = scores > threshold(normal, alpha=alpha).value
        np.testing.assert_array_equal(above, p_values(scores, normal) <= alpha + 1e-12)
    assert p_values(np.array([99.0]), normal)[0] == 1 / 58
    assert np.isnan(p_values(np.array([np.nan]), normal)[0])


def test_published_rules_are_of_all_pixels_where_there_are_any_else_of_the_scores():
    rng = np.random.default_rng(4)
    maps = rng.gamma(2, size=(7, 40, 50)).astype(np.float32)
    collector, other = PixelCollector(), PixelCollector()
    for number, one in enumerate(maps):
        (collector if number < 3 else other).add(one)
    collector.merge(other)
    pixels = collector.statistics()
    exact = maps.astype(np.float64)
    assert pixels.count == exact.size
    np.testing.assert_allclose(
        [pixels.mean, pixels.sd, pixels.p95, pixels.p99, pixels.highest],
        [exact.mean(), exact.std(), np.percentile(exact, 95), np.percentile(exact, 99), exact.max()],
        rtol=1e-6,  # float32 pixels
    )
    highest = exact.max((1, 2))
    assert threshold(highest, "mean_3sd", pixels=pixels).value == pytest.approx(exact.mean() + 3 * exact.std())
    assert threshold(highest, "p95_factor", pixels=pixels).value == pytest.approx(
        1.421 * np.percentile(exact, 95), rel=1e-6
    )
    assert threshold(highest, "mean_3sd").value == pytest.approx(highest.mean() + 3 * highest.std())
    assert threshold(highest, "p95_factor").value == pytest.approx(1.421 * np.percentile(highest, 95))
    assert math.isnan(threshold(highest, "mean_3sd").rate)


def test_percentiles_of_large_maps_are_of_pixels_from_all_places(monkeypatch):
    ramp = np.linspace(0, 1, 400 * 300, dtype=np.float32).reshape(400, 300)
    collector = PixelCollector()
    collector.add(ramp)
    assert sum(map(len, collector._parts)) == PixelCollector.EACH
    assert collector.statistics().p95 == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "above 0 and below 1"),
        ({"alpha": 1.0}, "above 0 and below 1"),
        ({"rule": "median"}, "allowed are max, conformal, mean_3sd, p95_factor"),
        ({"rule": "conformal"}, "needs alpha"),
        ({"rule": "max", "alpha": 0.1}, "takes no alpha"),
    ],
)
def test_options_that_say_nothing_or_two_things_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        threshold(np.arange(50.0), **options)


def test_no_score_or_one_that_is_not_finite_gives_no_threshold():
    with pytest.raises(ValueError, match="no normal score"):
        threshold([])
    with pytest.raises(ValueError, match="1 of 2 normal scores are not finite"):
        threshold([1.0, np.nan])
    with pytest.raises(ValueError, match="multiplies a percentile"):
        threshold([-2.0, -1.0], "p95_factor")
