"""Instance average precision against the recorded values of DeSTSeg's released code (PARITY_DIR as for the networks)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lightning_modules.metrics.instances import instance_average_precision

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[2] / "models" / "parity"))
CASES = [case for case in json.loads((FOLDER / "cases_destseg.json").read_text()) if "region_share" in case["hparams"]]


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_recorded_maps_give_the_recorded_values(case):
    with np.load(FOLDER / case["file"]) as stored:
        arrays = {name: stored[f"{case['tag']}.{name}"] for name in ("pred", "target", "iap", "iap90")}
    options = case["hparams"]
    assert options["connectivity"] == 8
    found = instance_average_precision(
        arrays["pred"][:, 0], arrays["target"][:, 0] > 0, options["recall"], options["region_share"]
    )
    print(case["tag"], abs(found.iap - arrays["iap"]), abs(found.iap_at - arrays["iap90"]))
    assert found.iap == pytest.approx(float(arrays["iap"]), rel=1e-5)
    assert found.iap_at == pytest.approx(float(arrays["iap90"]), rel=1e-5)


def test_every_defect_counts_the_same_and_a_perfect_map_has_one():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12], mask[15, 15] = True, True
    assert instance_average_precision([mask.astype(float)], [mask]) == (1.0, 1.0)
    missed = mask.astype(float)
    missed[15, 15] = -1  # found only when every pixel is called anomalous
    assert instance_average_precision([missed], [mask]).iap == pytest.approx((1 + 101 / 400) / 2)
    with pytest.raises(ValueError, match="No defect"):
        instance_average_precision([missed], [np.zeros_like(mask)])
