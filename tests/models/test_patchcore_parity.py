"""PatchCore must compute what the authors' released code and anomalib compute, from the same features."""

import pytest
import torch

from models.head import AnomalyHead, HeadConfig
from models.layers.coreset import greedy_coreset, johnson_lindenstrauss, start_criterion
from models.layers.nearest import nearest
from models.patchcore import PatchCoreNetwork

pytestmark = pytest.mark.parity("patchcore")


class Recorded:
    """A case's arrays as tensors, and the networks that its hyperparameters ask for."""

    def __init__(self, case) -> None:
        self.case, self.hparams = case, case.hparams
        shapes = case.input["shape"]
        self.train = [self[f"train.{level}"] for level in range(len(shapes) // 2)]
        self.test = [self[f"test.{level}"] for level in range(len(shapes) // 2)]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.case.tensor(name)

    def network(self, rule: str, **options) -> PatchCoreNetwork:
        hparams = self.hparams
        if rule == "released":
            options = {"pretrain_dim": hparams["pretrain_dim"], "target_dim": hparams["target_dim"], **options}
        return PatchCoreNetwork(
            [level.shape[1] for level in self.test],
            [tuple(level.shape[-2:]) for level in self.test],
            rule=rule,
            patch=hparams["patch"],
            **options,
        )

    def agrees(self, found: torch.Tensor, name: str) -> None:
        self.case.check({name: found})


@pytest.fixture
def recorded(case) -> Recorded:
    return Recorded(case)


def rows(network: PatchCoreNetwork, levels: list[torch.Tensor]) -> torch.Tensor:
    """Patch vectors, image-major, rows then columns."""
    (embedding,) = network.prepare(levels)
    return embedding.permute(0, 2, 3, 1).flatten(0, 2)


def head(recorded: Recorded, **options) -> AnomalyHead:
    return AnomalyHead(
        HeadConfig(align_corners=False, smoothing_sigma=recorded.hparams["sigma"], image_score="max", **options)
    )


def test_the_folder_has_a_case_for_patchcore(parity_cases):
    assert parity_cases("patchcore")


@pytest.mark.parametrize(("rule", "name"), [("released", "official"), ("anomalib", "anomalib")])
def test_patch_vectors(recorded, rule, name):
    network = recorded.network(rule)
    for part in ("train", "test"):
        recorded.agrees(rows(network, getattr(recorded, part)), f"{name}.{part}_embedding")


def test_released_and_anomalibs_greedy_picks(recorded):
    released, anomalib = recorded["official.train_embedding"], recorded["anomalib.train_embedding"]
    projected = released @ recorded["official.projection"].T
    count = int(len(released) * recorded.hparams["ratio"])
    for among, name in ((recorded["official.start_points"], "approx"), (None, "exact")):
        picks = greedy_coreset(projected, count, limit=start_criterion(projected, among))
        assert picks.tolist() == recorded[f"official.picks_{name}"].tolist()
    first = int(recorded["anomalib.start"])
    for points, name in ((anomalib @ recorded["anomalib.projection"].T, "anomalib"), (anomalib, "plain")):
        assert greedy_coreset(points, count, first=first).tolist() == recorded[f"{name}.picks"].tolist()
    assert johnson_lindenstrauss(len(anomalib)) == recorded.hparams["anomalib_projection_dim"]


def test_released_distances_map_and_score(recorded):
    network = recorded.network("released", neighbors=recorded.hparams["neighbors_official"])
    network.bank.set(recorded["official.train_embedding"][recorded["official.picks_approx"]])
    features = network.prepare(recorded.test)
    maps, scores = network(features)
    recorded.agrees(maps, "official.distances")
    recorded.agrees(scores, "official.score")
    image = tuple(recorded.hparams["image"])
    recorded.agrees(head(recorded, smoothing_border="symmetric").score([maps], image).maps, "official.map")
    _, indices = nearest(rows(network, recorded.test), network.bank.vectors)
    assert torch.equal(indices[:, 0].view(maps.shape), recorded["official.nearest"])
    network.neighbors = 3
    recorded.agrees(network(features).maps, "official.distances_k3")


def test_anomalibs_distances_map_and_scores(recorded):
    network = recorded.network("anomalib", score_neighbors=recorded.hparams["neighbors_anomalib"])
    network.bank.set(recorded["anomalib.train_embedding"][recorded["anomalib.picks"]])
    features = network.prepare(recorded.test)
    maps, scores = network(features)
    recorded.agrees(maps, "anomalib.distances")
    recorded.agrees(scores, "anomalib.score")
    image = tuple(recorded.hparams["image"])
    enlarged = network.enlarge(maps, image)
    recorded.agrees(head(recorded, smoothing_border="reflect").score([enlarged], image).maps, "anomalib.map")
    _, indices = nearest(rows(network, recorded.test), network.bank.vectors)
    assert torch.equal(indices[:, 0].view(maps.shape), recorded["anomalib.nearest"])
    network.score = "patch_max"
    recorded.agrees(network(features).image_scores, "anomalib.score_1")
