"""Random patches of images: what a teacher is trained on."""

import numpy as np
import pytest
import torch

from datamodules.patches import RandomPatches


def images(count: int = 8) -> list[np.ndarray]:
    """Each of one grey value, so that a patch tells its image."""
    return [np.full((40, 56, 3), 20 * number, np.uint8) for number in range(count)]


def test_the_seed_alone_decides_what_is_drawn():
    one, again, other = (RandomPatches(images(), seed).draw(6, 17, positives=True) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.anchors, other.anchors)


def test_the_next_anchor_is_of_another_image_and_a_positive_of_the_same_with_noise():
    anchors, positives = RandomPatches(images(), 0).draw(8, 17, positives=True)
    assert anchors.shape == positives.shape == (8, 3, 17, 17)
    values = (anchors[:, 0, 0, 0] * 255 / 20).round()
    assert sorted(values.tolist()) == list(range(8))
    noise = positives - anchors
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().abs() < 0.01


def test_a_patch_is_a_sixteenth_to_a_quarter_of_its_image():
    ramp = np.repeat(np.arange(0, 240, dtype=np.uint8)[None, :, None], 240, axis=0).repeat(3, axis=2)
    anchors = RandomPatches([ramp], 0).draw(200, 17).anchors[:, 0]
    width = (anchors[:, 0, -1] - anchors[:, 0, 0]) * 255 * 17 / 16  # a pixel is one grey value wide
    assert 13 < width.min() < 20
    assert 50 < width.max() < 62


def test_more_patches_than_images_and_images_smaller_than_a_patch_are_fine():
    anchors, positives = RandomPatches([np.zeros((5, 7, 3), np.uint8)], 0).draw(4, 33)
    assert anchors.shape == (4, 3, 33, 33)
    assert positives is None
    with pytest.raises(ValueError, match="no image"):
        RandomPatches([], 0)
