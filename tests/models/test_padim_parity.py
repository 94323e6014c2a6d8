"""PaDiM must compute what the reference code and anomalib compute, from the same features and channels."""

import pytest

from models.head import AnomalyHead, HeadConfig
from models.padim import PaDiMNetwork

pytestmark = pytest.mark.parity("padim")


def test_the_folder_has_a_case_for_padim(parity_cases):
    assert parity_cases("padim")


def test_gaussians_distances_maps_and_scores(case):
    arrays, hparams = case.tensors(), case.hparams
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
            case.check({"official.test_embedding": network.embed(test)})
            case.check({"official.mean": network.mean.T.float()})
            factors = network._full(network.factor)
            covariance = (factors @ factors.transpose(1, 2)).permute(1, 2, 0).float()
            case.check({"official.covariance": covariance})
        distances = network(test)
        case.check({f"{source}.distances": distances})
        config = HeadConfig(
            align_corners=False, smoothing_sigma=hparams["sigma"], smoothing_border=border, image_score="max"
        )
        scored = AnomalyHead(config).score([distances], tuple(hparams["image"]))
        case.check({f"{source}.map": scored.maps})
        case.check({f"{source}.score": scored.image_scores})
