"""Regions against scipy's labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lightning_modules.metrics import RegionCache, find_regions

STRUCTURES = {4: None, 8: np.ones((3, 3))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    connectivity=st.sampled_from([4, 8]),
)
def test_regions_are_those_of_scipy(seed, size, density, connectivity):
    masks = np.random.default_rng(seed).random((4, *size)) < density
    for mask, regions in zip(masks, find_regions(masks, connectivity), strict=True):
        labels, count = ndimage.label(mask, STRUCTURES[connectivity])
        ours = np.zeros(size, dtype=int)
        ours.reshape(-1)[regions.index()] = np.repeat(regions.labels, regions.lengths) + 1
        assert (mask == (ours > 0)).all()
        assert len(regions.areas) == count
        pairs = set(zip(labels[mask].tolist(), ours[mask].tolist(), strict=True))
        assert len(pairs) == count  # a one-to-one correspondence
        assert regions.areas.tolist() == np.bincount(ours[mask], minlength=count + 1)[1:].tolist()
        assert regions.equals(mask)


def test_a_changed_mask_is_labelled_again():
    cache = RegionCache()
    mask = np.zeros((1, 6, 6), dtype=bool)
    mask[0, 1:3, 1:3] = True
    (first,) = cache.get([7], mask)
    assert cache.get([7], mask.copy())[0] is first
    moved = np.roll(mask, 2, axis=2)  # as many pixels, elsewhere
    assert cache.get([7], moved)[0].equals(moved[0])
    assert cache.get([7], np.zeros((1, 3, 4), dtype=bool))[0].pixels == 0


def test_a_connectivity_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="4 or 8, found 6"):
        RegionCache(6)
