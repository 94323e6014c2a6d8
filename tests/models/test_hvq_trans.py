"""HVQ-Trans' codebooks, switching and options, beyond what the recordings of the released code cover."""

import multiprocessing

import numpy as np
import pytest
import torch

from models.hvq_trans import Codebooks, HVQTrans, rounds, transport_cost
from models.layers.classifier import PooledClassifier

GRID = (3, 4)


def small(classes: int = 3, **options) -> HVQTrans:
    torch.manual_seed(0)
    defaults = {"d_model": 16, "heads": 2, "feedforward": 24, "encoder_layers": 2, "decoder_layers": 3, "codes": 5}
    return HVQTrans([5, 7], [(6, 8), GRID], classes, **{**defaults, "dropout": 0.0, **options})


def features(batch: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in ((5, (6, 8)), (7, GRID))]


def books(level: Codebooks) -> list[np.ndarray]:
    return [tensor.numpy().copy() for book in level.books for tensor in (book.codes, book.counts, book.sums)]


def one_after_the_other(level: Codebooks, x: np.ndarray, classes: list[int], decay: float) -> tuple[np.ndarray, list]:
    """The released loop in NumPy: image by image, each with the codes that the one before left."""
    state = [[t.numpy().astype(np.float64) for t in (b.codes, b.counts, b.sums)] for b in level.books]
    out = np.empty_like(x, dtype=np.float64)
    for image, c in enumerate(classes):
        codes, counts, sums = state[c]
        distances = ((x[image][:, :, None] - codes[None]) ** 2).sum(1)  # (L, K)
        chosen = distances.argmin(1)
        out[image] = codes[:, chosen].T
        n, s = np.zeros_like(counts), np.zeros_like(sums)
        for token, k in zip(x[image], chosen, strict=True):
            n[k] += 1
            s[:, k] += token
        counts, sums = decay * counts + (1 - decay) * n, decay * sums + (1 - decay) * s
        total = counts.sum()
        smoothed = (counts + 1e-5) / (total + len(counts) * 1e-5) * total
        state[c] = [sums / smoothed, counts, sums]
    return out, [array for one in state for array in one]


def level_and_tokens() -> tuple[Codebooks, torch.Tensor, list[int]]:
    torch.manual_seed(2)
    level = Codebooks(4, 6, 3, decay=0.9)
    for book in level.books:
        book.counts.fill_(2.0)
    return level, torch.randn(8, 5, 4), [1, 0, 1, 1, 2, 0, 1, 0]


