"""What pixels a file becomes."""

from __future__ import annotations

import io
import os

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

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


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (RGB.astype(np.float32) / 255, "float32, here from 0 to 1"),
        (RGB[..., 0].astype(np.float32) * 16, "float32, here from 0 to"),
        (RGB.astype(np.float64), "float64"),
        (RGB[..., 0].astype(np.int32) * 1000, "int32, here from 0 to 255000"),
        (RGB[..., 0].astype(np.int16), "int16"),
        (np.full((4, 4), np.nan, np.float32), "float32"),
    ],
)
def test_pixels_of_a_type_that_is_no_images_are_refused_with_the_way_out(tmp_path, values, named):
    path = tmp_path / "f.tiff"
    cv2.imwrite(str(path), values, (cv2.IMWRITE_TIFF_COMPRESSION, 1))  # none: older OpenCVs' own for colour is lossy
    with pytest.raises(
        DataError, match=rf"f\.tiff: pixels are {named}.*\[0, 1\] times 255.*counts to uint16.*bit_depth"
    ):
        read_image(path)
    assert not read_header(path).readable


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_alpha_never_decides_the_depth(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    colours = RNG.integers(0, 4096, (9, 7, 3), dtype=np.uint16)
    colours[0, 0] = 4095
    assert cv2.imwrite(str(path), np.dstack([colours, np.full((9, 7), 65535, np.uint16)]))
    assert infer_bit_depth([str(path)]) == 12
    np.testing.assert_array_equal(read_image(path, 12), np.rint(colours[..., ::-1] * (255 / 4095)).astype(np.uint8))


def test_deep_jpeg2000_keeps_its_depth(tmp_path):
    values = np.full((32, 32, 3), 3000, np.uint16)
    assert cv2.imwrite(str(tmp_path / "deep.jp2"), values)
    assert read_header(tmp_path / "deep.jp2").mode == "16-bit"
    assert abs(int(read_image(tmp_path / "deep.jp2", 12).max()) - round(3000 * 255 / 4095)) <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_alpha_is_dropped_from_every_format_and_colours_stay(tmp_path, suffix):
    alpha = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(alpha), tmp_path / f"a.{suffix}", **options)), RGB)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bytes_after_the_end_of_an_image_are_no_damage(tmp_path, suffix):
    """A telephone's Motion Photo is a JPEG with a film behind it."""
    path = saved(Image.fromarray(RGB), tmp_path / f"motion.{suffix}")
    expected = read_image(path)
    with open(path, "ab") as file:
        file.write(bytes(200_000))
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_jpeg_cut_off_behind_its_preview_is_noticed(tmp_path):
    preview = io.BytesIO()
    Image.fromarray(RGB).save(preview, "jpeg")
    data = saved(Image.fromarray(RGB.repeat(4, 0)), tmp_path / "a.jpg").read_bytes()
    comment = b"\xff\xfe" + (len(preview.getvalue()) + 2).to_bytes(2, "big") + preview.getvalue()  # its end marker too
    (tmp_path / "a.jpg").write_bytes((data[:2] + comment + data[2:])[: -len(data) // 3])
    with pytest.raises(DataError, match="truncated"):
        read_image(tmp_path / "a.jpg")


def test_one_limit_of_size_for_images_masks_and_depths(tmp_path):
    path = saved(Image.new("1", (20_000, 10_000)), tmp_path / "large.png")
    for read in (read_image, lambda path: read_mask([path]), lambda path: infer_bit_depth([path])):
        with pytest.raises(
            DataError, match=r"large\.png: 20000 x 10000 pixels are more than max_megapixels=179 allows"
        ):
            read(path)
    assert read_header(path).width == 20_000
    with pytest.raises(DataError, match=r"max_megapixels=0\.001"):
        read_image(saved(Image.fromarray(RGB), tmp_path / "a.png"), max_megapixels=0.001)


@pytest.mark.program
def test_the_limit_of_size_may_be_raised(tmp_path):
    path = saved(Image.new("1", (20_000, 10_000)), tmp_path / "large.png")
    assert read_mask([path], max_megapixels=200).shape == (10_000, 20_000)


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("cmyk.jpg", Image.fromarray(RGB).convert("CMYK"), {}),
        ("one.png", Image.fromarray(RGB[..., 0]).convert("1"), {}),
        ("UPPER.PNG", Image.fromarray(RGB), {}),
        ("a.gif", Image.fromarray(RGB).quantize(64), {}),
        ("a.jfif", Image.fromarray(RGB), {"format": "JPEG"}),
        ("a.jp2", Image.fromarray(RGB), {}),
        ("a.ppm", Image.fromarray(RGB), {}),
        ("profile.png", Image.fromarray(RGB), {"icc_profile": b"of another screen"}),
        ("transparent.png", Image.fromarray(RGB).quantize(16), {"transparency": 3}),
        ("grey.tif", Image.fromarray(RGB[..., 0]), {"compression": "tiff_lzw"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_usual_kind_of_file_gives_the_colours_that_it_shows(tmp_path, name, image, options):
    path = saved(image, tmp_path / name, **options)
    expected = Image.open(path)
    expected.info.pop("transparency", None)
    np.testing.assert_array_equal(read_image(path), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(("name", "options"), [("pages.tiff", {}), ("moves.png", {}), ("moves.gif", {})])
def test_of_several_frames_the_first_counts_and_the_header_says_so(tmp_path, name, options):
    first, second = Image.new("L", (8, 6), 40), Image.new("L", (8, 6), 90)
    path = saved(first, tmp_path / name, save_all=True, append_images=[second], **options)
    assert (read_image(path) == 40).all()
    assert read_header(path).frames == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "deep.png"])
def test_orientation_turns_images_and_masks_alike(tmp_path, orientation, name):
    corner = np.zeros((16, 32), np.uint16 if "deep" in name else np.uint8)
    corner[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(corner), tmp_path / name, exif=exif)
    upright = Image.fromarray(corner.astype(np.uint8))
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright)) > 127
    np.testing.assert_array_equal(read_image(path, 8)[..., 0] > 127, expected)
    np.testing.assert_array_equal(read_mask([path], 127), expected)


def test_what_is_no_file_is_named_and_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    for name, why in (("pipe", "a pipe"), ("folder", "a folder"), ("dead", "link to nothing")):
        with pytest.raises(DataError, match=rf"{name}\.png: .*{why}"):
            read_image(tmp_path / f"{name}.png")


@pytest.mark.parametrize("value", [1, 128, 236, 255])
def test_any_stored_value_above_zero_is_defective(make, tmp_path, value):
    assert read_mask([make.mask(tmp_path / "m.png", value)]).sum() == 35


def test_masks_with_palette_colour_and_jpeg_noise(tmp_path):
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:30] = 1
    indexed = Image.fromarray(1 - truth)
    indexed.putpalette(
        [255, 255, 255, 0, 0, 0]
    )  # the defect has index 0 and is white: the colour counts, not the index
    np.testing.assert_array_equal(read_mask([saved(indexed, tmp_path / "p.png")]), truth > 0)
    colour = np.zeros((40, 40, 4), np.uint8)
    colour[..., 3] = 255
    colour[truth > 0, 1] = 7
    np.testing.assert_array_equal(read_mask([saved(Image.fromarray(colour), tmp_path / "c.png")]), truth > 0)
    lossy = saved(Image.fromarray(truth * 255), tmp_path / "m.jpg", quality=60)
    np.testing.assert_array_equal(read_mask([lossy]), truth > 0)


