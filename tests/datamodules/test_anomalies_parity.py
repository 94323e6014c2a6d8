"""Perlin anomalies as DeSTSeg's released code makes them, from recorded draws (cases_destseg.json in PARITY_DIR)."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules.anomalies.perlin import THRESHOLD, blend, perlin_noise, rotate

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[1] / "models" / "parity"))
CASES = [case for case in json.loads((FOLDER / "cases_destseg.json").read_text()) if "cells" in case["hparams"]]


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_recorded_draws_give_the_recorded_anomaly(case):
    options, tag = case["hparams"], case["tag"]
    with np.load(FOLDER / case["file"]) as stored:
        arrays = {name.removeprefix(f"{tag}."): stored[name] for name in stored.files if name.startswith(f"{tag}.")}
    noise = perlin_noise(arrays["uniform"] * 2 * math.pi, arrays["image"].shape[:2])
    turned = rotate(noise, options["rotation_degrees"])
    mask = arrays["mask"][0].astype(bool)
    image, texture = arrays["image"] / 255, arrays["texture"] / 255
    blended = blend(image, texture, mask, 1 - 0.8 * options["beta_draw"])
    errors = {
        "noise": np.abs(noise - arrays["noise"]).max(),
        "rotated": np.abs(turned - arrays["rotated"]).max(),
        "augmented": np.abs(blended - arrays["augmented"]).max(),
    }
    agreement = ((turned > THRESHOLD) == mask).mean()
    print(tag, {name: f"{error:.1e}" for name, error in errors.items()}, f"mask {agreement:.4%}")
    assert errors["noise"] <= 1e-5
    assert errors["rotated"] <= 0.02
    assert errors["augmented"] <= 1e-5
    assert agreement >= 0.999
    assert options["threshold"] == THRESHOLD
