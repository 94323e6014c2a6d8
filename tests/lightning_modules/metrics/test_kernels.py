"""The compiled loops: the numbers of numpy, only where they pay, and nothing breaks without them."""

from __future__ import annotations

import builtins
import copy

import numpy as np
import pandas as pd
import pytest

from lightning_modules.metrics import AnomalyMetrics, counting, evaluation
from lightning_modules.metrics.counting import RankTable, Workspace, float_to_key
from lightning_modules.metrics.regions import find_regions


@pytest.fixture
def unloaded(monkeypatch):
    """Numba was not asked for yet."""
    monkeypatch.setattr(counting, "_kernels", {})


@pytest.fixture
def paths(monkeypatch, unloaded):
    """Computes a problem with numpy and with the compiled loops."""

    def both(p, **options):
        monkeypatch.setattr(counting, "_kernels", {"module": None})
        numpy_table = p.compute(**options).table
        monkeypatch.setattr(counting, "_kernels", {})
        monkeypatch.setattr(counting, "KERNEL_PIXELS", 0)
        result = p.compute(**options)
        assert counting._kernels["module"] is not None, "numba is a requirement, but its loops were not loaded"
        return numpy_table, result

    return both


@pytest.mark.parametrize("levels", [0, 3, 12])
@pytest.mark.parametrize("seed", range(4))
def test_both_paths_give_the_same_bits(problem, paths, seed, levels):
    p = problem(seed, images=9, size=(16, 17), levels=levels, categories=2)
    numpy_table, result = paths(p, threads=2)
    pd.testing.assert_frame_equal(numpy_table, result.table, check_exact=True)


@pytest.mark.parametrize("levels", [0, 12])
def test_the_compiled_path_equals_the_slow_reference(problem, reference, paths, levels):
    p = problem(40, levels=levels)
    result = paths(p)[1]
    for name, value in reference(p.maps, p.masks).all().items():
        assert result.value(name, "c0") == pytest.approx(value, abs=1e-12), name


def test_both_paths_agree_on_files_and_on_small_windows(problem, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "WINDOW", (1, 1))
    monkeypatch.setattr(evaluation, "CHUNK_PIXELS", 1)
    p = problem(41, images=8, levels=9, categories=2)
    in_memory = paths(p)[0]
    for options in ({}, {"maps_directory": tmp_path}):
        pd.testing.assert_frame_equal(in_memory, paths(p, **options)[1].table, check_exact=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_maps_in_any_memory_layout_are_read_alike(problem, monkeypatch, compiled, tmp_path):
    monkeypatch.setattr(counting, "_kernels", {} if compiled else {"module": None})
    monkeypatch.setattr(counting, "KERNEL_PIXELS", 0)
    p = problem(42, images=5, size=(8, 8))
    before = p.compute().table
    p.maps = np.asfortranarray(p.maps)
    for options in ({}, {"maps_directory": tmp_path}):
        metrics = AnomalyMetrics(**options)
        metrics.update(p.maps, p.masks, p.scores, p.labels, p.categories, range(5))
        pd.testing.assert_frame_equal(before, metrics.compute().table, check_exact=True)


def test_a_copy_of_a_metric_does_not_read_the_original(problem, monkeypatch, unloaded):
    monkeypatch.setattr(counting, "KERNEL_PIXELS", 0)
    p = problem(43, images=8)
    metrics = p.feed(AnomalyMetrics(["c0"]))
    before = metrics.compute().table
    other = copy.deepcopy(metrics)
    for row in metrics._categories["c0"].maps._rows:
        row[:] = 0
    pd.testing.assert_frame_equal(before, other.compute().table, check_exact=True)


@pytest.mark.parametrize("counts", [np.int32, np.int64])
def test_slots_of_keys_at_the_ends_of_the_axis(counts, monkeypatch, unloaded):
    compiled = counting.kernels(counting.KERNEL_PIXELS)
    largest = np.finfo(np.float32).max
    scores = np.array([-largest, -1, -1e-45, -0.0, 1e-45, 1, np.nextafter(np.float32(1), 2), largest], dtype=np.float32)
    keys = float_to_key(scores)
    table = RankTable([keys[-3:-1].copy()], int(keys[-4]) & ~63)
    inside = np.repeat(keys[keys >= table.low], 3)
    numpy_counts = table.count([inside.copy()], Workspace(counts)).copy()
    place = np.array([inside.ctypes.data]), np.array([len(inside)])
    found = table.tally([place], Workspace(counts, compiled))
    assert found.dtype == counts
    np.testing.assert_array_equal(found, numpy_counts)


def test_maps_without_a_normal_or_an_anomalous_pixel_are_arranged(unloaded):
    rng = np.random.default_rng(0)
    masks = np.stack([np.zeros((5, 6), bool), np.ones((5, 6), bool), rng.random((5, 6)) < 0.5])
    compiled = counting.kernels(counting.KERNEL_PIXELS)
    for regions in find_regions(masks):
        keys = float_to_key((rng.normal(size=30) * 10.0 ** rng.integers(-30, 30, 30)).astype(np.float32))
        other = keys.copy()
        assert Workspace(np.int32).arrange(keys, regions) == 30 - regions.pixels
        assert Workspace(np.int32, compiled).arrange(other, regions) == 30 - regions.pixels
        np.testing.assert_array_equal(keys, other)


def test_numba_is_asked_for_only_from_the_threshold_on(problem, monkeypatch, unloaded):
    p = problem(44, images=6, size=(10, 10))
    monkeypatch.setattr(counting, "KERNEL_PIXELS", 601)
    p.compute()
    assert counting._kernels == {}
    monkeypatch.setattr(counting, "KERNEL_PIXELS", 600)
    p.compute()
    assert counting._kernels["module"] is not None


def test_without_numba_the_numbers_stay(problem, monkeypatch, unloaded):
    p = problem(45)
    before = p.compute().table
    real = builtins.__import__

    def missing(name, globals=None, locals=None, fromlist=(), level=0):
        if level and "kernels" in (fromlist or ()):
            raise ImportError("No module named 'numba'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(counting, "KERNEL_PIXELS", 0)
    pd.testing.assert_frame_equal(before, p.compute().table, check_exact=True)
    assert counting._kernels == {"module": None}


def test_numba_told_not_to_compile_is_left_alone(problem, monkeypatch, unloaded):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert counting.kernels(counting.KERNEL_PIXELS) is None


def test_threads_default_to_one_without_the_compiled_loops():
    assert evaluation.default_threads(False) == 1
    assert 1 <= evaluation.default_threads(True) <= 4


def plus_one(number):
    return number + 1


def test_loops_compile_where_no_folder_can_keep_them(monkeypatch):
    import numba
    from numba.core import caching

    from lightning_modules.metrics import kernels

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # as on a read-only disk without a home
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(plus_one)
    assert kernels.compiled("int64(int64)")(plus_one)(20) == 21
