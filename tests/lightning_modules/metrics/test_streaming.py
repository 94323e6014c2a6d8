"""Maps in files: the memory of an evaluation must not grow with the number of images."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from lightning_modules.metrics import AnomalyMetrics, pixels

SIZE = (96, 96)


def peak_memory(images: int, directory) -> int:
    """Bytes at the highest point of an evaluation of `images` maps."""
    rng = np.random.default_rng(0)
    mask = np.zeros((1, *SIZE), dtype=bool)
    mask[0, 10:40, 20:50] = True
    metrics = AnomalyMetrics(maps_directory=directory, threads=1)
    tracemalloc.start()
    for number in range(images):
        maps = rng.random((1, *SIZE), dtype=np.float32)
        metrics.update(maps, mask, [0.5], [1], [f"c{number % 2}"], [number])
    assert not np.isnan(metrics.compute().value("pixel_ap"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.program
def test_memory_stays_within_a_few_kilobytes_per_image(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "STRETCH", 1 << 15)
    few, many = 60, 240
    peak_memory(2, tmp_path)  # what is imported on first use also counts as memory
    growth = (peak_memory(many, tmp_path) - peak_memory(few, tmp_path)) / (many - few)
    assert growth < 4_000 < SIZE[0] * SIZE[1] * 4 / 9  # a map is 36,864 bytes


def test_temporary_files_disappear(tmp_path, problem):
    problem(1).compute(maps_directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_an_error_not_a_number(tmp_path, problem):
    metrics = problem(2).feed(AnomalyMetrics(maps_directory=tmp_path))
    metrics._categories["c0"].maps._file.truncate(100)
    with pytest.raises(OSError, match="truncated"):
        metrics.compute()


def fed(problem, **options) -> AnomalyMetrics:
    """A metric that was given all of one category's images before those of the next."""
    order = np.argsort(np.array(problem.categories), kind="stable")
    return problem.feed(AnomalyMetrics(pooled=False, **options), order, batch=4)  # batches reach into the next category


def test_complete_categories_are_evaluated_at_once_with_the_same_numbers(problem):
    given = problem(3, images=14, categories=3, levels=5)
    counts = Counter(given.categories)
    early, late = fed(given, expected=counts), fed(given)
    assert all(len(category.maps) == 0 for category in early._categories.values())
    pd.testing.assert_frame_equal(early.compute().table, late.compute().table, check_exact=True)
    pd.testing.assert_frame_equal(early.compute().table, late.compute().table, check_exact=True)  # asked again
    early.reset()
    given.feed(early)  # in any order, after a reset
    pd.testing.assert_frame_equal(early.compute().table, late.compute().table, check_exact=True)


def test_only_the_maps_of_categories_that_are_not_complete_are_kept(problem):
    given = problem(4, images=12, categories=2)
    metrics = fed(given, expected={"c0": 6, "c1": 7})
    assert len(metrics._categories["c0"].maps) == 0
    assert len(metrics._categories["c1"].maps) == 6
    pd.testing.assert_frame_equal(metrics.compute().table, fed(given).compute().table, check_exact=True)


def test_one_image_more_than_expected_is_an_error(problem):
    given = problem(5, images=4)
    metrics = given.feed(AnomalyMetrics(pooled=False, expected={"c0": 4}))
    with pytest.raises(ValueError, match="the 4 images that this category was expected to have are complete"):
        metrics.update(given.maps[:1], given.masks[:1], [0.5], given.labels[:1], ["c0"], [99])
