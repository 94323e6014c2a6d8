"""Image and mask files -> arrays, by rules that are written down here and nowhere else.

Images become 8-bit RGB: grey is repeated to three channels, a palette is resolved to its colours, alpha is dropped
(the stored colour stays, nothing is blended), EXIF orientation is applied, colour profiles are not, of several frames
the first is taken, and 16-bit values are scaled by the bit depth that is declared or was inferred for the dataset.

Masks become boolean at native resolution by one rule: of the same colours as an image's, the greatest channel counts,
and a pixel is defective if it is above the dataset's threshold (0 for all public datasets: VisA stores 1, MVTec LOCO
stores defect ids). Lossy formats (JPEG, JPEG 2000, AVIF, lossy WebP, TIFF with one of these inside) ring around edges,
so there values above half of the range count.

Pillow decodes, and refuses files that are cut off; OpenCV takes only 16-bit colour, which Pillow cannot hold.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from datamodules.errors import DataError
from results.common.did_you_mean import did_you_mean

BIT_DEPTHS = (8, 10, 12, 14, 16)
MAX_MEGAPIXELS = 179.0
"""A larger image is refused unless `max_megapixels` allows it: a small file can claim any size."""
MASK_RESIZES = ("nearest", "area")
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF", "PPM")
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_OTHER_SUFFIXES = (".webp", ".gif", ".jp2", ".j2k", ".jpx", ".avif", ".pbm", ".pgm", ".ppm", ".pnm")
IMAGE_SUFFIXES = (".png", *_JPEG_SUFFIXES, ".bmp", ".dib", ".tif", ".tiff", *_OTHER_SUFFIXES)
_PNG = b"\x89PNG\r\n\x1a\n"
_LOSSY_TIFF = (6, 7, 33003, 33005, 34712, 34892, 50001)
"""TIFF compressions: JPEG, JPEG 2000, WebP."""
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
_DAMAGED = "the file is truncated, damaged or of an unusual kind"
Image.MAX_IMAGE_PIXELS = None  # one limit, with one sentence, holds for every decoder: `max_megapixels`


def _pil(filter_: Image.Resampling) -> Callable[[np.ndarray, int, int], np.ndarray]:
    return lambda image, height, width: np.asarray(Image.fromarray(image).resize((width, height), filter_))


RESIZES: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "pil_bilinear": _pil(Image.Resampling.BILINEAR),
    "pil_lanczos": _pil(Image.Resampling.LANCZOS),
    "pil_nearest": _pil(Image.Resampling.NEAREST),
    "opencv_bilinear": lambda image, height, width: cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR),
}
"""Names of image resizes. PIL's bilinear and Lanczos are antialiased, OpenCV's bilinear is not."""


def check_resize(name: str | None) -> str:
    """The name if it is a known resize, else DataError."""
    if name not in RESIZES:
        raise DataError(f"Unknown resize {name!r}. {did_you_mean(str(name), RESIZES)}")
    return name


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded."""

    mode: str
    """8-bit grey, 8-bit RGB, palette, grey or RGB with alpha, 16-bit, other: <PIL mode>; or the type of pixels that are
    no image's: float32, int32 ..."""
    width: int
    height: int
    lossy: bool = False
    frames: int = 1
    turned: bool = False
    """By EXIF orientation; width and height are those before."""

    @property
    def readable(self) -> bool:
        """Whether an image may have pixels of this type."""
        return not self.mode.startswith(("float", "int", "uint"))


_PNG_MODES = {0: "8-bit grey", 2: "8-bit RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_PIL_MODES = {
    "1": "8-bit grey",
    "L": "8-bit grey",
    "RGB": "8-bit RGB",
    "RGBX": "8-bit RGB",
    "P": "palette",
    "PA": "palette",
    "LA": "grey with alpha",
    "RGBA": "RGB with alpha",
    "I": "16-bit",
    "I;16": "16-bit",
    "I;16B": "16-bit",
}
REMARKABLE = {
    "palette": "palette colours are resolved to RGB",
    "grey with alpha": "alpha is dropped",
    "RGB with alpha": "alpha is dropped",
    "16-bit": "values are scaled to 8 bits",
}
"""Modes that users are told about, and the rule that applies to them."""