TRUTH = np.zeros((40, 40), bool)
TRUTH[10:20, 10:30] = True
LOSSY = [
    ("m.jpg", {"quality": 60}),
    ("m.webp", {"quality": 60}),
    ("m.jp2", {"quality_mode": "rates", "quality_layers": [4], "irreversible": True}),
    ("m.tif", {"compression": "jpeg", "quality": 60}),
    ("m.avif", {"quality": 50}),
]
LOSSLESS = [("m.png", {}), ("m.bmp", {}), ("m.tif", {"compression": "tiff_lzw"}), ("m.webp", {"lossless": True})]


@pytest.mark.parametrize(("name", "options"), LOSSY)
def test_what_rings_around_a_defect_in_a_lossy_mask_is_not_marked(tmp_path, name, options):
    path = saved(Image.fromarray(TRUTH.astype(np.uint8) * 255), tmp_path / name, **options)
    stored = np.asarray(Image.open(path).convert("L"))
    assert name == "m.avif" or ((stored > 0) != TRUTH).any(), "this file would not show the fault"
    np.testing.assert_array_equal(read_mask([path]), TRUTH)


@pytest.mark.parametrize(("name", "options"), LOSSLESS)
def test_ones_in_a_lossless_mask_are_marked(tmp_path, name, options):
    path = saved(Image.fromarray(TRUTH.astype(np.uint8)), tmp_path / name, **options)
    np.testing.assert_array_equal(read_mask([path]), TRUTH)


