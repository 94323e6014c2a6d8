"""Training views: what they look like, that (seed, epoch, image) alone decides them, and epochs that go over images anew."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from datamodules import DatasetConfig, UnifiedDataModule
from datamodules.anomalies import confetti
from datamodules.anomalies.confetti import ConfettiConfig, ConfettiImages
from datamodules.anomalies.cutpaste import CutPaste, CutPasteConfig
from datamodules.errors import DataError
from datamodules.patch_pairs import DIRECTIONS, PatchPairs
from datamodules.sampling import TrainSampler

pytestmark = pytest.mark.filterwarnings("ignore:folder. 2 remarks")  # the trees here have no test image
RAMP = np.stack([np.add.outer(np.arange(96), np.arange(96))] * 3, axis=-1).astype(np.uint8)


def levels(image: np.ndarray) -> torch.Tensor:
    """Stands for the normalisation: grey levels as they are."""
    scale = 1 if image.dtype == np.uint8 else 255
    return torch.from_numpy((image * scale).astype(np.float32).transpose(2, 0, 1))


def views_of(kind: str):
    return {
        "cutpaste": CutPaste(CutPasteConfig()),
        "confetti": ConfettiImages(ConfettiConfig(), (90, 90)),
        "pairs": PatchPairs((96, 96)),
    }[kind]


@pytest.mark.parametrize("kind", ["cutpaste", "confetti", "pairs"])
def test_the_seed_alone_decides_a_view_and_the_image_stays(kind):
    image = RAMP.copy()
    for seed in range(5):
        one, other = views_of(kind)(image, seed, levels), views_of(kind)(image, seed, levels)
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    np.testing.assert_array_equal(image, RAMP)


def test_only_the_pasted_part_differs_and_both_kinds_are_as_large_as_they_should_be():
    make = CutPaste(CutPasteConfig(jitter=0.0, image_jitter=0.0))
    shares: dict[str, list[float]] = {"pasted": [], "scar": []}
    noisy = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    for seed in range(60):
        views = make(noisy, seed, levels)
        np.testing.assert_array_equal(views["image"].numpy(), noisy.transpose(2, 0, 1))
        for name, found in shares.items():
            found.append(float((views[name] != views["image"]).any(0).float().mean()))
    assert 0.05 < np.mean(shares["pasted"]) < 0.11  # uniform from 0.02 to 0.15
    assert max(shares["scar"]) <= 16 * 25 / 96**2 * 1.1
    assert min(shares["scar"]) > 0


@pytest.mark.parametrize(("kind", "names"), [("normal", {"pasted"}), ("scar", {"pasted"}), ("union", {"pasted"})])
def test_two_class_kinds_have_one_pasted_image(kind, names):
    config = CutPasteConfig(kind=kind)
    assert config.classes == 2
    assert set(CutPaste(config)(RAMP, 0, levels)) - {"image", "mask"} == names


def test_translation_and_crops_keep_what_is_asked_for():
    moved = CutPaste(CutPasteConfig(translation=0.2, image_jitter=0.0))(RAMP, 3, levels)["image"]
    assert moved.shape == (3, 96, 96)
    assert not np.array_equal(moved.numpy(), RAMP.transpose(2, 0, 1))
    assert CutPaste(CutPasteConfig(), crop=64)(RAMP, 0, levels)["scar"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CutPasteConfig(kind="4way"), "normal, scar, union, 3way"),
        (lambda: CutPasteConfig(scar_axes="swapped"), "mended, released"),
        (lambda: CutPasteConfig(jitter=0.7), r"cutpaste\.jitter"),
        (lambda: ConfettiConfig(sides=(9, 3)), r"confetti\.sides"),
        (lambda: ConfettiConfig(dark=0.0), "coloured and dark"),
        (lambda: ConfettiConfig(mask="none"), "everywhere, changed"),
        (lambda: ConfettiConfig(rotation_center="x"), "mended, released"),
        (lambda: PatchPairs((96, 96), clip="moved"), "kept, redraw"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_confetti_darkens_and_black_images_change_all_the_same():
    grey, black = np.full((96, 96, 3), 120, np.uint8), np.zeros((96, 96, 3), np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        changed = confetti.confetti(rng, grey, ConfettiConfig())
        assert (changed <= grey).all()
        assert (changed < grey).any()
        assert (confetti.confetti(np.random.default_rng(seed), black, ConfettiConfig()) > 0).any()


def test_half_of_the_images_get_confetti_and_their_masks_say_where():
    everywhere, changed = (ConfettiImages(ConfettiConfig(mask=mask), (90, 90)) for mask in ("everywhere", "changed"))
    labels = []
    for seed in range(80):
        one, other = everywhere(RAMP, seed, levels), changed(RAMP, seed, levels)
        labels.append(one["synthetic"])
        assert one["image"].shape == (3, 90, 90)
        assert bool(one["mask"].all()) == bool(one["synthetic"])
        assert not other["synthetic"] or other["mask"].float().mean() < 1
        assert torch.equal(one["image"], other["image"])
    assert 0.3 < np.mean(labels) < 0.7


def test_real_defects_come_with_their_masks():
    mask = np.zeros((96, 96), bool)
    mask[10:90, 10:90] = True
    make = ConfettiImages(ConfettiConfig(), (90, 90), [(np.full_like(RAMP, 200), mask)])
    found = [view for seed in range(20) if (view := make(RAMP, seed, levels))["synthetic"]]
    assert found
    assert all(0.5 < view["mask"].float().mean() < 1 for view in found)


def test_pairs_are_where_their_label_says_and_clipped_ones_are_drawn_again_on_demand():
    kept, redraw = PatchPairs((256, 256)), PatchPairs((256, 256), clip="redraw")
    counts = Counter()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        for side in (64, 32):
            (first, second), label = redraw.position(rng, side)
            for f, s, direction in zip(first, second, DIRECTIONS[label], strict=True):
                assert abs(s - f) >= 3 * side // 4 if direction else abs(s - f) == 0
                assert (s > f) - (s < f) == direction
            near = redraw.near(rng, side)
            assert max(abs(a - b) for a, b in zip(*near, strict=True)) <= side // 32
        (first, second), label = kept.position(rng, 64)
        counts["clipped"] += any(s in (0, 192) for s in second)
    assert 0.3 < counts["clipped"] / 300 < 0.5  # 39 %


def test_pairs_carry_the_image_at_their_corners():
    view = PatchPairs((96, 96))(RAMP, 1, levels)
    for side in (64, 32):
        for patch, (top, left) in zip(view[f"near_{side}"], view[f"corners_{side}"][1].tolist(), strict=True):
            np.testing.assert_array_equal(patch.numpy(), RAMP[top : top + side, left : left + side].transpose(2, 0, 1))
        noise = view[f"position_{side}"][0] - torch.from_numpy(
            RAMP[slice(*_span(view, side, 0)), slice(*_span(view, side, 1))].transpose(2, 0, 1).astype(np.float32)
        )
        assert 2 < noise.std() < 12  # 0.02 per number and per channel, in 255 grey levels
        assert view[f"label_{side}"] in range(8)


def _span(view, side: int, axis: int) -> tuple[int, int]:
    start = int(view[f"corners_{side}"][0, 0, axis])
    return start, start + side


@pytest.fixture(scope="module")
def tree(make, tmp_path_factory):
    return make.folders(tmp_path_factory.mktemp("tree"), 80)


def module(tree, **options) -> UnifiedDataModule:
    data = UnifiedDataModule(
        [DatasetConfig("folder", str(tree))],
        image_size=64,
        resize="pil_bilinear",
        **{"batch_size": 2, "num_workers": 0, **options},
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("views", [CutPaste(CutPasteConfig()), ConfettiImages(ConfettiConfig(), (60, 60))])
def test_workers_and_processes_change_nothing_and_epochs_do(tree, views):
    def drawn(data, epoch: int) -> dict[int, torch.Tensor]:
        data.view_training_images(views)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {n: image for batch in loader for n, image in zip(batch["id"].tolist(), batch["image"], strict=True)}

    one, later, workers = drawn(module(tree), 0), drawn(module(tree), 1), drawn(module(tree, num_workers=2), 0)
    parts = {}
    for rank in range(2):
        part = module(tree)
        part._place = lambda rank=rank: (2, rank)
        parts |= drawn(part, 0)
    assert len(one) == 10
    assert all(torch.equal(image, workers[n]) and torch.equal(image, parts[n]) for n, image in one.items())
    assert any(not torch.equal(image, later[n]) for n, image in one.items())
    plain = module(tree)
    plain.view_training_images(views)
    batch = next(iter(plain.train_images()))
    assert "pasted" not in batch
    assert batch["image"].shape[-1] == 64


def test_views_and_synthetic_anomalies_exclude_each_other(tree):
    from datamodules.anomalies.sources import AnomalyConfig

    with pytest.raises(DataError, match=r"data\.init_args\.anomalies"):
        module(tree, anomalies=AnomalyConfig("own")).view_training_images(CutPaste(CutPasteConfig()))


def test_an_epoch_goes_over_the_images_as_often_as_asked_and_batches_cross_the_passes(tree):
    data = module(tree, repeat=3, batch_size=4)
    loader = data.train_dataloader()
    ids = [number for batch in loader for number in batch["id"].tolist()]
    assert Counter(Counter(ids).values()) == {3: 10}
    assert len(loader) == 8
    seeds = [draw.seed for draw in loader.sampler.order()]
    assert len(set(seeds)) == 30
    with pytest.raises(DataError, match="repeat must be at least 1"):
        module(tree, repeat=0)


def test_repeated_draws_are_dealt_to_processes_without_rest():
    names = ["a"] * 5
    parts = [list(TrainSampler(names, names, names, num_replicas=2, rank=rank, repeat=3)) for rank in range(2)]
    assert [len(part) for part in parts] == [8, 8]
    assert Counter(draw.row for part in parts for draw in part).most_common()[-1][1] >= 3