def _bytes(path: str | Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: not a file but a folder, a pipe or a device.")
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        why = "it is a link to nothing" if os.path.islink(path) else error.strerror or error
        raise DataError(f"{path}: cannot be read: {why}.") from error
    if not data:
        raise DataError(f"{path}: the file is empty.")
    return data


def _tiff_tags(data: bytes) -> ImageFileDirectory_v2:
    """Tags of a TIFF's first page, also where Pillow does not know the type of its pixels."""
    tags, file = ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8]), io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _lossy_webp(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[place : place + 8])
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        place += 24 if name == b"ANMF" else 8 + size + size % 2  # a frame's own chunks follow its 16 bytes
    return True


def _jpeg2000_bits(data: bytes) -> int:
    """Bits of the first component; they stand in byte 40 of the size marker, after the start of the code stream."""
    return (data[data.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1


def _open(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _header(data: bytes, path: str | Path) -> Header:
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            tags = _tiff_tags(data)
            kind = {1: "uint", 2: "int", 3: "float"}.get(tags.get(339, (1,))[0], "uint")
            bits = tags.get(258, (1,))
            size, lossy = (tags[256], tags[257]), tags.get(259) in _LOSSY_TIFF
            if kind != "uint" or max(bits) > 16:
                return Header(f"{kind}{max(bits)}", *size, lossy)
            if max(bits) > 8 and len(bits) > 1:
                return Header("16-bit", *size, lossy)
        with _open(data) as image:
            mode = _PIL_MODES.get(image.mode, f"other: {image.mode}")
            lossy = image.format in ("JPEG", "MPO", "JPEG2000", "AVIF")
            lossy |= image.format == "WEBP" and _lossy_webp(data)
            lossy |= isinstance(image, TiffImageFile) and image.tag_v2.get(259) in _LOSSY_TIFF
            if (data.startswith(_PNG) and data[24] == 16) or (image.format == "JPEG2000" and _jpeg2000_bits(data) > 8):
                mode = "16-bit"
            return Header(mode, *image.size, lossy)
    except _BROKEN as error:
        if data.startswith((_PNG, b"\xff\xd8", b"BM", b"II", b"MM", b"RIFF", b"GIF8", b"\0\0\0\x0cjP")):
            raise DataError(f"{path}: {_DAMAGED}: copy, download or export it again.") from error
        raise DataError(f"{path}: not a readable image (formats that can be read: {', '.join(FORMATS)}).") from error


def read_header(path: str | Path) -> Header:
    """What an image file says of itself; DataError if it is not an image."""
    data = _bytes(path)
    header = _header(data, path)
    with contextlib.suppress(*_BROKEN), _open(data) as image:  # Pillow does not know every type of pixels
        frames = (
            1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        )  # a telephone's second picture is a preview
        header = replace(header, frames=frames, turned=image.getexif().get(274, 1) > 1)
    return header


def shown_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image as `read_image` gives it, turned as EXIF says; only its head is decoded where that tells.

    Raises:
        DataError: it is not an image.
    """
    header = read_header(path)
    if not header.turned:
        return header.height, header.width
    data = _bytes(path)
    with contextlib.suppress(*_BROKEN), _open(data) as image:
        swapped = image.getexif().get(274, 1) in (5, 6, 7, 8)
        return (header.width, header.height) if swapped else (header.height, header.width)
    return decode(path)[0].shape[:2]


def odd_mode(path: str) -> str | None:
    """The mode of an image that users are told about, from as little of the file as possible; None for any other."""
    if path.lower().endswith((*_JPEG_SUFFIXES, ".bmp", ".dib")):
        return None
    if os.path.isfile(path):  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            head = file.read(26)
        if head.startswith(_PNG) and len(head) == 26:
            mode = "16-bit" if head[24] == 16 else _PNG_MODES.get(head[25])
            return mode if mode in REMARKABLE else None
    header = _header(_bytes(path), path)
    return header.mode if header.mode in REMARKABLE or not header.readable else None


def decode(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[np.ndarray, bool]:
    """Stored values of an image file, and whether it is lossy: every image and every mask passes here.

    Returns:
        (H, W) grey or (H, W, 3) RGB, without alpha and turned as EXIF says: uint8, uint16, or what else the file holds.

    Raises:
        DataError: no file, not an image, cut off, damaged, or larger than `max_megapixels` (millions of pixels).
    """
    data = _bytes(path)
    header = _header(data, path)
    if header.width * header.height > max_megapixels * 1e6:
        raise DataError(
            f"{path}: {header.width} x {header.height} pixels are more than max_megapixels={max_megapixels:g} allows; "
            "raise it if the image is meant to be that large."
        )
    try:
        if header.mode == "16-bit" or not header.readable:
            values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if values is None or (data.startswith(_PNG) and b"IEND" not in data):  # OpenCV fills in what is cut off
                raise OSError(f"{header.mode} pixels that OpenCV does not read")
            values = values if values.ndim == 2 else np.ascontiguousarray(values[..., 2::-1])
            return _turned(values, data), header.lossy
        with _open(data) as image:
            image.load()
            return _values(image), header.lossy
    except (*_BROKEN, cv2.error) as error:
        raise DataError(f"{path}: {_DAMAGED} ({error}): copy, download or export it again.") from error


def _values(image: Image.Image) -> np.ndarray:
    """Stored values of an open image, (H, W) or (H, W, 3), turned as EXIF says; the image may be changed."""
    with contextlib.suppress(*_BROKEN):  # a damaged orientation is none
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)
    if image.mode == "1" or image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    return np.asarray(image)


def read_image(path: str | Path, bit_depth: int | None = None, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """Read an image file.

    Args:
        path: file.
        bit_depth: significant bits of 16-bit files; None means all 16. Ignored for 8-bit files.
        max_megapixels: as in `decode`.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        DataError: as `decode`; pixels of a type that images do not have; or brighter than the bit depth allows.
    """
    return _rgb(decode(path, max_megapixels)[0], str(path), bit_depth)


def pil_pixels(image: Image.Image, name: str, bit_depth: int | None = None) -> np.ndarray:
    """Pixels of an opened image by the rules for files, uint8 (H, W, 3), RGB; `name` stands for it in errors.

    Raises:
        DataError: as `read_image`.
    """
    try:
        values = _values(ImageOps.exif_transpose(image))  # a copy
    except _BROKEN as error:
        raise DataError(f"{name}: {_DAMAGED} ({error}): copy, download or export it again.") from error
    if image.mode.startswith("I") and values.size and values.min() >= 0 and values.max() < 1 << 16:
        values = values.astype(np.uint16)  # Pillow holds 16 bits in 32
    return _rgb(values, name, bit_depth)


def _rgb(values: np.ndarray, name: str, bit_depth: int | None) -> np.ndarray:
    """Stored values as uint8 (H, W, 3)."""
    if values.dtype == np.uint16:
        top = (1 << (bit_depth or 16)) - 1
        if (brightest := int(values.max())) > top:
            raise DataError(
                f"{name}: value {brightest} does not fit into {bit_depth} bits (at most {top}). "
                f"Declare the depth of these images with bit_depth, one of {BIT_DEPTHS}."
            )
        values = np.rint(values * np.float32(255 / top)).astype(np.uint8)
    elif values.dtype != np.uint8:
        finite = values[np.isfinite(values)]
        found = f"from {finite.min():g} to {finite.max():g}" if finite.size else "none of them a number"
        raise DataError(
            f"{name}: pixels are {values.dtype}, here {found}; an image's are 8- or 16-bit unsigned "
            "integers. Convert it: values in [0, 1] times 255 to uint8 (or times 65535 to uint16); counts to uint16, "
            "with bit_depth declared."
        )
    return cv2.cvtColor(values, cv2.COLOR_GRAY2RGB) if values.ndim == 2 else values


def read_mask_values(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[np.ndarray, bool]:
    """Values of a mask file (H, W), the greatest of several colour channels; and whether the file is lossy."""
    values, lossy = decode(path, max_megapixels)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{path}: the mask holds NaN or infinity: write 0 where nothing is marked.")
    return values if values.ndim == 2 else values.max(axis=2), lossy


def read_mask(paths: Sequence[str | Path], threshold: int = 0, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """Union of mask files at native resolution.

    Args:
        paths: one or more files of equal size.
        threshold: values above it are defective.
        max_megapixels: as in `decode`.

    Returns:
        bool (H, W).
    """
    union: np.ndarray | None = None
    for path in paths:
        values, lossy = read_mask_values(path, max_megapixels)
        half = 127 if values.dtype == np.uint8 else 32767
        mask = values > (max(threshold, half) if lossy else threshold)
        if union is not None and union.shape != mask.shape:
            raise DataError(f"{path}: mask is {_size(mask)}, the image's other masks are {_size(union)} ({paths[0]}).")
        union = mask if union is None else union | mask
    if union is None:
        raise DataError("read_mask needs at least one file.")
    return union


def read_pair(
    image_path: str,
    mask_paths: Sequence[str],
    bit_depth: int | None = None,
    threshold: int = 0,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Image uint8 (H, W, 3) and its mask bool (H, W), None without files; their sizes must agree."""
    image = read_image(image_path, bit_depth, max_megapixels)
    if not mask_paths:
        return image, None
    mask = read_mask(mask_paths, threshold, max_megapixels)
    if mask.shape != image.shape[:2]:
        turned = mask.shape == image.shape[1::-1] and read_header(image_path).turned
        why = ", which its EXIF orientation turns" if turned else ""
        raise DataError(
            f"{mask_paths[0]}: mask is {_size(mask)}, its image {image_path} is {_size(image)}{why}. "
            "They must have equal size: export the mask again from the image as it is shown."
        )
    return image, mask


def resize_image(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (*size, 3), straight to (height, width) without keeping the aspect ratio."""
    return image if image.shape[:2] == size else RESIZES[resize](image, *size)


def resize_mask(mask: np.ndarray, size: tuple[int, int], resize: str = "nearest") -> np.ndarray:
    """bool (H, W) -> bool `size`.

    nearest takes the value at each pixel's centre (PIL's rule), so that a defect smaller than a pixel may vanish. area
    keeps every region (8-connected): as many pixels as its area makes at the new size, at least one, those that it
    covers most.
    """
    if mask.shape == size:
        return mask
    if resize == "nearest" or size[0] > mask.shape[0] or size[1] > mask.shape[1]:
        return cv2.resize(mask.view(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).view(bool)
    count, regions = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    resized = np.zeros(size, bool)
    for region in range(1, count):
        share = cv2.resize((regions == region).astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
        covered = np.argsort(-share, axis=None, kind="stable")
        resized.flat[covered[: max(1, round(float(share.sum())))]] = True
    return resized


def centre(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The central (height, width) `size` of an array (H, W, ...); half an odd margin is rounded to even, as in torchvision."""
    top, left = (round((whole - part) / 2) for whole, part in zip(array.shape, size, strict=False))
    return array[top : top + size[0], left : left + size[1]]


def check_crop(crop_from: tuple[int, int], size: tuple[int, int]) -> None:
    """DataError unless images of (height, width) `crop_from` have a centre of `size`."""
    if crop_from[0] < size[0] or crop_from[1] < size[1]:
        raise DataError(
            f"crop_from is {crop_from[0]} x {crop_from[1]}, but the centre of {size[0]} x {size[1]} pixels is to be kept: "
            "give at least the image size."
        )


def _turned(values: np.ndarray, data: bytes) -> np.ndarray:
    """What OpenCV decoded, turned by the EXIF orientation of a PNG; it turns TIFF files itself."""
    if not data.startswith(_PNG):
        return values
    orientation = 1
    with contextlib.suppress(*_BROKEN), _open(data) as image:
        orientation = image.getexif().get(274, 1)
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return np.ascontiguousarray(np.flip(values, flips))


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} (width x height)"


def infer_bit_depth(paths: Sequence[str], at_most: int = 32, max_megapixels: float = MAX_MEGAPIXELS) -> int:
    """Smallest usual bit depth that holds the colours of up to `at_most` of the 16-bit files, evenly picked."""
    picked = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(at_most, len(paths))).astype(int))]
    brightest = max(int(decode(path, max_megapixels)[0].max()) for path in picked)
    return next(bits for bits in BIT_DEPTHS if brightest < 1 << bits)
