"""What a run's numbers must be read with is said when it starts, not only by check-data."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from datamodules.dataset import TableDataset
from datamodules.sampling import EvalSampler
from results.common import contents


def module(root, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    made = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], **chosen)
    made.setup()
    return made


def test_sound_data_needs_no_remark(make, tmp_path):
    assert module(make.mvtec(tmp_path)).remarks() == []


def test_a_test_image_that_was_trained_on_is_named(make, tmp_path):
    base = make.mvtec(tmp_path) / "bottle"
    shutil.copy(base / "train/good/001.png", base / "test/good/000.png")
    (said,) = module(tmp_path).remarks()
    assert "1 test image of 4: the same file is used for training" in said
    assert str(base / "test/good/000.png") in said


def test_defects_that_vanish_at_the_runs_size_are_counted_and_can_be_kept(make, tmp_path):
    base = make.mvtec(tmp_path, defects=3) / "bottle"
    for number in range(2):
        mask = np.zeros((40, 48), np.uint8)
        mask[0, 0] = 255  # the centre of a pixel at 16 x 16 lies elsewhere
        cv2.imwrite(str(base / f"ground_truth/broken/{number:03d}_mask.png"), mask)
    data = module(tmp_path)
    (said,) = data.remarks()
    assert "2 of 3 masks of defects vanish at 16 x 16 pixels" in said
    assert "mask_resize=area" in said
    kept = module(tmp_path, mask_resize="area")
    assert kept.remarks() == ["masks are resized by area"]
    masks = [mask.any() for batch in kept.test_dataloader() for mask in batch["mask"][batch["label"] == 1]]
    assert all(masks)
    assert data.content() != kept.content(), "cached masks of one would be served to the other"


def test_a_training_of_less_than_a_batch_keeps_its_short_batch_and_says_so(make, tmp_path):
    make.mvtec(tmp_path, train=6)
    data = module(tmp_path, batch_size=8, drop_last=True)
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [6]
    assert any("6 training images make no full batch of 8" in said for said in data.remarks())
    full = module(tmp_path, batch_size=4, drop_last=True)
    assert [len(batch["id"]) for batch in full.train_dataloader()] == [4]
    assert full.remarks() == []


def test_a_process_without_images_repeats_one_so_that_it_takes_part():
    rows = TableDataset(["a", "b"], None, (0, 0, 0), (1, 1, 1))
    assert [list(EvalSampler(rows, 3, rank, repeat=True)) for rank in range(3)] == [[0], [1], [0]]
    assert [list(EvalSampler(rows, 3, rank)) for rank in range(3)] == [[0], [1], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"cache_mb": -1}, "cache_mb must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_megapixels": 0}, "max_megapixels must be positive"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean and std are three numbers"),
        ({"mean": (0.5,) * 3, "std": (0.1, 0.0, 0.1)}, "std positive"),
        ({"mask_resize": "aera"}, "Did you mean 'area'"),
        ({"augmentation": "unias_mvtek"}, "Did you mean 'unias_mvtec'"),
        ({"test_subset": "ful"}, "Did you mean 'full'"),
        ({"setting": "per_categry"}, "Did you mean 'per_category'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(DataError, match=message):
        UnifiedDataModule([DatasetConfig("mvtec_ad", "/nowhere")], **options)


def test_a_float_image_is_refused_at_the_start_with_its_file(make, tmp_path):
    base = make.mvtec(tmp_path) / "bottle"
    cv2.imwrite(str(base / "train/good/009.tiff"), np.ones((8, 8), np.float32))
    with pytest.raises(DataError, match=r"009\.tiff: pixels are float32, here from 1 to 1"):
        module(tmp_path)


def test_what_is_remembered_of_the_files_is_not_read_again_for_the_remarks(make, tmp_path, monkeypatch):
    base = make.mvtec(tmp_path / "data") / "bottle"
    shutil.copy(base / "train/good/001.png", base / "test/good/000.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contents, "RECENT", -(10**18))
    data = module(tmp_path / "data")

    def read_again(path):
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(contents, "_hash", read_again)
    (said,) = data.remarks()
    assert "1 test image of 4: the same file is used for training" in said
