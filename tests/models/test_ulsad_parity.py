"""The ULSAD network must compute what the authors' released code computes, from their own parameter names.

Parameters and inputs are filled by a rule, so no weight file is needed. PARITY_DIR points to another folder of the
same form (cases.json, ulsad_keys.json and the .npz files it names).
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.released import load_released
from models.ulsad import ULSADNetwork

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
CASES = [case for case in json.loads((FOLDER / "cases.json").read_text()) if case["method"] == "ulsad"]
QUANTILES = {"qa_global": 0.3, "qb_global": 1.1, "qa_local": 0.5, "qb_local": 1.7}


def fill(name: str, shape) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)


def parameter(key: str, shape) -> torch.Tensor:
    values, leaf = fill(key, shape), key.rsplit(".", 1)[-1]
    if leaf in QUANTILES:
        values = np.float32(QUANTILES[leaf])
    elif leaf == "running_var":
        values = 1 + 0.1 * abs(values)
    elif "bn" in key and leaf == "weight":
        values = 1 + 0.05 * values
    elif key.endswith("mean_std.std"):
        values = 1 + 0.1 * abs(values)
    elif len(shape) == 4:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.05 * values
    return torch.as_tensor(np.asarray(values, dtype=np.float32))


def released_state(case: dict) -> dict[str, torch.Tensor]:
    keys = json.loads((FOLDER / "ulsad_keys.json").read_text())
    return {case["key_prefix"] + key: parameter(case["key_prefix"] + key, shape) for key, shape in keys.items()}


def test_the_folder_has_a_case_for_ulsad():
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_released_checkpoint_gives_the_released_outputs(case):
    feature_shape, image_shape = case["input"]["shape"]["features"], case["input"]["shape"]["image"]
    channels, size, image_size = feature_shape[1], tuple(feature_shape[2:]), tuple(image_shape[2:])
    network = ULSADNetwork(
        [channels, channels], [size, size], image_size, channels,
        lambda_l=case["hparams"]["lambda_l"], lambda_g=case["hparams"]["lambda_g"],
    ).eval()  # fmt: skip
    assert not load_released(network, released_state(case)).unused
    quantiles = network.quantiles.get()["released"]
    for name, value in QUANTILES.items():
        letter, branch = name.split("_")
        assert quantiles[branch][{"qa": 0.9, "qb": 0.995}[letter]] == pytest.approx(value)
    features = torch.from_numpy(fill(f"features:{case['tag']}", feature_shape))
    image = torch.from_numpy(fill(f"image:{case['tag']}", image_shape)).abs().clamp(0, 1)
    # The released model normalises the image itself, here the data module does.
    image = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        encoded = network.encode(features, image)
        local_map, global_map = network.branch_maps(network.pairs(encoded)).unbind(1)
        losses = network.losses(encoded)
    ours = {
        "ae_sub": encoded.autoencoded[:, ::8],
        "frn_sub": torch.cat([encoded.local, encoded.imitation], dim=1)[:, ::16],
        "local_map": local_map,
        "global_map": global_map,
        **{f"loss_{term}": loss for term, loss in losses.items()},
    }
    arrays = np.load(FOLDER / case["file"])
    for name in case["arrays"]:
        expected = arrays[f"{case['tag']}.{name}"]
        error = np.abs(ours[name].numpy() - expected).max() / np.abs(expected).max()
        print(f"{case['tag']} {name}: relative error {error:.1e}")
        assert error <= 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_a_checkpoint_saved_inside_a_wrapper_loads_and_a_foreign_one_is_refused(prefix):
    state = {prefix + key: value for key, value in released_state({**CASES[0], "key_prefix": ""}).items()}
    channels = state[prefix + "mean_std.mean"].shape[1]
    size = tuple(CASES[0]["input"]["shape"]["features"][2:])
    network = ULSADNetwork([channels] * 2, [size] * 2, tuple(CASES[0]["input"]["shape"]["image"][2:]), channels)
    foreign = prefix + "feature_extractor.layer1.weight"
    assert load_released(network, {**state, foreign: torch.zeros(1)}).unused == [foreign]
    weight = prefix + "featae.conv1.weight"
    assert torch.equal(network.local_network.encoder[0].weight, state[weight])
    with pytest.raises(ValueError, match=r"local_network\.encoder\.0\.weight"):
        load_released(network, {key: value for key, value in state.items() if key != weight})
    with pytest.raises(ValueError, match=r"mean_std\.mean"):
        load_released(network, {key: value for key, value in state.items() if "mean_std" not in key})


def test_quantiles_that_were_never_set_are_not_imported():
    case = CASES[0]
    state = {key: value * 0 if "quantiles" in key else value for key, value in released_state(case).items()}
    channels = state[case["key_prefix"] + "mean_std.mean"].shape[1]
    size = tuple(case["input"]["shape"]["features"][2:])
    network = ULSADNetwork([channels] * 2, [size] * 2, tuple(case["input"]["shape"]["image"][2:]), channels)
    load_released(network, state)
    assert network.quantiles.groups == ()
