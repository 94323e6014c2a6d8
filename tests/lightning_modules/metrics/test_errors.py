"""Bad input is refused with the sample's name, and leaves the state as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_modules.metrics import AnomalyMetrics, RegionCache

MAPS = np.random.default_rng(0).random((2, 4, 5)).astype(np.float32)
MASKS = np.zeros((2, 4, 5), dtype=bool)
MASKS[0, 1, 2] = True
GOOD = {
    "maps": MAPS,
    "masks": MASKS,
    "image_scores": [0.9, 0.1],
    "labels": [1, 0],
    "categories": ["cable", "capsule"],
    "ids": [10, 11],
}


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"maps": changed(MAPS, (1, 2, 3), np.nan)},
            ValueError,
            r"id 11, category 'capsule'.*1 scores.*nan at \(2, 3\)",
        ),
        ({"maps": changed(MAPS, (0, 0, 0), np.inf)}, ValueError, "id 10, category 'cable'.*inf"),
        ({"maps": MAPS.astype(np.float16)}, TypeError, "float16, expected float32.*half precision"),
        ({"maps": torch.from_numpy(MAPS).bfloat16()}, TypeError, "bfloat16, expected float32"),
        ({"maps": MAPS[0]}, ValueError, r"maps has shape \(4, 5\), expected \(2, H, W\)"),
        ({"maps": None}, ValueError, "need maps, found None"),
        ({"masks": MASKS.astype(np.float32)}, TypeError, "id 10.*float32, expected bool"),
        ({"masks": MASKS[:, :3]}, ValueError, r"id 10, category 'cable'.*map is \(4, 5\), its mask \(3, 5\)"),
        ({"masks": MASKS[::-1]}, ValueError, r"id 11, category 'capsule'.*label 0 \(normal\), but 1 pixels"),
        ({"image_scores": [0.9]}, ValueError, r"image_scores has shape \(1,\), but the batch has 2 categories"),
        ({"image_scores": [0.9, np.nan]}, ValueError, "id 11, category 'capsule'.*image score nan"),
        ({"labels": [1, 2]}, ValueError, "id 11.*label 2, allowed are 0"),
        ({"categories": ["cable", "capsul"]}, ValueError, "id 11, category 'capsul'.*did you mean 'capsule'"),
        ({"ids": [10.0, 11.0]}, TypeError, "ids must be integers, found float64"),
        ({"ids": [10, 10]}, ValueError, "id 10, category 'capsule'.*given before, to a sample of category 'cable'"),
    ],
)
def test_bad_batches_name_the_sample_and_change_nothing(change, error, message):
    metrics = AnomalyMetrics({"cable": "mvtec", "capsule": "mvtec"})
    with pytest.raises(error, match=message):
        metrics.update(**(GOOD | change))
    metrics.update(**GOOD)
    fresh = AnomalyMetrics({"cable": "mvtec", "capsule": "mvtec"})
    fresh.update(**GOOD)
    assert metrics.compute().table.equals(fresh.compute().table)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": ["pixel_aurco"]}, ValueError, "did you mean 'pixel_auroc'"),
        ({"metrics": []}, ValueError, "no metric selected"),
        ({"fpr_limits": [0.0]}, ValueError, r"lies in \(0, 1\], found 0.0"),
        ({"connectivity": 6}, ValueError, "4 or 8, found 6"),
        ({"connectivity": 4, "regions": RegionCache(8)}, ValueError, "connectivity 8, the metric 4"),
        ({"threads": 0}, ValueError, "at least 1, found 0"),
        ({"categories": "cable"}, TypeError, "found the text 'cable'"),
        ({"categories": {"a": "mvtec", "b": ""}}, ValueError, "without one: b"),
        ({"maps_directory": "/nowhere/at/all"}, ValueError, "not a directory"),
    ],
)
def test_bad_options_say_what_is_allowed(options, error, message):
    with pytest.raises(error, match=message):
        AnomalyMetrics(**options)


def test_asking_for_a_number_that_is_not_there_lists_what_is():
    metrics = AnomalyMetrics()
    metrics.update(**GOOD)
    with pytest.raises(KeyError, match=r"pixel_ap.*cable"):
        metrics.compute().value("pixel_ap", "bottle")
