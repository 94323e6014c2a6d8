"""The ULSAD network must compute what the authors' released code computes, from their own parameter names.

Parameters and inputs are filled by a rule, so no weight file is needed.
"""

from functools import cache

import numpy as np
import pytest
import torch

from models.released import load_released
from models.ulsad import ULSADNetwork

pytestmark = pytest.mark.parity("ulsad")
QUANTILES = {"qa_global": 0.3, "qb_global": 1.1, "qa_local": 0.5, "qb_local": 1.7}


def parameter(key: str, values: torch.Tensor) -> torch.Tensor:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in QUANTILES:
        return torch.tensor(QUANTILES[leaf])
    if leaf == "running_var" or key.endswith("mean_std.std"):
        return 1 + 0.1 * values.abs()
    if "bn" in key and leaf == "weight":
        return 1 + 0.05 * values
    return values / float(np.sqrt(np.prod(values.shape[1:]))) if values.ndim == 4 else 0.05 * values


@cache
def released_state(case) -> dict[str, torch.Tensor]:
    return case.state(case.key_shapes(), parameter)


def network_of(case, **options) -> ULSADNetwork:
    shapes = case.input["shape"]
    channels, size = shapes["features"][1], tuple(shapes["features"][2:])
    return ULSADNetwork([channels] * 2, [size] * 2, tuple(shapes["image"][2:]), channels, **options)


def test_the_folder_has_a_case_for_ulsad(parity_cases):
    assert parity_cases("ulsad")


def test_released_checkpoint_gives_the_released_outputs(case):
    network = network_of(case, lambda_l=case.hparams["lambda_l"], lambda_g=case.hparams["lambda_g"]).eval()
    assert not load_released(network, released_state(case)).unused
    quantiles = network.quantiles.get()["released"]
    for name, value in QUANTILES.items():
        letter, branch = name.split("_")
        assert quantiles[branch][{"qa": 0.9, "qb": 0.995}[letter]] == pytest.approx(value)
    features = case.fill(f"features:{case.tag}", case.input["shape"]["features"])
    image = case.fill(f"image:{case.tag}", case.input["shape"]["image"]).abs().clamp(0, 1)
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
    assert ours.keys() >= case.arrays.keys()
    case.check(ours)


@pytest.mark.parametrize(
    "prefix", ["module.model.", *(pytest.param(prefix, marks=pytest.mark.program) for prefix in ("", "model."))]
)
def test_a_checkpoint_saved_inside_a_wrapper_loads_and_a_foreign_one_is_refused(case, prefix):
    state = {prefix + key.removeprefix(case.key_prefix): value for key, value in released_state(case).items()}
    network = network_of(case)
    foreign = prefix + "feature_extractor.layer1.weight"
    assert load_released(network, {**state, foreign: torch.zeros(1)}).unused == [foreign]
    weight = prefix + "featae.conv1.weight"
    assert torch.equal(network.local_network.encoder[0].weight, state[weight])
    with pytest.raises(ValueError, match=r"local_network\.encoder\.0\.weight"):
        load_released(network, {key: value for key, value in state.items() if key != weight})
    with pytest.raises(ValueError, match=r"mean_std\.mean"):
        load_released(network, {key: value for key, value in state.items() if "mean_std" not in key})


def test_quantiles_that_were_never_set_are_not_imported(case):
    state = {key: value * 0 if "quantiles" in key else value for key, value in released_state(case).items()}
    network = network_of(case)
    load_released(network, state)
    assert network.quantiles.groups == ()