def test_masks_of_wide_integers_and_floats_are_read_and_nan_is_refused(tmp_path):
    for number, dtype in enumerate((np.uint16, np.int32, np.float32)):
        cv2.imwrite(str(tmp_path / f"{number}.tif"), TRUTH.astype(dtype))
        np.testing.assert_array_equal(read_mask([tmp_path / f"{number}.tif"]), TRUTH)
    cv2.imwrite(str(tmp_path / "nan.tif"), np.where(TRUTH, np.nan, 0).astype(np.float32))
    with pytest.raises(DataError, match=r"nan\.tif: the mask holds NaN"):
        read_mask([tmp_path / "nan.tif"])


def test_a_mask_of_the_image_before_its_orientation_is_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved(Image.new("RGB", (40, 20)), tmp_path / "i.jpg", exif=exif)
    mask = saved(Image.new("L", (40, 20)), tmp_path / "m.png")
    with pytest.raises(DataError, match=r"m\.png: mask is 40 x 20.*EXIF orientation turns"):
        read_pair(str(image), (str(mask),))


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


def test_area_resize_keeps_every_defect_at_its_size():
    mask = np.zeros((1000, 1000), bool)
    mask[103:109, 203:209] = True  # 6 x 6 pixels: less than one pixel of 64 x 64
    mask[400:700, 400:700] = True
    assert not resize_mask(mask, (64, 64))[:10].any()
    resized = resize_mask(mask, (64, 64), "area")
    assert resized[:10].sum() == 1
    assert resized[6, 13]
    assert resized[20:].sum() == round(300 * 300 / 15.625**2)
    np.testing.assert_array_equal(resize_mask(mask, (1000, 1000), "area"), mask)
    assert not resize_mask(np.zeros((50, 50), bool), (8, 8), "area").any()


def test_headers_tell_modes_without_decoding(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((4, 5), np.uint16))
    Image.fromarray(RGB).quantize(4).save(tmp_path / "p.png")
    Image.fromarray(np.dstack([RGB, RGB[..., 0]])).save(tmp_path / "a.png")
    Image.fromarray(RGB).save(tmp_path / "c.jpg")
    cv2.imwrite(str(tmp_path / "deep.tiff"), np.zeros((4, 5), np.uint16))
    modes = [read_header(tmp_path / name).mode for name in ("deep.png", "p.png", "a.png", "c.jpg", "deep.tiff")]
    assert modes == ["16-bit", "palette", "RGB with alpha", "8-bit RGB", "16-bit"]
    assert (read_header(tmp_path / "deep.png").width, read_header(tmp_path / "deep.png").height) == (5, 4)
