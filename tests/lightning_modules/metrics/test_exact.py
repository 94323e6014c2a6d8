"""Numbers against scikit-learn and against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from lightning_modules.metrics import AnomalyMetrics

LEVELS = [0, 3, 12]


def f1_max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(8))
def test_image_and_pixel_rankings_equal_sklearn(problem, seed, levels):
    p = problem(seed, images=9, size=(16, 17), levels=levels, categories=2)
    result = p.compute(categories={"c0": "d", "c1": "d"})
    names = np.array(p.categories)
    for category, chosen in (("c0", names == "c0"), ("c1", names == "c1"), ("", names != "")):
        scope = None if category else "pooled"
        pixels = (p.masks[chosen].ravel(), p.maps[chosen].ravel())
        images = (p.labels[chosen], p.scores[chosen])
        for prefix, (labels, scores) in (("pixel", pixels), ("image", images)):
            if len(set(labels)) < 2:
                continue
            value = lambda name: result.value(f"{prefix}_{name}", category, scope)  # noqa: B023, E731
            assert value("auroc") == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
            assert value("ap") == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
            assert value("f1max") == pytest.approx(f1_max(labels, scores), abs=1e-12)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("seed", range(8))
def test_every_overlap_and_aupro_equals_the_slow_reference(problem, reference, seed, levels):
    p = problem(100 + seed, levels=levels)
    result = p.compute()
    for name, value in reference(p.maps, p.masks).all().items():
        assert result.value(name, "c0") == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.77, 1.0])
def test_aupro_equals_the_slow_reference_at_every_limit(problem, reference, limit, connectivity):
    for seed, levels in ((1, 0), (2, 3), (3, 12)):
        p = problem(seed, levels=levels)
        result = p.compute(fpr_limits=[limit], connectivity=connectivity)
        name = "pixel_aupro" if limit == 0.3 else f"pixel_aupro_{limit:g}"
        assert result.value(name, "c0") == pytest.approx(
            reference(p.maps, p.masks).aupro(limit, connectivity), abs=1e-12
        )


def special(name):
    maps = np.random.default_rng(5).normal(size=(3, 6, 7)).astype(np.float32)
    masks = np.zeros((3, 6, 7), dtype=bool)
    if name == "single pixels":
        masks[0, 0, 0] = masks[0, 5, 6] = masks[1, 3, 3] = True
    elif name == "regions that touch at a corner":
        masks[0, 1:3, 1:3] = masks[0, 3:5, 3:5] = True
    elif name == "a ring around a region":
        masks[0, 0:5, 0:5] = True
        masks[0, 1:4, 1:4] = False
        masks[0, 2, 2] = True
    elif name == "constant maps":
        maps[:] = 2.5
        masks[0, 2:4, 2:5] = True
    elif name == "an image that is anomalous everywhere":
        masks[0] = True
    elif name == "only two scores":
        maps = (maps > 0).astype(np.float32)
        masks[1, :3] = True
    elif name == "every image anomalous":
        masks[:, 1:3, 2:5] = True
    elif name == "scores from the smallest to the largest float":
        maps = np.copysign(10.0 ** (maps * 12), maps).astype(np.float32)
        masks[0, 2:5, 1:4] = True
    return maps, masks


@pytest.mark.parametrize(
    "name",
    [
        "single pixels",
        "regions that touch at a corner",
        "a ring around a region",
        "constant maps",
        "an image that is anomalous everywhere",
        "only two scores",
        "every image anomalous",
        "scores from the smallest to the largest float",
    ],
)
def test_special_masks_and_maps_equal_the_slow_reference(reference, name):
    maps, masks = special(name)
    metrics = AnomalyMetrics()
    labels = masks.any(axis=(1, 2)).astype(int)
    metrics.update(maps, masks, maps.max(axis=(1, 2)), labels, ["c"] * 3, range(3))
    result = metrics.compute()
    for metric, value in reference(maps, masks).all().items():
        assert result.value(metric, "c") == pytest.approx(value, rel=1e-12, abs=1e-12), metric
    assert result.value("pixel_auroc", "c") == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_a_constant_map_scores_like_chance():
    maps, masks = special("constant maps")
    metrics = AnomalyMetrics()
    metrics.update(maps, masks, maps.max(axis=(1, 2)), [1, 0, 0], ["c"] * 3, range(3))
    result = metrics.compute()
    assert result.value("pixel_auroc", "c") == 0.5
    assert result.value("pixel_ap", "c") == pytest.approx(masks.mean(), abs=1e-15)
    assert result.value("pixel_aupro", "c") == pytest.approx(0.15, abs=1e-15)
    assert result.value("image_auroc", "c") == 0.5


def test_worse_than_chance_is_not_flipped(problem):
    p = problem(3)
    p.maps = -p.maps
    assert p.compute().value("pixel_auroc", "c0") < 0.5


def test_means_are_unweighted_and_per_dataset(problem):
    p = problem(7, images=18, categories=3)
    result = p.compute(categories={"c0": "one", "c1": "two", "c2": "two"})
    value = lambda c: result.value("pixel_ap", c)  # noqa: E731
    assert result.value("pixel_ap", scope="mean", dataset="two") == pytest.approx((value("c1") + value("c2")) / 2)
    assert result.value("pixel_ap") == pytest.approx((value("c0") + value("c1") + value("c2")) / 3)
    table = result.table[result.table.metric == "pixel_ap"]
    rows = [tuple(row) for row in table[["scope", "dataset", "category", "n"]].itertuples(index=False)]
    assert rows == [
        ("category", "one", "c0", 6),
        ("category", "two", "c1", 6),
        ("category", "two", "c2", 6),
        ("mean", "one", "", 1),
        ("mean", "two", "", 2),
        ("mean", "", "", 3),
        ("pooled", "one", "", 6),
        ("pooled", "two", "", 12),
        ("pooled", "", "", 18),
    ]


def test_pooled_of_two_datasets_ranks_all_their_pixels(problem, reference):
    p = problem(8, images=12, categories=2, levels=12)
    result = p.compute(categories={"c0": "one", "c1": "two"})
    for metric, value in reference(p.maps, p.masks).all().items():
        assert result.value(metric, scope="pooled") == pytest.approx(value, abs=1e-12), metric
    own = p.masks[1::2], p.maps[1::2]
    expected = average_precision_score(own[0].ravel(), own[1].ravel())
    assert result.value("pixel_ap", scope="pooled", dataset="two") == pytest.approx(expected, abs=1e-12)


def test_a_float64_map_is_ranked_in_float32(problem):
    p = problem(4)
    wide = AnomalyMetrics()
    wide.update(p.maps.astype(np.float64), p.masks, p.scores, p.labels, p.categories, range(6))
    assert wide.compute().table.equals(p.compute().table)


def test_integer_masks_count_every_value_that_is_not_zero(problem):
    p = problem(4)
    other = AnomalyMetrics()
    other.update(p.maps, p.masks.astype(np.uint8) * 255, p.scores, p.labels, p.categories, range(6))
    assert other.compute().table.equals(p.compute().table)
