"""The order of training and evaluation images."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import DataError
from datamodules.sampling import SAMPLINGS, EvalSampler, TrainSampler

# dataset x: categories a (12 images), b (4); dataset y: category c (8)
DATASETS = ["x"] * 16 + ["y"] * 8
CATEGORIES = ["a"] * 12 + ["b"] * 4 + ["c"] * 8


def sampler(sampling="natural", seed=0, replicas=1, rank=0, epoch=0):
    made = TrainSampler(CATEGORIES, DATASETS, CATEGORIES, sampling, seed, replicas, rank)
    made.set_epoch(epoch)
    return made


def rows(made):
    return [draw.row for draw in made]


def test_natural_order_is_a_permutation_that_changes_with_epoch_and_seed_only():
    first = rows(sampler())
    assert sorted(first) == list(range(24))
    assert first == rows(sampler())
    assert list(sampler()) == list(sampler()), "augmentation seeds repeat as well"
    assert first != rows(sampler(epoch=1))
    assert first != rows(sampler(seed=1))
    assert [d.seed for d in sampler()] != [d.seed for d in sampler(epoch=1)]


def test_an_epoch_can_be_entered_without_the_ones_before():
    walked = sampler()
    for epoch in range(4):
        walked.set_epoch(epoch)
        last = list(walked)
    assert last == list(sampler(epoch=3))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [("natural", (12, 4, 8)), ("balanced", (8, 8, 8)), ("balanced_datasets", (6, 6, 12))],
)
def test_quotas_per_category(sampling, expected):
    drawn = Counter(CATEGORIES[row] for row in rows(sampler(sampling)))
    assert (drawn["a"], drawn["b"], drawn["c"]) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_image_comes_again_before_its_category_is_through(sampling):
    for epoch in range(5):
        drawn = Counter(rows(sampler(sampling, epoch=epoch)))
        for category in "abc":
            times = [drawn[i] for i, c in enumerate(CATEGORIES) if c == category]
            assert max(times) - min(times) <= 1


def test_balanced_reaches_every_image_of_a_large_category_over_time():
    seen = {row for epoch in range(30) for row in rows(sampler("balanced", epoch=epoch))}
    assert seen == set(range(24))


@pytest.mark.parametrize("replicas", [2, 3, 5, 7])
def test_processes_share_an_epoch_and_make_equally_many_steps(replicas):
    parts = [rows(sampler("natural", replicas=replicas, rank=rank, epoch=2)) for rank in range(replicas)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(part) == len(sampler(replicas=replicas)) for part in parts)
    dealt = [row for step in zip(*parts, strict=True) for row in step]
    whole = rows(sampler(epoch=2))
    assert dealt[:24] == whole
    assert dealt[24:] == whole[: len(dealt) - 24]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 8))
def test_evaluation_shows_every_image_once_over_all_processes(images, replicas):
    parts = [list(EvalSampler(range(images), replicas, rank)) for rank in range(replicas)]
    assert sorted(row for part in parts for row in part) == list(range(images))
    assert [len(EvalSampler(range(images), replicas, rank)) for rank in range(replicas)] == [len(p) for p in parts]


def test_unknown_sampling_gets_the_nearest_name():
    with pytest.raises(DataError, match="Did you mean 'balanced'"):
        sampler("balance")
