"""What must not change a number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics import METRICS, AnomalyMetrics, MetricResult, RegionCache, pixels

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds, levels = st.integers(0, 10_000), st.sampled_from([0, 2, 9])


def same(first: MetricResult, second: MetricResult, but: tuple[str, ...] = (), tolerance: float = 0.0) -> None:
    a, b = (r.table[~r.table.metric.isin(but)].reset_index(drop=True) for r in (first, second))
    pd.testing.assert_frame_equal(a.drop(columns="value"), b.drop(columns="value"))
    np.testing.assert_allclose(a.value, b.value, rtol=0, atol=tolerance)


@few
@given(seed=seeds, levels=levels)
def test_strictly_increasing_transforms_of_the_scores_change_nothing(problem, seed, levels):
    p = problem(seed, levels=levels, categories=2)
    before = p.compute()
    values, place = np.unique(p.maps, return_inverse=True)
    rng = np.random.default_rng(seed)
    new = np.unique((rng.normal(size=4 * len(values)) * 10.0 ** rng.integers(-8, 8)).astype(np.float32))[: len(values)]
    p.maps = new[place].reshape(p.maps.shape)
    same(before, p.compute(), but=("dsc_threshold",), tolerance=1e-14)  # other windows: sums in another order


@few
@given(seed=seeds, levels=levels, batch=st.integers(1, 7))
def test_order_and_batches_change_nothing(problem, seed, levels, batch):
    p = problem(seed, levels=levels, categories=2)
    categories = ["c0", "c1"]
    before = p.feed(AnomalyMetrics(categories)).compute()
    order = np.random.default_rng(seed).permutation(len(p.maps))
    same(before, p.feed(AnomalyMetrics(categories), order, batch).compute(), tolerance=1e-14)


@few
@given(seed=seeds, levels=levels)
def test_small_stretches_and_threads_change_nothing(problem, seed, levels):
    p = problem(seed, images=8, levels=levels, categories=2)
    before = p.compute(threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "STRETCH", 40)
        patch.setattr(pixels, "SAMPLES", 20)
        same(before, p.compute(threads=3), tolerance=1e-14)


@few
@given(seed=seeds, levels=levels)
def test_maps_in_files_give_the_same_bits(problem, seed, levels, tmp_path_factory):
    p = problem(seed, levels=levels, categories=2)
    same(p.compute(), p.compute(maps_directory=tmp_path_factory.getbasetemp()))


@few
@given(seed=seeds, levels=levels)
def test_tensors_give_the_bits_of_arrays(problem, seed, levels):
    p = problem(seed, levels=levels, categories=2)
    before = p.compute()
    metrics = AnomalyMetrics()
    tensors = [torch.from_numpy(array) for array in (p.maps[:, None], p.masks[:, None], p.scores, p.labels)]
    tensors[0].requires_grad_()
    metrics.update(*tensors, p.categories, torch.arange(6))
    same(before, metrics.compute())


def test_maps_of_an_accelerator_are_copied_from_it(problem):
    """On the accelerator that is there, or on a stand-in whose tensors numpy cannot read either."""
    p = problem(22)
    before = p.compute()
    maps = torch.from_numpy(p.maps)
    maps = maps.cuda() if torch.cuda.is_available() else maps.as_subclass(OnAccelerator)
    metrics = AnomalyMetrics()
    metrics.update(maps, p.masks, p.scores, p.labels, p.categories, range(6))
    same(before, metrics.compute())


class OnAccelerator(torch.Tensor):
    """A tensor that has to be brought to the CPU before numpy can read it."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        raise TypeError("can't convert this device's tensor to numpy")


def test_one_metric_alone_has_the_value_it_has_among_all(problem):
    p = problem(11, images=8, categories=2)
    everything = p.compute().table
    for name in METRICS:
        alone = p.compute(metrics=[name]).table
        pd.testing.assert_frame_equal(alone, everything[everything.metric == name].reset_index(drop=True))


def test_image_metrics_alone_need_no_maps(problem):
    p = problem(12, images=8)
    metrics = AnomalyMetrics(metrics=["image_auroc"])
    metrics.update(None, None, p.scores, p.labels, p.categories, range(8))
    assert metrics.compute().value("image_auroc", "c0") == p.compute().value("image_auroc", "c0")


def test_a_sample_given_twice_counts_once(problem):
    p = problem(13, categories=2)
    metrics = p.feed(AnomalyMetrics())
    p.feed(metrics, order=np.array([0, 0, 3]))
    same(p.compute(), metrics.compute())


def test_reset_starts_from_nothing_and_keeps_the_labelled_regions(problem):
    metrics = problem(14, images=9).feed(AnomalyMetrics())
    metrics.compute()
    metrics.reset()
    assert len(metrics.regions) == 9
    p = problem(15)
    same(p.feed(metrics).compute(), p.compute())


def test_variants_share_labelled_regions_and_one_table(problem, monkeypatch):
    p = problem(16)
    cache = RegionCache()
    first = p.compute(regions=cache, variant="levels=4")
    monkeypatch.setattr("lightning_modules.metrics.regions.find_regions", None)  # a second labelling would fail
    p.maps = p.maps * 2
    second = p.compute(regions=cache, variant="levels=4+3")
    table = MetricResult.concatenate([first, second]).table
    assert list(dict.fromkeys(table.variant)) == ["levels=4", "levels=4+3"]
    assert len(table) == 2 * len(first.table)


def test_more_samples_after_compute_are_counted(problem):
    p = problem(17, images=10)
    metrics = p.feed(AnomalyMetrics(), order=np.arange(6))
    metrics.compute()
    same(p.feed(metrics, order=np.arange(6, 10)).compute(), p.compute(), tolerance=1e-14)


def test_an_empty_batch_changes_nothing(problem):
    p = problem(18)
    metrics = p.feed(AnomalyMetrics())
    metrics.update(p.maps[:0], p.masks[:0], [], [], [], np.zeros(0, dtype=int))
    same(p.compute(), metrics.compute())


def test_maps_may_be_overwritten_after_update(problem):
    p = problem(18)
    before = p.compute()
    metrics = p.feed(AnomalyMetrics(), batch=6)
    p.maps[:] = 0
    same(before, metrics.compute())


def test_images_of_several_sizes_are_pooled_by_pixel(problem):
    small, large = problem(19, size=(5, 6)), problem(20, size=(9, 8))
    metrics = AnomalyMetrics(["c0"])
    for offset, p in ((0, small), (100, large)):
        metrics.update(p.maps, p.masks, p.scores, p.labels, p.categories, np.arange(6) + offset)
    from sklearn.metrics import average_precision_score

    labels = np.concatenate([small.masks.ravel(), large.masks.ravel()])
    scores = np.concatenate([small.maps.ravel(), large.maps.ravel()])
    assert metrics.compute().value("pixel_ap", "c0") == pytest.approx(
        average_precision_score(labels, scores), abs=1e-12
    )
