"""The bank's parts against plain oracles: the greedy choice, the search, and what PatchCore makes of them."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from models.layers.coreset import CoresetConfig, choose, greedy_coreset, johnson_lindenstrauss, start_criterion
from models.layers.nearest import MemoryBank, nearest
from models.patchcore import PatchCoreNetwork


def vectors(count: int, channels: int, seed: int = 0, clusters: int = 6) -> torch.Tensor:
    """Clustered, as patches are: so that pruning has something to leave out."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(clusters, channels, generator=generator)
    chosen = torch.randint(clusters, (count,), generator=generator)
    return centres[chosen] + torch.randn(count, channels, generator=generator)


def plain_greedy(points: torch.Tensor, count: int, first: int | None, limit: torch.Tensor | None) -> list[int]:
    """Every distance of every pick."""
    far = torch.full((len(points),), float("inf")) if limit is None else limit.clone()
    picks = [int(far.argmax()) if first is None else first]
    while True:
        far = torch.minimum(far, torch.linalg.vector_norm(points - points[picks[-1]], dim=1))
        if len(picks) == count:
            return picks
        picks.append(int(far.argmax()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("start", ["first", "approximate", "exact", "tight"])
def test_pruned_greedy_choice_is_the_plain_one_index_for_index(seed, start):
    points = vectors(600, 12, seed)
    points[300:320] = points[:20]  # duplicates
    among = torch.arange(0, 100, 10)
    limit = {
        "first": None,
        "approximate": start_criterion(points, among),
        "exact": start_criterion(points, None),
        "tight": torch.rand(600, generator=torch.Generator().manual_seed(seed)),  # the cap decides almost everything
    }[start]
    first = 17 if limit is None else None
    picks = greedy_coreset(points, 250, first=first, limit=limit)
    assert picks.tolist() == plain_greedy(points, 250, first, limit)


def test_start_criteria_are_mean_and_norm_of_the_distances():
    points = vectors(80, 5)
    distances = cdist(points.double(), points.double())
    among = torch.tensor([3, 9, 27])
    np.testing.assert_allclose(start_criterion(points, among), distances[:, among].mean(1), rtol=1e-5)
    np.testing.assert_allclose(start_criterion(points, None), np.linalg.norm(distances, axis=1), rtol=1e-5)


def test_most_distances_are_never_computed(monkeypatch):
    points, computed = vectors(4000, 8, clusters=40), 0
    import models.layers.coreset as coreset

    inner = coreset._distances

    def counted(points, centre, rows=None):
        nonlocal computed
        computed += len(points) if rows is None else len(rows)
        return inner(points, centre, rows)

    monkeypatch.setattr(coreset, "_distances", counted)
    greedy_coreset(points, 200, first=0)
    assert computed < 0.25 * 200 * len(points)


def test_an_impossible_choice_is_refused():
    points = vectors(10, 3)
    with pytest.raises(ValueError, match="11 points cannot be chosen among 10"):
        greedy_coreset(points, 11, first=0)
    with pytest.raises(ValueError, match="first pick, or the limit"):
        greedy_coreset(points, 2)


@pytest.mark.parametrize("neighbors", [1, 3, 9])
def test_search_in_chunks_is_brute_force_in_float64(monkeypatch, neighbors):
    monkeypatch.setattr("models.layers.nearest.QUERIES", 7)
    monkeypatch.setattr("models.layers.nearest.ENTRIES", 11)
    bank, queries = vectors(200, 16) + 1000, vectors(50, 16, seed=1) + 1000  # far from the origin: rounding matters
    exact = cdist(queries.double(), bank.double(), "sqeuclidean")
    order = np.argsort(exact, axis=1)[:, :neighbors]
    distances, indices = nearest(queries, bank, neighbors)
    assert np.array_equal(indices, order)
    np.testing.assert_allclose(distances, np.take_along_axis(exact, order, 1), rtol=1e-5)


def test_distances_are_float32_under_autocast_and_zero_for_an_entry_itself():
    bank = vectors(300, 24) + 50
    plain, indices = nearest(bank, bank)
    assert not plain.any()
    assert torch.equal(indices[:, 0], torch.arange(300))
    queries = vectors(40, 24, seed=2) + 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, found = nearest(queries, bank, 2)
    outside, expected = nearest(queries, bank, 2)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(found, expected)


def test_of_equal_entries_the_first_is_named():
    bank = vectors(30, 4).repeat(3, 1)
    assert nearest(bank[:30], bank)[1][:, 0].tolist() == list(range(30))


def test_a_bank_of_any_size_is_restored_from_a_state_dict():
    stored, empty = MemoryBank(6), MemoryBank(6)
    stored.set(vectors(25, 6))
    with pytest.raises(RuntimeError, match="filled at the end of fit"):
        empty(vectors(2, 6))
    empty.load_state_dict(stored.state_dict())
    assert torch.equal(empty.vectors, stored.vectors)
    with pytest.raises(ValueError, match="26 nearest neighbours"):
        empty(vectors(2, 6), 26)


def test_each_category_has_its_share_when_asked():
    points = torch.cat([vectors(300, 8), vectors(100, 8, seed=3)])
    groups = [torch.arange(300), torch.arange(300, 400)]
    generator = torch.Generator().manual_seed(0)
    config = CoresetConfig(ratio=0.1, share="per_category", start="random")
    picks = choose(points, config, generator, groups)
    assert [int(((picks >= g[0]) & (picks <= g[-1])).sum()) for g in groups] == [30, 10]
    assert len(set(picks.tolist())) == 40
    everything = choose(points, CoresetConfig(ratio=1.0), generator)
    assert everything.tolist() == list(range(400))


def test_projections_keep_distances_and_have_anomalibs_dimension():
    assert johnson_lindenstrauss(135_600) == 291
    points = torch.randn(60, 1024, generator=torch.Generator().manual_seed(0))
    exact = torch.pdist(points)
    for config in (CoresetConfig(projection="sparse"), CoresetConfig(projection="linear", projection_dim=200)):
        matrix = config.matrix(1024, 135_600, torch.Generator().manual_seed(0))
        ratio = torch.pdist(points @ matrix.T) / exact
        assert matrix.shape == (config.projection_dim or 291, 1024)
        # The relative error of a random projection's distance is about 1 / sqrt(2 dimensions): 5 %, so 25 % is five of it.
        assert (ratio / ratio.mean() - 1).abs().max() < 0.25
    assert (
        abs(CoresetConfig(projection="sparse").matrix(1024, 135_600, torch.Generator()).square().sum(0).mean() - 1)
        < 0.1
    )
    assert CoresetConfig(projection="linear").matrix(100, 1000, torch.Generator()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "in \\(0, 1\\]"),
        ({"projection": "pca"}, "linear, sparse, none"),
        ({"projection": "none", "projection_dim": 5}, "positive dimension"),
        ({"start": "first"}, "approximate, exact, random"),
    ],
)
def test_an_impossible_coreset_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CoresetConfig(**options)


