"""Regions and pictures of a prediction lie where the defect lies on the photograph, whatever the file is like."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datamodules.images import centre, read_image, resize_image
from lightning_modules.prediction import drawing, place
from lightning_modules.prediction.geometry import seen_part, to_photograph
from lightning_modules.prediction.page import Shown, page
from lightning_modules.prediction.regions import annotation, find_regions

LEFT, TOP, WIDTH, HEIGHT = BOX = 150, 60, 30, 40
SIZE = 240, 320  # of the photograph as it is shown


def photograph(rows: int = SIZE[0], columns: int = SIZE[1]) -> np.ndarray:
    """Dark, with a bright defect at `BOX`."""
    grey = np.full((rows, columns), 40, np.uint8)
    grey[TOP : TOP + HEIGHT, LEFT : LEFT + WIDTH] = 220
    return grey


def rotated(grey: np.ndarray) -> Image.Image:
    """A picture that EXIF turns into `grey` by a quarter to the right (orientation 6)."""
    image = Image.fromarray(np.ascontiguousarray(np.rot90(grey)))
    exif = image.getexif()
    exif[274] = 6
    image.info["exif"] = exif.tobytes()
    return image


def write(folder, kind):
    file, grey = folder / ("exif.jpg" if kind == "exif" else f"{kind}.png"), photograph()
    if kind == "16-bit":
        cv2.imwrite(str(file), grey.astype(np.uint16) * 257)
    elif kind == "exif":
        image = rotated(grey)
        image.save(file, exif=image.info["exif"], quality=98)
    elif kind == "colour":
        Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(file)
    else:
        Image.fromarray(grey).save(file)
    return file


@pytest.mark.parametrize("crop", [None, ((80, 80), (64, 64))])
@pytest.mark.parametrize("kind", ["grey", "colour", "16-bit", "exif"])
def test_a_known_defect_is_found_in_pixels_of_the_photograph(tmp_path, kind, crop):
    """The map is what the network gets of the image itself, as the data module prepares it."""
    image = read_image(write(tmp_path, kind))
    assert image.shape == (*SIZE, 3)
    whole, kept = crop or ((64, 64), (64, 64))
    seen = centre(resize_image(image, whole, "pil_bilinear"), kept)[..., 0].astype(np.float32)
    (region,) = find_regions(to_photograph(seen, SIZE, crop), 130)
    pixel = max(SIZE[0] / whole[0], SIZE[1] / whole[1])  # one of the map, on the photograph
    assert np.abs(np.subtract(region.box, BOX)).max() <= pixel
    assert region.area == pytest.approx(WIDTH * HEIGHT, rel=2 * pixel * (WIDTH + HEIGHT) / (WIDTH * HEIGHT))
    assert region.peak > 200


def test_what_a_centre_crop_cuts_off_is_no_region():
    size, crop = (200, 400), ((100, 100), (80, 80))
    assert seen_part(size, crop) == (20, 40, 160, 320)
    whole = to_photograph(np.ones((80, 80), np.float32), size, crop, unseen=0)
    assert find_regions(whole, 0.5)[0].box == (40, 20, 320, 160)


def decoded(counts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """COCO's rule: column by column, alternately outside and inside."""
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(size[1], size[0]).T.astype(bool)


def test_run_lengths_give_the_region_back_with_holes_edges_and_touching_columns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = cv2.resize(rng.random((5, 7), np.float32), (31, 23))
        regions = find_regions(values, 0.5)
        together = np.zeros(values.shape, bool)
        for region in regions:
            assert min(region.runs[1:]) > 0
            mask = decoded(region.runs, values.shape)
            assert mask.sum() == region.area
            assert values[mask].max() == np.float32(region.peak)
            left, top, width, height = region.box
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (left, top, width, height)
            together |= mask
        np.testing.assert_array_equal(together, values > 0.5)
    full = find_regions(np.ones((4, 3), np.float32), 0)[0]
    assert full.runs.tolist() == [0, 12]


