"""A centre crop treats images and masks alike, and says what of the defects it cuts off."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from datamodules.__main__ import main
from datamodules.check import check
from datamodules.images import centre
from datamodules.margin import Margin, kept, margin


def module(root, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    made = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], **chosen)
    made.setup()
    return made


def marked(path, rows, columns, size=(40, 40)):
    mask = np.zeros(size, np.uint8)
    mask[rows, columns] = 255
    assert cv2.imwrite(str(path), mask)


def test_the_centre_is_that_of_the_released_transform():
    array = np.arange(9 * 8).reshape(9, 8)
    for size in ((9, 8), (4, 4), (3, 5), (6, 3)):
        top, left = round((9 - size[0]) / 2), round((8 - size[1]) / 2)  # torchvision's CenterCrop
        np.testing.assert_array_equal(centre(array, size), array[top : top + size[0], left : left + size[1]])
    assert centre(np.zeros((448, 448)), (392, 392)).shape == (392, 392)


def test_images_are_resized_and_cropped_like_the_released_code(make, tmp_path):
    data = module(make.mvtec(tmp_path), crop_from=(20, 24), image_size=(16, 16), mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(iter(data.test_dataloader()))
    whole = np.asarray(Image.open(batch["path"][2]).convert("RGB").resize((24, 20), Image.BILINEAR))
    expected = torch.from_numpy(whole[2:18, 4:20].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch["image"][2], expected, rtol=0, atol=1e-6)


def test_masks_lose_exactly_the_margin(make, tmp_path):
    base = make.mvtec(tmp_path, defects=1) / "bottle"
    path = base / "ground_truth/broken/000_mask.png"
    image = cv2.imread(str(base / "test/broken/000.png"))
    cv2.imwrite(str(base / "test/broken/000.png"), cv2.resize(image, (40, 40)))
    marked(path, slice(0, 10), slice(10, 30))
    data = module(tmp_path, image_size=24, crop_from=40)
    batch = next(iter(data.test_dataloader()))
    expected = np.asarray(Image.open(path))[8:32, 8:32] > 0
    np.testing.assert_array_equal(batch["mask"][batch["label"] == 1][0, 0].numpy(), expected)
    assert expected.sum() == 2 * 20


def test_what_the_margin_holds_is_counted():
    masks = [np.zeros((10, 10), bool) for _ in range(4)]
    masks[0][4:6, 4:6] = True  # inside
    masks[1][0, :] = True  # in the margin
    masks[2][0:4, 5] = True  # half
    found = margin(kept(mask, (6, 6)) for mask in masks)
    assert found == Margin(images=3, cut=1, lost=1, pixels=18, cut_pixels=12)


def test_a_run_says_what_its_crop_cuts_off_and_one_without_a_crop_says_nothing(make, tmp_path):
    base = make.mvtec(tmp_path, defects=2) / "bottle"
    for number in range(2):
        make.image(base / f"test/broken/{number:03d}.png", size=(40, 40), seed=number)
    marked(base / "ground_truth/broken/000_mask.png", slice(0, 4), slice(0, 40))
    marked(base / "ground_truth/broken/001_mask.png", slice(20, 22), slice(20, 30))
    (said,) = module(tmp_path, image_size=32, crop_from=40).remarks()
    assert "the centre of 32 x 32 of 40 x 40 pixels is kept" in said
    assert "160 of 180 defective pixels (88.9%)" in said
    assert "2 images with a mask, 1 lose the whole defect" in said
    assert module(tmp_path, image_size=32).remarks() == []


def test_the_crop_is_part_of_how_images_are_resized(make, tmp_path):
    root = make.mvtec(tmp_path)
    assert module(root).resizing == "pil_bilinear"
    assert module(root, crop_from=20).resizing == "pil_bilinear to 20x20, centre crop"
    assert module(root, crop_from=(20, 24)).resizing != module(root, crop_from=20).resizing


@pytest.mark.parametrize(
    ("crop_from", "told"),
    [(12, "at least the image size"), ((20, 12), "at least the image size"), (0, "positive side")],
)
def test_a_crop_that_cannot_be_is_refused(make, tmp_path, crop_from, told):
    with pytest.raises(DataError, match=told):
        module(make.mvtec(tmp_path), crop_from=crop_from)


def test_check_data_counts_what_a_crop_would_cut_off(make, tmp_path, capsys):
    base = make.mvtec(tmp_path, defects=2) / "bottle"
    marked(base / "ground_truth/broken/000_mask.png", slice(0, 1), slice(0, 48), size=(40, 48))
    marked(base / "ground_truth/broken/001_mask.png", slice(20, 22), slice(20, 30), size=(40, 48))
    (found,) = [p for p in check("mvtec_ad", tmp_path, crop=(40, 32)).problems if p.kind == "defects in the margin"]
    assert "2 images with a mask, 1 lose the whole defect" in found.message
    assert found.files == (str(base / "ground_truth/broken/000_mask.png"),)
    words = ["check", "--dataset", "mvtec_ad", "--data-root", str(tmp_path), "--crop-from", "40"]
    assert main([*words, "--image-size", "32"]) == 0
    assert "defects in the margin" in capsys.readouterr().out
    assert main(words) == 2
