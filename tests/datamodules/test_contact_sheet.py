"""Contact sheets show what masks mark, and what the check remarks on comes first."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from datamodules.__main__ import main
from datamodules.check import check
from datamodules.contact_sheet import TILE, write_sheets
from datamodules.errors import DataError
from datamodules.outline import YELLOW, outlined

RED = (200, 30, 30)


def count(picture, colour, distance=20):
    """Pixels of a JPEG that are near a colour."""
    return int((np.abs(np.asarray(picture).astype(int) - colour).max(axis=-1) < distance).sum())


def test_the_outline_lies_around_the_mask_and_leaves_what_it_marks():
    image = np.random.default_rng(0).integers(0, 200, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 20:30] = True
    picture = outlined(image, mask)
    assert (picture[mask] == image[mask]).all()
    assert (picture[8, 20:30] == YELLOW).all()
    assert (picture[21, 20:30] == YELLOW).all()
    assert (picture[:6] == image[:6]).all()
    assert (outlined(image, np.zeros_like(mask)) == image).all()


def test_a_defect_smaller_than_a_pixel_of_the_picture_is_still_outlined():
    mask = np.zeros((2000, 2000), bool)
    mask[1003, 977] = True
    picture = outlined(np.full((100, 100, 3), 90, np.uint8), mask)
    rows, columns = np.nonzero((picture == YELLOW).all(axis=-1))
    assert (rows.mean(), columns.mean()) == pytest.approx((50, 48), abs=1)


def test_every_kind_has_a_row_and_suspects_come_first_in_red(make, tmp_path, capsys):
    root = make.mvtec(tmp_path / "data", "nut & bolt", train=5, defects=9)
    for number in range(9):
        make.image(root / "nut & bolt" / "test" / "broken" / f"{number:03d}.png", 100 + number)
    make.mask(root / "nut & bolt" / "ground_truth" / "broken" / "007_mask.png", rows=slice(0, 0))
    make.mvtec(tmp_path / "data", "pin", train=2)
    out = tmp_path / "sheets"
    call = ["check", "--dataset", "folder", "--data-root", str(root), "--out", str(out), "--per-kind", "4"]
    assert main(call) == 0
    assert str(out / "index.html") in capsys.readouterr().out.replace("\n", "")
    sheet = Image.open(out / "folder-nut & bolt.jpg")
    defects = sheet.crop((0, sheet.height * 2 // 3, sheet.width, sheet.height))
    assert count(defects, YELLOW, 60) > 3 * 15, "three of four defects have a mask that marks something"
    assert count(sheet, RED) > 3 * TILE
    assert count(Image.open(out / "folder-pin.jpg"), RED) < TILE
    page = (out / "index.html").read_text()
    assert "nut &amp; bolt" in page
    assert "empty mask" in page
    assert re.findall(r'img src="([^"]+)"', page) == ["folder-nut%20%26%20bolt.jpg", "folder-pin.jpg"]


def test_the_choice_is_seeded_and_only_the_chosen_are_opened(make, tmp_path):
    root = make.mvtec(tmp_path / "data", "nut", train=30, normal=1, defects=1)
    report = check("folder", root)
    first, again, other = (
        write_sheets([report], tmp_path / name, 3, seed).with_name("folder-nut.jpg").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_files_that_cannot_be_read_are_shown_as_such(make, tmp_path):
    root = make.mvtec(tmp_path / "data", "nut")
    (root / "nut/test/broken/000.png").write_bytes(b"no image")
    make.mask(root / "nut/ground_truth/broken/001_mask.png", size=(30, 30))
    page = write_sheets([check("folder", root)], tmp_path / "out")
    assert count(Image.open(page.with_name("folder-nut.jpg")), RED) > 6 * TILE
    assert "size mismatch" in page.read_text()


def test_a_name_that_is_not_utf8_is_spelled_out(make, tmp_path):
    root = make.mvtec(tmp_path / "data", "nut")
    os.rename(root / "nut", os.path.join(os.fsencode(root), b"caf\xe9"))
    page = write_sheets([check("folder", root)], tmp_path / "out")
    assert "caf\\udce9" in page.read_text()
    assert len(list(page.parent.glob("*.jpg"))) == 1


def test_a_folder_that_cannot_be_written_is_named(make, tmp_path):
    root = make.mvtec(tmp_path / "data", "nut")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written into"):
        write_sheets([check("folder", root)], tmp_path / "file")
    with pytest.raises(DataError, match="at least one"):
        write_sheets([check("folder", root)], tmp_path / "out", 0)
