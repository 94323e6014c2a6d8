"""Prediction on any folder: what can be read is served, what cannot is named."""

from __future__ import annotations

import os

import pytest
import torch

from datamodules import DataError, UnifiedDataModule
from datamodules.prediction import unknown_rows


def rows(batches):
    pairs = [pair for batch in batches for pair in zip(batch["path"], batch["error"], strict=True)]
    return {path.rpartition("/")[2]: error for path, error in pairs}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_named_and_the_others_are_served(make, tmp_path, workers):
    good = make.image(tmp_path / "new" / "good.png", seed=1)
    (tmp_path / "new" / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "new" / "empty.jpg").touch()
    (tmp_path / "new" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "new" / "pipe.png")
    make.image(tmp_path / "new" / "folder.png" / "inner.png", seed=2)
    make.image(tmp_path / "new" / f"{'x' * 250}.png", seed=3)
    data = UnifiedDataModule([], 16, "pil_bilinear", 2, predict_root=str(tmp_path / "new"), num_workers=workers)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    found = rows(batches)
    assert {name for name, error in found.items() if not error} == {"good.png", "inner.png", f"{'x' * 250}.png"}
    assert "truncated" in found["cut.png"]
    assert "empty" in found["empty.jpg"]
    assert "link to nothing" in found["dead.png"]
    assert "pipe" in found["pipe.png"]
    assert all(torch.isfinite(batch["image"]).all() for batch in batches)


def test_images_of_training_are_still_refused_when_broken(make, tmp_path):
    from datamodules import DatasetConfig

    root = make.mvtec(tmp_path)
    (root / "bottle/train/good/001.png").write_bytes(b"no image")
    data = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], 16, "pil_bilinear", 4, num_workers=0)
    with pytest.raises(DataError, match=r"001\.png"):
        data.setup()


def test_usual_suffixes_and_linked_folders_are_read_and_the_rest_is_listed(make, tmp_path):
    for name in ("a.gif", "b.jfif.jpg", "c.jp2", "d.PPM", "e.avif"):
        make.image(tmp_path / "new" / name)
    (tmp_path / "new" / "b.jfif.jpg").rename(tmp_path / "new" / "b.jfif")
    make.image(tmp_path / "elsewhere" / "f.png")
    (tmp_path / "new" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "new" / "loop").symlink_to(tmp_path / "new")
    make.mask(tmp_path / "new" / "ground_truth" / "a_mask.png")
    (tmp_path / "new" / "photo.heic").write_bytes(b"not read")
    (tmp_path / "new" / ".hidden.png").write_bytes(b"not looked at")
    with pytest.warns(UserWarning, match=r"1 file not read, by suffix: photo\.heic"):
        found = unknown_rows(tmp_path / "new")
    assert [os.path.basename(row.image_path) for row in found] == [
        "a.gif",
        "b.jfif",
        "c.jp2",
        "d.PPM",
        "e.avif",
        "f.png",
    ]
    data = UnifiedDataModule([], 16, "pil_bilinear", 2, predict_root=str(tmp_path / "new"), num_workers=0)
    with pytest.warns(UserWarning, match="not read"):
        data.setup("predict")
    assert set(rows(data.predict_dataloader()).values()) == {""}


def test_names_that_are_not_utf8_are_served(make, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"new", b"caf\xe9.png")
    make.image(tmp_path / "new" / "a.png")
    os.rename(tmp_path / "new" / "a.png", name)
    data = UnifiedDataModule([], 16, "pil_bilinear", 2, predict_root=str(tmp_path / "new"), num_workers=0)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert os.fsencode(batch["path"][0]) == name
    assert batch["error"] == [""]


def test_the_depth_of_images_is_inferred_from_those_that_can_be_read(tmp_path):
    import cv2
    import numpy as np

    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((8, 8), 4095, np.uint16))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    data = UnifiedDataModule([], 16, "pil_bilinear", 2, predict_root=str(tmp_path), num_workers=0)
    with pytest.warns(UserWarning, match="read as 12 bits"):
        data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [bool(error) for error in batch["error"]] == [True, False]
    assert batch["image"][1].amax() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


def test_of_several_datasets_the_images_belong_to_the_one_around_them_or_the_one_named(make, tmp_path):
    from datamodules import DatasetConfig

    inner = tmp_path / "a" / "inner"
    datasets = [
        DatasetConfig("mvtec_ad", str(root), label=name)
        for name, root in (("a", tmp_path / "a"), ("b", tmp_path / "b"), ("c", inner))
    ]
    image = make.image(tmp_path / "new" / "x.png")
    for folder, named, expected in (
        (make.image(tmp_path / "b" / "x.png"), None, "b"),
        (make.image(tmp_path / "a" / "x.png").parent, None, "a"),
        (make.image(inner / "x.png"), None, "c"),
        (image, None, ""),
        (image, "b", "b"),
        (tmp_path / "a", "b", "b"),
    ):
        options = {"predict_root": str(folder), "predict_dataset": named, "num_workers": 0}
        data = UnifiedDataModule(datasets, 16, "pil_bilinear", 2, **options)
        data.setup("predict")
        batch = next(iter(data.predict_dataloader()))
        assert set(batch["dataset"]) == {expected}
    with pytest.raises(DataError, match="Did you mean"):
        UnifiedDataModule(datasets, 16, "pil_bilinear", 2, predict_dataset="bb")


def test_a_place_that_is_not_there_is_told_from_a_folder_without_images(tmp_path):
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "is not there"), ("dead.png", "a link to nothing"), ("empty", "no image there")):
        with pytest.raises(DataError, match=words):
            unknown_rows(tmp_path / name)
