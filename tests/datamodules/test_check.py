"""`check-data` finds what is wrong before training does."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.__main__ import main
from datamodules.check import check
from datamodules.problems import number_of


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