def test_codebooks_follow_as_if_one_image_came_after_the_other():
    level, x, classes = level_and_tokens()
    expected, state = one_after_the_other(level, x.numpy(), classes, 0.9)
    found = level.train()(x, classes)
    np.testing.assert_allclose(found.tokens.numpy(), expected, atol=1e-5)
    for ours, theirs in zip(books(level), state, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert float(found.commitment) == pytest.approx(((x.numpy() - expected) ** 2).mean(), rel=1e-5)


def test_rounds_take_the_first_image_of_every_class_then_the_second():
    assert rounds([1, 0, 1, 1, 0]) == [[0, 1], [2, 4], [3]]
    assert rounds([]) == []


def test_absent_classes_stay_and_present_ones_count_their_tokens():
    network = small().train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(features(), [0, 2, 0, 2])
    tokens = GRID[0] * GRID[1]
    for level in network.codebooks.values():
        assert float(level.books[0].counts.sum()) == pytest.approx(tokens * (0.01 + 0.99 * 0.01), rel=1e-5)
    for name, buffer in network.named_buffers():
        if ".books.1." in name:
            assert torch.equal(buffer, before[name]), name


def test_eval_mode_changes_no_buffer_and_the_score_no_reconstruction():
    network = small().train()
    network(features(), [0, 1, 2, 0])
    network.eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with_score, without = network(features(), [0, 1, 2, 0]), small(transport="off")
    network.distance_map(with_score, [0, 1, 2, 0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    without.load_state_dict(network.state_dict())
    again = without.eval()(features(), [0, 1, 2, 0])
    assert torch.equal(again.pair.reconstruction, with_score.pair.reconstruction)
    assert not torch.equal(network.distance_map(with_score, [0, 1, 2, 0]), without.distance_map(again, [0, 1, 2, 0]))


def test_the_gradient_passes_straight_through_the_codes():
    network = small().train()
    restored = network(features(), [0, 1, 2, 0])
    (restored.pair.reconstruction - restored.pair.target).square().mean().backward()
    assert network.input_projection.weight.grad.abs().max() > 0
    heads = [head.weight.grad for head in network.heads]
    assert all(gradient is not None for gradient in heads)
    network.zero_grad()
    network(features(), [0, 0, 2, 2]).pair.reconstruction.sum().backward()
    assert network.heads[1].weight.grad is None


@pytest.mark.parametrize(("hierarchy", "levels"), [(0, []), (1, [2]), (2, [2, 1]), (3, [2, 1, 0])])
def test_the_hierarchy_says_which_levels_are_quantised(hierarchy, levels):
    network = small(hierarchy=hierarchy).train()
    restored = network(features(), [0, 1, 2, 0])
    assert list(restored.levels) == levels
    assert restored.pair.reconstruction.shape == (4, 12, *GRID)
    assert (float(restored.commitment.detach()) > 0) == bool(levels)
    network.eval()
    assert network.distance_map(network(features(), [0, 1, 2, 0]), [0, 1, 2, 0]).shape == (4, *GRID)


def test_the_highest_levels_codes_enter_every_other_level():
    network = small().eval()
    restored = network(features(), [0, 1, 2, 0])
    for level in (1, 0):
        assert torch.equal(restored.levels[level].source[..., 16:], restored.levels[2].tokens)


def test_without_switching_there_is_one_set_and_no_class_is_needed():
    network = small(selector="none").train()
    assert len(network.heads) == 1
    assert {len(level.books) for level in network.codebooks.values()} == {1}
    network(features())
    with pytest.raises(ValueError, match="needs the class of each of the 4 images"):
        small()(features())
    with pytest.raises(ValueError, match=r"numbered 0 to 2, found \[3\]"):
        small()(features(), [0, 1, 2, 3])


def test_codebooks_and_heads_can_be_switched_apart():
    assert len(small(switched=["codebooks"]).heads) == 1
    only_heads = small(switched=["heads"])
    assert len(only_heads.heads) == 3
    assert {len(level.books) for level in only_heads.codebooks.values()} == {1}
    only_heads(features(), [0, 1, 2, 0])


def test_the_classifier_chooses_in_eval_mode_only():
    network = small(classes=2, selector="classifier")
    network(features(), [0, 1, 0, 1])  # training: the true classes
    with pytest.raises(RuntimeError, match="never fitted"):
        network.eval()(features())
    bright, dark = features(8, seed=3), features(8, seed=4)
    x = network.prepare([torch.cat([a + 2, b - 2]) for a, b in zip(bright, dark, strict=True)])[0]
    network.classifier.fit(PooledClassifier.pool(x), torch.tensor([0] * 8 + [1] * 8))
    unseen = [torch.cat([a + 2, b - 2]) for a, b in zip(features(2, seed=5), features(2, seed=6), strict=True)]
    restored = network(unseen)
    network.selector = "label"
    assert torch.equal(restored.pair.reconstruction, network(unseen, [0, 0, 1, 1]).pair.reconstruction)


def test_the_classifier_finds_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    pooled, classes = torch.randn(60, 6, generator=generator) * 5 + 3, torch.arange(60) % 3
    classifier = PooledClassifier(3, 3)
    classifier.fit(pooled, classes)
    inputs = ((pooled - pooled.mean(0)) / pooled.std(0, correction=0)).double()

    def objective(weight, bias):
        loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, classes)
        return loss + classifier.penalty * weight.square().sum()

    weight = classifier.weight.double().requires_grad_()
    gradient = torch.autograd.grad(objective(weight, classifier.bias.double()), weight)[0]
    assert gradient.abs().max() < 1e-3
    again = PooledClassifier(3, 3)
    again.fit(pooled, classes)
    assert torch.equal(again.weight, classifier.weight)


def test_codebooks_started_from_data_hold_tokens_of_their_own_class():
    network = small(codes=6)
    assert not network.codebooks_started
    weights = {name: parameter.clone() for name, parameter in network.named_parameters()}
    network.start_codebooks(features(), [0, 1, 2, 0], torch.Generator().manual_seed(0))
    assert network.codebooks_started
    restored = network.eval()(features(), [0, 1, 2, 0])
    for number, level in restored.levels.items():
        for c in range(3):
            own = torch.cat([level.source[i] for i, label in enumerate([0, 1, 2, 0]) if label == c])
            codes = network.codebooks[str(number)].books[c].codes.T
            distance = torch.cdist(codes, own).min(dim=1).values
            assert float(distance.max()) < 1e-4, (number, c)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())
    with pytest.raises(ValueError, match="No image of class 1"):
        small().start_codebooks(features(), [0, 0, 2, 2], torch.Generator())


def test_codes_in_use_are_counted_between_two_looks():
    network = small(codes=5).train()
    network(features(), [0, 1, 2, 0])
    shares = network.codes_in_use()
    assert set(shares) == {2, 1, 0}
    assert all(0 < share <= 1 for share in shares.values())
    assert set(network.codes_in_use().values()) == {0.0}


def test_the_transport_score_is_the_expected_cosine_distance_and_never_overflows():
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(1, 2, 4, generator=generator), torch.randn(1, 4, 3, generator=generator)
    expected = []
    for token in x[0].double().numpy():
        products = token @ codes[0].double().numpy()
        weights = np.exp(products / 3) / np.exp(products / 3).sum()
        lengths = np.linalg.norm(token) * np.linalg.norm(codes[0].double().numpy(), axis=0)
        expected.append((weights * (1 - products / lengths)).sum())
    np.testing.assert_allclose(transport_cost(x, codes, 3)[0].numpy(), expected, rtol=1e-5)
    assert torch.isfinite(transport_cost(x, codes * 1e6, 3)).all()
    assert torch.equal(transport_cost(x, torch.zeros(1, 4, 3), 3), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "labels"}, "selector names"),
        ({"transport": "on"}, "transport names"),
        ({"switched": ["decoder"]}, "switched names"),
        ({"hierarchy": 4}, "hierarchy is 4"),
        ({"classes": 0}, "at least one class"),
        ({"codes": 0}, "codes must be positive"),
        ({"decoder_layers": 0}, "at least one encoder and one decoder"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def _train(rank: int, processes: int, store: str, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    level, x, classes = level_and_tokens()
    outputs = []
    for step in range(2):
        found = level.train()((x + step)[rank::processes], classes[rank::processes])
        outputs.append(found.tokens.numpy())
    queue.put((rank, outputs, books(level)))
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_codebooks_of_one(tmp_path):
    level, x, classes = level_and_tokens()
    expected = [level.train()(x + step, classes).tokens.numpy() for step in range(2)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_train, args=(rank, 2, str(tmp_path / "store"), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    for rank, outputs, found in answers:
        for step, tokens in enumerate(outputs):
            np.testing.assert_array_equal(tokens, expected[step][rank::2])
        for ours, theirs in zip(found, books(level), strict=True):
            np.testing.assert_array_equal(ours, theirs)
