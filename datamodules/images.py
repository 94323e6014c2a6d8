"""Image and mask files -> arrays, by rules that are written down here and nowhere else.

Images become 8-bit RGB: grey is repeated to three channels, a palette is resolved to its colours, alpha is dropped
(the stored colour stays, nothing is blended), EXIF orientation is applied, and 16-bit values are scaled by the bit
depth that is declared or was inferred for the dataset. OpenCV decodes everything: on PNG and JPEG files its pixels
equal PIL's.

Masks become boolean at native resolution: a pixel is defective if its value is above the dataset's threshold (0 for
all public datasets: VisA stores 1, MVTec LOCO stores defect ids); palette masks count their index, colour masks their
greatest channel. A JPEG mask rings around its edges, so there values above 127 count.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from datamodules.errors import DataError
from results.common.nearest import did_you_mean

BIT_DEPTHS = (8, 10, 12, 14, 16)
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


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


def _read_whole(path: str | Path) -> np.ndarray:
    """Bytes of an image file; a file cut off before its end marker raises, where decoders would fill in grey."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if data.size == 0:
        raise DataError(f"{path}: the file is empty.")
    head, tail = data[:8].tobytes(), data[-65536:].tobytes()
    if (head == _PNG and b"IEND" not in tail) or (head.startswith(_JPEG) and b"\xff\xd9" not in tail):
        raise DataError(f"{path}: the file is truncated (its end marker is missing): copy or download it again.")
    return data


def _decode(data: np.ndarray, path: str | Path, flags: int) -> np.ndarray:
    try:
        decoded = cv2.imdecode(data, flags)
    except cv2.error as error:
        raise DataError(f"{path}: the image is corrupt: {error}") from error
    if decoded is None:
        raise DataError(f"{path}: not a readable image (corrupt, or a format that OpenCV does not know).")
    return decoded


def read_image(path: str | Path, bit_depth: int | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        path: file.
        bit_depth: significant bits of 16-bit files; None means all 16. Ignored for 8-bit files.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        DataError: unreadable, truncated, floating point, or brighter than the bit depth allows.
    """
    image = _decode(_read_whole(path), path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image.dtype == np.uint16:
        top = (1 << (bit_depth or 16)) - 1
        if (brightest := int(image.max())) > top:
            raise DataError(
                f"{path}: value {brightest} does not fit into {bit_depth} bits (at most {top}). "
                f"Declare the depth of these images with bit_depth, one of {BIT_DEPTHS}."
            )
        image = np.rint(image * np.float32(255 / top)).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise DataError(f"{path}: pixels are {image.dtype}; convert the image to 8 or 16 bit integers.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def read_mask_values(path: str | Path) -> tuple[np.ndarray, bool]:
    """Stored values of a mask file (H, W), integer; and whether the file is lossy (JPEG).

    A palette gives its indices; of several colour channels the greatest value is taken, alpha is ignored.
    """
    data = _read_whole(path)
    values = _decode(data, path, cv2.IMREAD_UNCHANGED)
    if values.ndim == 3:
        with Image.open(io.BytesIO(data.tobytes())) as stored:
            values = np.asarray(stored) if stored.mode == "P" else values[..., : min(3, values.shape[2])].max(axis=2)
    return values, data[:2].tobytes() == _JPEG


def read_mask(paths: Sequence[str | Path], threshold: int = 0) -> np.ndarray:
    """Union of mask files at native resolution.

    Args:
        paths: one or more files of equal size.
        threshold: values above it are defective.

    Returns:
        bool (H, W).
    """
    union: np.ndarray | None = None
    for path in paths:
        values, lossy = read_mask_values(path)
        mask = values > (max(threshold, 127) if lossy else threshold)
        if union is not None and union.shape != mask.shape:
            raise DataError(f"{path}: mask is {_size(mask)}, the image's other masks are {_size(union)} ({paths[0]}).")
        union = mask if union is None else union | mask
    if union is None:
        raise DataError("read_mask needs at least one file.")
    return union


def read_pair(
    image_path: str, mask_paths: Sequence[str], bit_depth: int | None = None, threshold: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Image uint8 (H, W, 3) and its mask bool (H, W), None without files; their sizes must agree."""
    image = read_image(image_path, bit_depth)
    if not mask_paths:
        return image, None
    mask = read_mask(mask_paths, threshold)
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{mask_paths[0]}: mask is {_size(mask)}, its image {image_path} is {_size(image)}. "
            "They must have equal size: export the mask again from the image as it is."
        )
    return image, mask


def resize_image(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (*size, 3), straight to (height, width) without keeping the aspect ratio."""
    return image if image.shape[:2] == size else RESIZES[resize](image, *size)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W) -> bool `size`, nearest neighbour at pixel centres (PIL's rule) for every method."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask.view(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).view(bool)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} (width x height)"


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded."""

    mode: str
    """8-bit grey, 8-bit RGB, palette, grey or RGB with alpha, 16-bit, floating point, other: <PIL mode>."""
    width: int
    height: int


def read_header(path: str | Path) -> Header:
    """Mode and size of an image file without decoding it; DataError if it is no image."""
    try:
        with open(path, "rb") as file:
            head = file.read(26)
        if head.startswith(_PNG) and len(head) == 26:
            width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
            if bits == 16:
                return Header("16-bit", width, height)
            modes = {0: "8-bit grey", 2: "8-bit RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
            return Header(modes.get(colour, f"other: PNG colour type {colour}"), width, height)
        with Image.open(path) as image:
            mode = _PIL_MODES.get(image.mode, f"other: {image.mode}")
            return Header(mode, *image.size)
    except OSError as error:
        raise DataError(f"{path}: not a readable image: {error}") from error


_PIL_MODES = {
    "1": "8-bit grey",
    "L": "8-bit grey",
    "RGB": "8-bit RGB",
    "P": "palette",
    "PA": "palette",
    "LA": "grey with alpha",
    "RGBA": "RGB with alpha",
    "I": "16-bit",
    "I;16": "16-bit",
    "I;16B": "16-bit",
    "F": "floating point",
}
REMARKABLE = {
    "palette": "palette colours are resolved to RGB",
    "grey with alpha": "alpha is dropped",
    "RGB with alpha": "alpha is dropped",
    "16-bit": "values are scaled to 8 bits",
    "floating point": "floating point images cannot be read: convert them to 8 or 16 bit",
}
"""Modes that deserve a word to the user, and the rule that applies to them."""


def infer_bit_depth(paths: Sequence[str], at_most: int = 32) -> int:
    """Smallest usual bit depth that holds the values of up to `at_most` of the 16-bit files, evenly picked."""
    picked = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(at_most, len(paths))).astype(int))]
    brightest = max(int(_decode(_read_whole(path), path, cv2.IMREAD_UNCHANGED).max()) for path in picked)
    return next(bits for bits in BIT_DEPTHS if brightest < 1 << bits)
