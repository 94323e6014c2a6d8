"""PaDiM must compute what the reference code and anomalib compute, from the same features and channels.

PARITY_DIR points to another folder of the same form (cases_baselines.json and the .npz files that it names).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.head import AnomalyHead, HeadConfig
from models.padim import PaDiMNetwork

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
CASES = [case for case in json.loads((FOLDER / "cases_baselines.json").read_text()) if case["method"] == "padim"]


def read(case: dict) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / case["file"]) as arrays:
        prefix = f"{case['tag']}."
        return {n.removeprefix(prefix): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(prefix)}


def agrees(case: dict, name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape, name
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{case['tag']} {name}: relative error {error:.1e}")
    assert error <= tolerance, f"{name}: {error:.2e}"


def test_the_folder_has_a_case_for_padim():
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_gaussians_distances_maps_and_scores(case):
    arrays, hparams = read(case), case["hparams"]
    levels = sum(name.startswith("train.") for name in arrays)
    train, test = ([arrays[f"{part}.{level}"] for level in range(levels)] for part in ("train", "test"))
    channels, sizes = [level.shape[1] for level in train], [tuple(level.shape[-2:]) for level in train]
    assert sum(channels) == hparams["channels_total"]
    for source, more, border in (("official", 0.0, "symmetric"), ("anomalib", 1e-5, "reflect")):
        network = PaDiMNetwork(channels, sizes, kept=hparams["channels_kept"], epsilon=hparams["epsilon"] + more)
        network.chosen.copy_(arrays["channels"])
        for part in zip(*(level.split(5) for level in train), strict=True):
            network.update(list(part))
        assert network.count == hparams["images"]
        network.finish()
        if source == "official":
            agrees(case, "test_embedding", network.embed(test), arrays["official.test_embedding"])
            agrees(case, "mean", network.mean.T.float(), arrays["official.mean"])
            factors = network._full(network.factor)
            covariance = (factors @ factors.transpose(1, 2)).permute(1, 2, 0).float()
            agrees(case, "covariance", covariance, arrays["official.covariance"])
        distances = network(test)
        agrees(case, f"{source}.distances", distances, arrays[f"{source}.distances"])
        config = HeadConfig(
            align_corners=False, smoothing_sigma=hparams["sigma"], smoothing_border=border, image_score="max"
        )
        scored = AnomalyHead(config).score([distances], tuple(hparams["image"]))
        agrees(case, f"{source}.map", scored.maps, arrays[f"{source}.map"])
        agrees(case, f"{source}.score", scored.image_scores, arrays[f"{source}.score"])
