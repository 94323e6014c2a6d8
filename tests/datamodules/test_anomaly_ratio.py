"""The anomaly ratio: each definition is what its name says, and check-data prints them for the masks on disk."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from datamodules.anomaly_ratio import DEFINITIONS, OURS, Marked, look, ratios
from datamodules.check import check, show


def test_each_definition_is_what_its_name_says():
    one, other = np.zeros((10, 10), bool), np.zeros((10, 20), bool)
    one[2, 3] = one[4, 6] = True  # 2 of 100 pixels, in a box of 3 x 4
    other[:5] = True  # 100 of 200
    good = np.zeros((10, 10), bool)
    found = ratios(map(look, (one, other, good)))
    assert found == pytest.approx(
        {
            "anomalous_pixels": 100 * 102 / 300,
            "image_mean": (2 + 50) / 2,
            "image_median": (2 + 50) / 2,
            "image_largest": 50,
            "box_mean": (12 + 50) / 2,
            "test_pixels": 100 * 102 / 400,
            "to_normal_pixels": 100 * 102 / 198,
        }
    )
    assert next(iter(found)) == OURS


def test_without_a_marked_pixel_there_is_no_ratio():
    assert np.isnan(list(ratios([Marked(100)]).values())).all()
    assert set(ratios([])) == set(DEFINITIONS)


def test_check_data_prints_the_ratio_of_the_masks_on_disk(make, tmp_path):
    make.mvtec(tmp_path)
    report = check("mvtec_ad", tmp_path)
    # Two masks of 3 rows x 7 columns in images of 40 x 48, and two good images.
    assert report.anomaly_ratios["bottle"]["anomalous_pixels"] == pytest.approx(100 * 21 / 1920)
    assert report.anomaly_ratios["bottle"]["test_pixels"] == pytest.approx(100 * 21 / 3840)
    stream = io.StringIO()
    show(report, Console(file=stream, width=200))
    assert "1.09" in stream.getvalue()
