"""`check-data` finds what is wrong before training does."""

from __future__ import annotations

import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.__main__ import main
from datamodules.check import check
from datamodules.errors import DataError
from datamodules.problems import number_of
from datamodules.readers import list_dataset, raise_on_errors


def kinds(report):
    return {(problem.severity, problem.kind) for problem in report.problems}


def test_a_sound_dataset_has_no_problem_and_exit_code_zero(make, tmp_path, capsys):
    make.mvtec(tmp_path, "nut")
    assert main(["check", "--dataset", "folder", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "nut" in out
    assert "0 errors, 0 warnings" in out


def test_counts_stand_beside_the_published_ones(make, tmp_path, capsys):
    make.mvtec(tmp_path, "bottle")
    assert main(["check", "--dataset", "mvtec_ad", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 / 209" in out
    assert "2 of 2" in out
    assert "train 4 instead of 209" in out
    assert "absent categories" in out


def test_every_trap_is_listed_with_its_file(make, tmp_path, capsys):
    root = make.mvtec(tmp_path, "nut", train=6, defects=6)
    base, truth = root / "nut", root / "nut" / "ground_truth" / "broken"
    (truth / "000_mask.png").unlink()
    make.mask(truth / "900_mask.png")
    make.mask(truth / "001_mask.png", size=(30, 30))
    make.mask(truth / "002_mask.png", value=0)
    cv2.imwrite(str(truth / "003_mask.png"), np.full((40, 48), 255, np.uint8))
    (truth / "004_mask.png").write_bytes(b"no image")
    half = base / "test" / "broken" / "005.png"
    half.write_bytes(half.read_bytes()[:-40])
    cv2.imwrite(str(base / "train/good/000.png"), np.zeros((40, 48), np.uint16))
    Image.new("RGBA", (48, 40)).save(base / "train/good/001.png")
    Image.new("P", (48, 40)).save(base / "train/good/002.png")
    make.image(base / "train/good/003.jpg")
    shutil.copy(base / "train/good/004.png", base / "test/good/000.png")
    report = check("folder", root)
    assert kinds(report) == {
        ("warning", "missing mask"),
        ("warning", "orphan mask"),
        ("error", "size mismatch"),
        ("warning", "empty mask"),
        ("warning", "full-window mask"),
        ("error", "unreadable mask"),
        ("error", "unreadable image"),
        ("warning", "16-bit image"),
        ("warning", "RGB with alpha image"),
        ("warning", "palette image"),
        ("warning", "duplicate stem"),
        ("warning", "test image in training"),
    }
    assert main(["check", "--dataset", "folder", "--data-root", str(root)]) == 1
    out = capsys.readouterr().out
    for name in ("900_mask.png", "001_mask.png", "002_mask.png", "003_mask.png", "004_mask.png", "005.png", "003.jpg"):
        assert name in out


def test_small_images_and_masks_that_look_inverted_are_told_once_with_their_files(make, tmp_path, capsys):
    base = make.mvtec(tmp_path, "nut", defects=3) / "nut"
    for name in ("000", "001"):
        make.image(base / "train" / "good" / f"{name}.png", size=(31, 64), seed=int(name) + 1)
        mask = base / "ground_truth" / "broken" / f"{name}_mask.png"
        cv2.imwrite(str(mask), 255 - cv2.imread(str(mask)))
    inverted, small = check("folder", tmp_path).problems
    assert small.message == "2 images: a side is shorter than 32 pixels"
    assert small.files == tuple(str(base / "train" / "good" / name) for name in ("000.png", "001.png"))
    assert inverted.message == "2 masks: more than half of the image is marked: inverted?"
    assert inverted.files == tuple(
        str(base / "ground_truth/broken" / name) for name in ("000_mask.png", "001_mask.png")
    )
    (base / "train" / "good" / "001.png").unlink()
    assert main(["check", "--dataset", "folder", "--data-root", str(tmp_path)]) == 0
    assert "1 image: a side" in capsys.readouterr().out


def test_counts_are_told_in_singular_and_plural():
    told = [number_of(*pair) for pair in ((1, "error"), (0, "error"), (1, "category"), (2, "category"))]
    assert told == ["1 error", "0 errors", "1 category", "2 categories"]


def test_category_without_normals_is_an_error(make, tmp_path):
    root = make.mvtec(tmp_path, "nut")
    shutil.rmtree(root / "nut" / "train" / "good")
    assert ("error", "category without normals") in kinds(check("folder", root))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "foldr"], "Did you mean 'folder'"),
        (["--dataset", "folder", "--categories", "nutt"], "Did you mean 'nut'"),
    ],
)
def test_typos_get_exit_code_two_and_the_nearest_name(make, tmp_path, capsys, arguments, message):
    make.mvtec(tmp_path, "nut")
    assert main(["check", "--data-root", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_left_unread_beside_the_images_is_told(make, tmp_path):
    good = make.mvtec(tmp_path, "nut") / "nut" / "train" / "good"
    make.image(good / "monday" / "000.png")
    (good / "photo.heic").write_bytes(b"a format that is not read")
    (good / "Thumbs.db").write_bytes(b"of no interest")
    (good / "away.png").symlink_to(tmp_path / "nowhere.png")
    (found,) = [problem for problem in check("folder", tmp_path).problems if problem.kind == "not read"]
    assert found.files == tuple(str(good / name) for name in ("away.png", "monday", "photo.heic"))


@pytest.mark.parametrize(
    ("gone", "lacking"),
    [
        (("good",), "no normal test image"),
        (("broken",), "no anomalous test image"),
        (("good", "broken"), "no test image"),
    ],
)
def test_a_test_set_that_cannot_be_scored_is_told(make, tmp_path, gone, lacking):
    make.mvtec(tmp_path, "nut")
    shutil.rmtree(tmp_path / "nut" / "ground_truth")
    for name in gone:
        shutil.rmtree(tmp_path / "nut" / "test" / name)
    (found,) = check("folder", tmp_path).problems
    assert found.kind == "one-sided test set"
    assert lacking in found.message


def test_defects_that_vanish_when_masks_are_resized_are_counted(make, tmp_path, capsys):
    base = make.mvtec(tmp_path, "part", defects=3) / "part"
    for number in range(3):
        make.image(base / f"test/broken/{number:03d}.png", size=(1000, 1000), seed=number)
        mask = np.zeros((1000, 1000), np.uint8)
        side = 6 if number else 100
        mask[103 : 103 + side, 203 : 203 + side] = 255
        cv2.imwrite(str(base / f"ground_truth/broken/{number:03d}_mask.png"), mask)
    (found,) = [problem for problem in check("folder", tmp_path).problems if problem.kind == "defects too small"]
    assert found.message == "of 3 masks of defects vanish 2 at 64 x 64 pixels; mask_resize=area keeps them"
    assert len(found.files) == 2
    assert main(["check", "--dataset", "folder", "--data-root", str(tmp_path), "--image-size", "32"]) == 0
    assert "2 at 32 x 32 pixels" in capsys.readouterr().out


def test_a_test_image_that_is_a_training_image_encoded_anew_is_named(make, tmp_path):
    base = make.mvtec(tmp_path, "nut", train=6, normal=4) / "nut"
    smooth = [cv2.resize(np.random.default_rng(k).integers(0, 256, (6, 6, 3), np.uint8), (96, 96)) for k in range(10)]
    for k in range(6):
        cv2.imwrite(str(base / f"train/good/{k:03d}.png"), smooth[k])
    for k in range(4):
        cv2.imwrite(str(base / f"test/good/{k:03d}.png"), smooth[6 + k])
    assert ("warning", "test image near training") not in kinds(check("folder", tmp_path))
    (base / "test/good/000.png").unlink()
    cv2.imwrite(str(base / "test/good/000.jpg"), cv2.resize(smooth[3], (80, 80)), [cv2.IMWRITE_JPEG_QUALITY, 70])
    (found,) = [p for p in check("folder", tmp_path).problems if p.kind == "test image near training"]
    assert found.files == (str(base / "test/good/000.jpg"), str(base / "train/good/003.png"))


def test_frames_and_orientation_are_remarked_on(make, tmp_path):
    base = make.mvtec(tmp_path, "nut") / "nut"
    pages = [Image.new("RGB", (48, 40), (k, k, k)) for k in (40, 50)]
    pages[0].save(base / "train/good/pages.tif", save_all=True, append_images=pages[1:])
    exif = Image.Exif()
    exif[0x0112] = 3
    (base / "test/broken/000.png").unlink()
    pages[0].save(base / "test/broken/000.jpg", exif=exif)
    assert {("warning", "several frames image"), ("warning", "turned image")} <= kinds(check("folder", tmp_path))


@pytest.mark.parametrize("limit", [[], pytest.param(["--max-megapixels", "500"], marks=pytest.mark.program)])
def test_the_limit_of_size_is_one_sentence_and_an_option(make, tmp_path, capsys, limit):
    base = make.mvtec(tmp_path, "nut") / "nut"
    Image.new("1", (20_000, 10_000)).save(base / "train/good/large.png")
    code = main(["check", "--dataset", "folder", "--data-root", str(tmp_path), *limit])
    assert code == (0 if limit else 1)
    assert ("max_megapixels=179 allows" in capsys.readouterr().out) == (not limit)


def test_names_that_are_not_utf8_are_an_error_that_can_be_printed(make, tmp_path, capsys):
    base = make.mvtec(tmp_path, "nut") / "nut"
    os.rename(base / "train/good/000.png", os.fsencode(base / "train/good") + b"/caf\xe9.png")
    assert main(["check", "--dataset", "folder", "--data-root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 name not in UTF-8" in out
    assert "caf\\udce9.png" in out
    with pytest.raises(DataError, match="1 name not in UTF-8"):
        raise_on_errors(list_dataset("folder", tmp_path))


@pytest.mark.parametrize(
    ("folder", "hint"),
    [
        ("Test", "if it is meant as test, rename it"),
        ("masks", "if it is meant as ground_truth, rename it"),
        ("Ground Truth", "if it is meant as ground_truth, rename it"),
        ("training", "if it is meant as train, rename it"),
        ("notes", "left out"),
    ],
)
def test_folders_beside_the_expected_names_are_told_with_what_they_may_be(make, tmp_path, folder, hint):
    base = make.mvtec(tmp_path, "nut") / "nut"
    make.image(base / folder / "good" / "000.png")
    (found,) = [problem for problem in check("folder", tmp_path).problems if problem.kind == "not read"]
    assert f"{folder}/ left out" in found.message
    assert hint in found.message


def test_images_beside_the_folders_of_a_part_are_told(make, tmp_path):
    base = make.mvtec(tmp_path, "nut") / "nut"
    make.image(base / "test" / "000.png")
    make.image(base / "train" / "000.png")
    found = [problem for problem in check("folder", tmp_path).problems if problem.kind == "not read"]
    assert {problem.message.split(" itself")[0] for problem in found} == {"1 image in test/", "1 image in train/"}


def test_a_category_whose_train_folder_is_misspelt_is_explained(make, tmp_path, capsys):
    base = make.mvtec(tmp_path, "nut") / "nut"
    (base / "train").rename(base / "Train")
    assert main(["check", "--dataset", "folder", "--data-root", str(tmp_path)]) == 2
    assert f"{base / 'Train'} has to be called train" in capsys.readouterr().err


def test_environment_names_the_data_to_check(make, tmp_path, capsys, monkeypatch):
    for name in ("spring", "autumn"):
        make.mvtec(tmp_path / name, "nut")
    monkeypatch.setenv("DATASET", "folder, folder")
    monkeypatch.setenv("DATA_ROOT", f"{tmp_path / 'spring'},{tmp_path / 'autumn'}")
    monkeypatch.delenv("CATEGORIES", raising=False)
    assert main(["check", "--image-size", "32"]) == 0
    assert capsys.readouterr().out.count("0 errors") == 2
    monkeypatch.delenv("DATASET")
    assert main(["check"]) == 2
    assert "DATASET names 0 dataset" in capsys.readouterr().err