def test_an_annotation_is_what_cocos_own_reader_takes():
    mask = pytest.importorskip("pycocotools.mask")
    values = cv2.resize(np.random.default_rng(1).random((6, 6), np.float32), (40, 30))
    for region in find_regions(values, 0.6):
        found = annotation(region, values.shape, id=1, image_id=0, category_id=1)
        code = mask.frPyObjects(found["segmentation"], *values.shape)
        assert mask.area(code) == found["area"]
        assert mask.toBbox(code).tolist() == found["bbox"]


def test_a_picture_shows_photograph_map_and_outline_at_the_photographs_own_size():
    photo = np.repeat(photograph()[..., None], 3, 2)
    values = photograph().astype(np.float32)
    pictures = drawing.panels(photo, values, values > 130, (40, 220))
    assert all(picture.shape == (*SIZE, 3) for picture in pictures)
    np.testing.assert_array_equal(pictures[0], photo)
    changed = np.nonzero((pictures[2] != photo).any(2))
    assert changed[0].min() < TOP < TOP + HEIGHT < changed[0].max() + 1
    assert changed[1].min() < LEFT < LEFT + WIDTH < changed[1].max() + 1
    np.testing.assert_array_equal(
        pictures[2][TOP + 5 : TOP + 35, LEFT + 5 : LEFT + 25], 220
    )  # the defect stays visible
    sheet = np.asarray(drawing.sheet(pictures, "defect", "defect", [(0, "40"), (1, "220")]))
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(sheet[: SIZE[0], number * SIZE[1] : (number + 1) * SIZE[1]], picture)
    tiny = np.zeros(SIZE, bool)
    tiny[3, 3] = True
    assert (drawing.small_panels(photo, values, tiny, (0, 1), longest=32)[2] == drawing.LINE).all(2).any()


def test_a_map_at_the_low_end_of_the_scale_is_dark_and_at_the_high_end_bright():
    values = np.array([[0.0, 1.0, 2.0, 9.0]], np.float32)
    shown = drawing.colours(values, 1, 2).astype(int).sum(-1)[0]
    assert shown[0] == shown[1] < 20
    assert shown[2] == shown[3] > 500


def test_the_page_escapes_names_and_lists_what_has_no_room(tmp_path, monkeypatch):
    picture = tmp_path / "a.jpg"
    drawing.write(np.zeros((8, 8, 3), np.uint8), picture)
    monkeypatch.setattr("lightning_modules.prediction.page.BUDGET", 2 * picture.stat().st_size)
    facts = {"score": "1"}
    shown = [
        Shown(f"<script>{n}\x1b.jpg", "defect", facts, [(1, 2, 3, 4, 12, 9.0)], [picture], ("0", "1")) for n in range(3)
    ]
    text = page("<b>t</b>", ["a & b"], shown, "/there")
    assert "<script>" not in text
    assert "\x1b" not in text
    assert text.count("data:image/jpeg") == 2
    assert "a &amp; b" in text
    assert "1, 2" in text
    assert "in /there" in text


def test_no_prediction_takes_the_place_of_another(tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    mine, other = place.Source.of(run, [images]), place.Source.of(run, [tmp_path / "others"])
    default = tmp_path / "work" / "predictions"

    def written(folder, source):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / place.COCO).write_text(json.dumps({"info": source.as_info()}))
        return folder

    assert place.choose(default, None, mine) == written(default, mine)
    assert place.choose(default, None, mine) == default, "the same images again"
    second = place.choose(default, None, other)
    assert second.name == "predictions-2"
    written(second, other)
    assert place.choose(default, None, other) == second
    with pytest.raises(place.PlaceError, match=r"holds a prediction of .*images with .*run"):
        place.choose(default, default, other)
    with pytest.raises(place.PlaceError, match="would be predicted next time"):
        place.choose(default, images / "out", mine)
    old = tmp_path / "old"
    old.mkdir()
    pd.DataFrame({"image": []}).to_csv(old / place.TABLE)  # of an earlier version
    with pytest.raises(place.PlaceError, match="delete this one"):
        place.choose(default, old, mine)