# ---- PatchCore -----------------------------------------------------------------------------------------------------------


def levels(images: int, seed: int = 0, channels=(8, 16)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, c, s, s, generator=generator) for c, s in zip(channels, (8, 4), strict=True)]


def network(channels=(8, 16), **options) -> PatchCoreNetwork:
    return PatchCoreNetwork(channels, [(8, 8), (4, 4)], **options)


def filled(images: int = 3, **options) -> PatchCoreNetwork:
    net = network(**options)
    (embedding,) = net.prepare(levels(images))
    net.bank.set(embedding.permute(0, 2, 3, 1).flatten(0, 2))
    return net


def test_the_fast_form_for_wide_resnets_levels_is_the_general_rule():
    net = network(pretrain_dim=16, target_dim=16)
    assert net._halves()
    torch.testing.assert_close(net._embed_halves(levels(2)), net._embed(levels(2)), rtol=0, atol=1e-6)
    assert not network(pretrain_dim=16, target_dim=8)._halves()
    assert PatchCoreNetwork([512, 1024], [(28, 28), (14, 14)])._halves()


def test_a_training_image_has_distance_zero_in_a_bank_of_everything():
    for rule in ("released", "anomalib"):
        net = filled(rule=rule)
        maps, scores = net(net.prepare(levels(3)))
        assert not maps.any()
        assert not scores.any()


def test_a_far_entry_changes_nothing_and_released_distances_are_squares():
    net, test = filled(rule="anomalib", score="patch_max"), levels(2, seed=5)
    rooted, scores = net(net.prepare(test))
    net.bank.set(torch.cat([net.bank.vectors, torch.full((1, net.width), 1e3)]))
    assert torch.equal(net(net.prepare(test)).maps, rooted)
    net.rule = "released"
    (embedding,) = net.prepare(test) if net.rule == "anomalib" else network(rule="anomalib").prepare(test)
    squared = net([embedding]).maps
    torch.testing.assert_close(squared, rooted.square())
    torch.testing.assert_close(scores, rooted.flatten(1).amax(1))


@pytest.mark.parametrize("entries", [1, 4])
def test_a_small_bank_is_searched_as_far_as_it_goes(entries):
    net = network(rule="anomalib", neighbors=3)
    net.bank.set(torch.randn(entries, net.width, generator=torch.Generator().manual_seed(0)))
    maps, scores = net(net.prepare(levels(2)))
    assert maps.isfinite().all()
    assert scores.isfinite().all()


def test_reweighted_score_of_large_distances_is_not_lost_to_float32():
    net = network(rule="anomalib")
    net.bank.set(torch.randn(20, net.width, generator=torch.Generator().manual_seed(0)))
    test = [level * 1e4 for level in levels(2)]
    # In float32 the softmax of distances in the ten thousands is 1 wherever they differ by more than about 17.
    assert (net(net.prepare(test)).image_scores > 0).all()


def test_constant_features_give_numbers():
    for rule in ("released", "anomalib"):
        net = network(rule=rule)
        flat = [torch.ones_like(level) for level in levels(2)]
        (embedding,) = net.prepare(flat)
        net.bank.set(embedding.permute(0, 2, 3, 1).flatten(0, 2))
        maps, scores = net(net.prepare(flat))
        assert maps.isfinite().all()
        assert scores.isfinite().all()


@pytest.mark.parametrize("options", [{"rule": "paper"}, {"score": "mean"}, {"patch": 2}, {"neighbors": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        network(**options)
