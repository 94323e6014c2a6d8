"""Augmentation per category."""

from __future__ import annotations

from collections import Counter

import albumentations
import numpy as np
import pytest

from datamodules.augmentation import AUGMENTATIONS, SYMMETRIES_OF, Augmentation, apply_symmetry
from datamodules.errors import DataError

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
MASK = IMAGE[..., 0] % 5 == 0


def poses(augmentation, category, count=300):
    """How often each of the eight poses of the square comes."""
    square = {}
    for turns in range(4):
        for flip in (False, True):
            square[np.rot90(IMAGE[:, ::-1] if flip else IMAGE, turns).tobytes()] = (turns, flip)
    return Counter(square[augmentation(IMAGE, MASK, category, seed)[0].tobytes()] for seed in range(count))


def test_image_and_mask_move_together():
    augmentation = Augmentation("unias_mvtec", ["screw"])
    for seed in range(20):
        image, mask = augmentation(IMAGE, MASK, "screw", seed)
        np.testing.assert_array_equal(mask, image[..., 0] % 5 == 0)
        assert mask.dtype == bool


def test_the_seed_alone_decides():
    augmentation = Augmentation("unias_mvtec", ["screw", "wood"])
    first = [augmentation(IMAGE, MASK, "screw", seed)[0] for seed in range(10)]
    again = [augmentation(IMAGE, MASK, "screw", seed)[0] for seed in reversed(range(10))][::-1]
    np.testing.assert_array_equal(first, again)


def test_categories_outside_the_lists_stay_as_they_are():
    augmentation = Augmentation("unias_mvtec", ["screw", "cable"])
    for seed in range(10):
        image, mask = augmentation(IMAGE, MASK, "cable", seed)
        assert image is IMAGE
        assert mask is MASK


def test_flip_only_and_rotating_categories_have_the_released_frequencies():
    flips = poses(Augmentation("unias_mvtec", ["zipper"]), "zipper")
    assert set(flips) == {(0, False), (0, True), (2, True), (2, False)}
    assert 0.42 < flips[(0, False)] / 300 < 0.56  # neither flip: 0.7 * 0.7
    turns = poses(Augmentation("unias_mvtec", ["screw"]), "screw")
    assert len(turns) == 8
    assert 0.12 < (turns[(1, False)] / 300) * 2 < 0.42


def test_hazelnut_is_augmented_unless_the_release_is_followed():
    assert len(poses(Augmentation("unias_mvtec", ["hazelnut"]), "hazelnut", 60)) == 8
    released = Augmentation("unias_mvtec_released", ["hazelnut", "screw"])
    assert len(poses(released, "hazelnut", 60)) == 1


def test_visa_lists_differ_by_direction():
    assert set(poses(Augmentation("unias_visa", ["candle"]), "candle", 80)) == {(0, False), (0, True)}
    assert len(poses(Augmentation("unias_visa", ["fryum"]), "fryum", 80)) == 8


@pytest.mark.parametrize("name", ["unias_mvtec", "unias_mvtec_released", "unias_visa"])
@pytest.mark.parametrize("category", ["screw", "zipper", "fryum", "candle", "hazelnut", "cable"])
def test_the_symmetry_of_a_seed_is_what_the_pipeline_does_with_it(name, category):
    augmentation = Augmentation(name, ["screw", "fryum", "hazelnut", "zipper", "candle", "cable"])
    drawn = set()
    for seed in range(150):
        symmetry = augmentation.symmetry(category, seed)
        image, mask = augmentation(IMAGE, MASK, category, seed)
        np.testing.assert_array_equal(apply_symmetry(IMAGE, symmetry), image)
        np.testing.assert_array_equal(apply_symmetry(MASK, symmetry), mask)
        drawn.add(symmetry)
    assert augmentation.symmetries(category) == tuple(sorted(drawn))


@pytest.mark.parametrize("name", SYMMETRIES_OF)
def test_each_transform_gives_the_symmetries_that_are_told_of_it(name, monkeypatch):
    transform = getattr(albumentations, name)
    monkeypatch.setitem(AUGMENTATIONS, "one", lambda category: [transform(p=0.5)])
    augmentation = Augmentation("one", ["gear"])
    assert {augmentation.symmetry("gear", seed) for seed in range(150)} == set(augmentation.symmetries("gear"))


def test_a_policy_that_changes_colours_has_no_symmetries(monkeypatch):
    monkeypatch.setitem(
        AUGMENTATIONS,
        "colours",
        lambda category: [albumentations.HorizontalFlip(), albumentations.RandomBrightnessContrast()],
    )
    assert Augmentation("colours", ["gear"]).symmetries("gear") is None


def test_keys_with_their_dataset_find_their_category():
    assert len(poses(Augmentation("unias_mvtec", {"mvtec_ad/screw": "screw"}), "mvtec_ad/screw", 60)) == 8


def test_wrong_name_empty_policy_and_oblong_images_are_errors():
    assert "none" in AUGMENTATIONS
    with pytest.raises(DataError, match="Did you mean 'unias_mvtec'"):
        Augmentation("unias_mvtc", ["screw"])
    with pytest.raises(DataError, match="nothing for any of the categories candle"):
        Augmentation("unias_mvtec", ["candle"])
    oblong = Augmentation("unias_mvtec", ["screw"])
    with pytest.raises(DataError, match="square"):
        [oblong(IMAGE[:4], MASK[:4], "screw", seed) for seed in range(20)]


def test_destseg_turns_what_has_no_upright_and_fills_the_corners_grey():
    image = np.full((32, 32, 3), 200, np.uint8)
    image[:4] = 20
    mask = np.zeros((32, 32), bool)
    augmentation = Augmentation("destseg_mvtec", ["screw", "wood", "pill"])
    assert augmentation.symmetries("screw") is None  # so that no feature of such images is cached
    sides, grey = set(), False
    for seed in range(40):
        turned, _ = augmentation(image, mask, "screw", seed)
        slight, _ = augmentation(image, mask, "wood", seed)
        edges = {"top": turned[1], "bottom": turned[-2], "left": turned[:, 1], "right": turned[:, -2]}
        sides.add(min(edges, key=lambda side: np.median(edges[side])))
        grey |= bool((turned[0, 0] == 114).all() or (turned[-1, -1] == 114).all())
        assert np.median(slight[1]) < 100  # its dark edge stays on top
        np.testing.assert_array_equal(augmentation(image, mask, "pill", seed)[0], image)
    assert sides == {"top", "bottom", "left", "right"}
    assert grey
