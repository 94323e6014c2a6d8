"""What pixels a file becomes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.images import (
    infer_bit_depth,
    read_header,
    read_image,
    read_mask,
    read_pair,
    resize_image,
    resize_mask,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "jpg"])
def test_colours_equal_what_pil_reads(tmp_path, suffix):
    path = saved(Image.fromarray(RGB), tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_grey_alpha_and_palette_follow_the_written_rules(tmp_path):
    grey = saved(Image.fromarray(RGB[..., 0]), tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(grey), np.repeat(RGB[..., :1], 3, axis=2))
    alpha = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(alpha), tmp_path / "alpha.png")), RGB)
    palette = Image.fromarray(RGB).quantize(16)
    path = saved(palette, tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(path), np.asarray(palette.convert("RGB")))


def test_sixteen_bit_images_are_scaled_by_their_depth(tmp_path):
    path = tmp_path / "deep.png"
    values = np.array([[0, 1, 2047, 4095]], np.uint16)
    cv2.imwrite(str(path), values)
    np.testing.assert_array_equal(read_image(path, 12)[0, :, 0], [0, 0, 127, 255])
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 0, 8, 16])
    assert infer_bit_depth([str(path)]) == 12
    with pytest.raises(DataError, match="value 4095 does not fit into 10 bits"):
        read_image(path, 10)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None] * 6, 20, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(saved(image, tmp_path / "turned.jpg", exif=exif)).shape == (40, 20, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_cut_off_and_empty_files_are_errors_with_their_name(tmp_path, suffix):
    path = saved(Image.fromarray(np.tile(RGB, (4, 4, 1))), tmp_path / f"half.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"half.{suffix}: the file is truncated"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_image(path)
    path.write_bytes(b"this is text")
    with pytest.raises(DataError, match="not a readable image"):
        read_image(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "absent.png")


def test_floating_point_images_are_refused(tmp_path):
    path = tmp_path / "f.tiff"
    cv2.imwrite(str(path), RGB.astype(np.float32) / 255)
    with pytest.raises(DataError, match="float32"):
        read_image(path)


@pytest.mark.parametrize("value", [1, 128, 236, 255])
def test_any_stored_value_above_zero_is_defective(make, tmp_path, value):
    assert read_mask([make.mask(tmp_path / "m.png", value)]).sum() == 35


def test_masks_with_palette_colour_and_jpeg_noise(tmp_path):
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:30] = 1
    indexed = Image.fromarray(truth)
    indexed.putpalette([255, 255, 255, 0, 0, 0])  # background white, defect black: the index counts, not the colour
    np.testing.assert_array_equal(read_mask([saved(indexed, tmp_path / "p.png")]), truth > 0)
    colour = np.zeros((40, 40, 4), np.uint8)
    colour[..., 3] = 255
    colour[truth > 0, 1] = 7
    np.testing.assert_array_equal(read_mask([saved(Image.fromarray(colour), tmp_path / "c.png")]), truth > 0)
    lossy = saved(Image.fromarray(truth * 255), tmp_path / "m.jpg", quality=60)
    np.testing.assert_array_equal(read_mask([lossy]), truth > 0)


def test_mask_of_another_size_names_both_files(make, tmp_path):
    image, mask = make.image(tmp_path / "i.png"), make.mask(tmp_path / "m.png", size=(20, 25))
    with pytest.raises(DataError, match=r"m\.png: mask is 25 x 20.*i\.png is 48 x 40"):
        read_pair(str(image), (str(mask),))


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("pil_bilinear", lambda x: np.asarray(Image.fromarray(x).resize((31, 17), Image.BILINEAR))),
        ("pil_lanczos", lambda x: np.asarray(Image.fromarray(x).resize((31, 17), Image.LANCZOS))),
        ("pil_nearest", lambda x: np.asarray(Image.fromarray(x).resize((31, 17), Image.NEAREST))),
        ("opencv_bilinear", lambda x: cv2.resize(x, (31, 17))),
    ],
)
def test_each_resize_is_the_library_call_that_its_paper_used(name, oracle):
    np.testing.assert_array_equal(resize_image(RGB, (17, 31), name), oracle(RGB))


def test_antialiased_and_plain_resize_differ():
    stripes = np.tile(np.array([0, 0, 0, 255], np.uint8)[None, :, None], (64, 16, 3))
    plain, smooth = (resize_image(stripes, (16, 16), name) for name in ("opencv_bilinear", "pil_bilinear"))
    assert smooth.std() < 20
    assert abs(int(plain.mean()) - 64) > 20


@pytest.mark.parametrize("size", [(7, 9), (64, 33), (37, 53), (80, 100)])
def test_masks_are_resized_like_pil_nearest(size):
    mask = RNG.random((37, 53)) > 0.5
    oracle = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size[::-1], Image.NEAREST)) > 0
    resized = resize_mask(mask, size)
    assert resized.dtype == bool
    np.testing.assert_array_equal(resized, oracle)


def test_headers_tell_modes_without_decoding(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((4, 5), np.uint16))
    Image.fromarray(RGB).quantize(4).save(tmp_path / "p.png")
    Image.fromarray(np.dstack([RGB, RGB[..., 0]])).save(tmp_path / "a.png")
    Image.fromarray(RGB).save(tmp_path / "c.jpg")
    cv2.imwrite(str(tmp_path / "deep.tiff"), np.zeros((4, 5), np.uint16))
    modes = [read_header(tmp_path / name).mode for name in ("deep.png", "p.png", "a.png", "c.jpg", "deep.tiff")]
    assert modes == ["16-bit", "palette", "RGB with alpha", "8-bit RGB", "16-bit"]
    assert (read_header(tmp_path / "deep.png").width, read_header(tmp_path / "deep.png").height) == (5, 4)
