"""Augmentation of training images by category: image and mask together, through albumentations.

An entry of `AUGMENTATIONS` maps a category (without its dataset) to a list of albumentations transforms, applied in
order after the resize; an empty list leaves the category as it is. A method's recipe names an entry.

A policy that only flips and turns by 90 degrees gives at most eight versions of an image, its symmetries, numbered here
k + 4 f: mirrored left to right if f, then turned k times by 90 degrees counter-clockwise; 0 is the image itself.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from results.common.did_you_mean import did_you_mean

if TYPE_CHECKING:
    import albumentations

    Policy = Callable[[str], Sequence[albumentations.BasicTransform]]

# UniAS (WACV 2025), released code: hflip and vflip with p = 0.3, then a rotation drawn from {0, 90, 180, 270} degrees.
_MVTEC_FLIP = frozenset(
    ["bottle", "carpet", "grid", "hazelnut", "metal_nut", "pill", "screw", "tile", "wood", "zipper"],
)
_MVTEC_ROTATE = frozenset(["bottle", "carpet", "hazelnut", "screw", "tile", "wood"])
_VISA_HFLIP = frozenset(["candle", "macaroni2", "capsules", "chewinggum", "fryum", "macaroni1", "pipe_fryum"])
_VISA_VFLIP = frozenset(["macaroni2", "capsules", "chewinggum", "fryum", "pipe_fryum"])
_VISA_ROTATE = frozenset(["macaroni2", "capsules", "fryum"])


# DeSTSeg (CVPR 2023), released code: fully turned, or by up to 5 degrees; the other categories of MVTec AD stay as they are.
_DESTSEG_ROTATE = frozenset(["bottle", "grid", "hazelnut", "leather", "tile", "carpet", "screw"])
_DESTSEG_SLIGHT = frozenset(["wood", "zipper", "cable"])


def _library():
    """albumentations, imported late: it takes a second, and by default asks the network for a newer version."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _flips_and_rotations(
    category: str, hflip: frozenset[str], vflip: frozenset[str], rotate: frozenset[str]
) -> list[albumentations.BasicTransform]:
    library = _library()
    transforms: list[albumentations.BasicTransform] = []
    if category in hflip:
        transforms.append(library.HorizontalFlip(p=0.3))
    if category in vflip:
        transforms.append(library.VerticalFlip(p=0.3))
    if category in rotate:
        transforms.append(library.RandomRotate90(p=1.0))  # p = 1 is uniform over the four angles, 0 among them
    return transforms


def _unias_mvtec(category: str) -> list[albumentations.BasicTransform]:
    """UniAS on MVTec AD as meant: hazelnut is augmented. cable, capsule, leather, toothbrush, transistor are not."""
    return _flips_and_rotations(category, _MVTEC_FLIP, _MVTEC_FLIP, _MVTEC_ROTATE)


def _unias_mvtec_released(category: str) -> list[albumentations.BasicTransform]:
    """UniAS on MVTec AD as released: its lists spell "hazel_nut", so hazelnut is never augmented."""
    return [] if category == "hazelnut" else _unias_mvtec(category)


def _unias_visa(category: str) -> list[albumentations.BasicTransform]:
    """UniAS on VisA."""
    return _flips_and_rotations(category, _VISA_HFLIP, _VISA_VFLIP, _VISA_ROTATE)


def _destseg_mvtec(category: str) -> list[albumentations.BasicTransform]:
    """DeSTSeg on MVTec AD: {0, 90, 180, 270} plus or minus 5 degrees, or only the latter; corners become grey 114."""
    library = _library()
    transforms = [library.RandomRotate90(p=1.0)] if category in _DESTSEG_ROTATE else []
    if category in _DESTSEG_ROTATE | _DESTSEG_SLIGHT:
        transforms.append(library.Rotate((-5, 5), border_mode=0, fill=(114, 114, 114), fill_mask=0, p=1.0))
    return transforms


def _cflow(category: str) -> list[albumentations.BasicTransform]:
    """CFLOW: every image turned by up to 5 degrees, by the nearest pixel; corners become black."""
    return [_library().Rotate((-5, 5), interpolation=0, border_mode=0, fill=0, fill_mask=0, p=1.0)]


def _draem(category: str) -> list[albumentations.BasicTransform]:
    """DRAEM: three images in ten turned by up to 90 degrees; corners become black."""
    return [_library().Rotate((-90, 90), border_mode=0, fill=0, fill_mask=0, p=0.3)]


AUGMENTATIONS: dict[str, Policy] = {
    "none": lambda category: [],
    "unias_mvtec": _unias_mvtec,
    "unias_mvtec_released": _unias_mvtec_released,
    "unias_visa": _unias_visa,
    "destseg_mvtec": _destseg_mvtec,
    "cflow": _cflow,
    "draem": _draem,
}


SYMMETRIES_OF = {
    "HorizontalFlip": (0, 4),
    "VerticalFlip": (0, 6),
    "RandomRotate90": (0, 1, 2, 3),
    "Transpose": (0, 5),
    "D4": tuple(range(8)),
}
"""albumentations transform -> the symmetries that it may give. Any other transform makes more versions than these."""


def apply_symmetry(array: np.ndarray, symmetry: int) -> np.ndarray:
    """A view of an array (H, W, ...) with one of the eight symmetries of a square, 0 to 7."""
    return np.rot90(array[:, ::-1] if symmetry >= 4 else array, symmetry % 4)


_PROBE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
_SYMMETRY_OF_PROBE = {apply_symmetry(_PROBE, symmetry).tobytes(): symmetry for symmetry in range(8)}


def not_square(key: str) -> DataError:
    """What to raise for images that cannot be turned."""
    return DataError(f"The augmentation of {key!r} turns images by 90 degrees: image_size must be square.")


class Augmentation:
    """A named policy, made ready for the categories of a run.

    Args:
        name: entry of AUGMENTATIONS.
        categories: category keys of the run, each with the category by which it is looked up; a plain sequence where the
            keys are the categories.
    """

    def __init__(self, name: str, categories: Mapping[str, str] | Sequence[str]) -> None:
        if name not in AUGMENTATIONS:
            raise DataError(f"Unknown augmentation {name!r}. {did_you_mean(name, AUGMENTATIONS)}")
        policy = AUGMENTATIONS[name]
        named = categories if isinstance(categories, Mapping) else dict(zip(categories, categories, strict=True))
        lists = {key: policy(category) for key, category in named.items()}
        self._pipelines = {key: _library().Compose(list(steps)) for key, steps in lists.items() if steps}
        if name != "none" and not self._pipelines:
            raise DataError(f"Augmentation {name!r} has nothing for any of the categories {', '.join(categories)}.")

    def __call__(self, image: np.ndarray, mask: np.ndarray, key: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Augment one sample: image uint8 (H, W, 3) and mask bool (H, W), the same geometry for both.

        The result depends on the arguments alone. A transform that changes the size raises DataError.
        """
        if key not in self._pipelines:
            return image, mask
        result = self._seeded(key, seed)(image=image, mask=mask.view(np.uint8))
        if result["image"].shape != image.shape:
            raise not_square(key)
        return result["image"], result["mask"].view(bool)

    def symmetry(self, key: str, seed: int) -> int:
        """Which symmetry `__call__` gives for this seed, of those that `symmetries` names."""
        if key not in self._pipelines:
            return 0
        return _SYMMETRY_OF_PROBE[self._seeded(key, seed)(image=_PROBE)["image"].tobytes()]

    def symmetries(self, key: str) -> tuple[int, ...] | None:
        """All symmetries that a category's images may get, ascending; None if its augmentation does anything else."""
        reached = {_PROBE.tobytes(): _PROBE}
        for step in self._pipelines[key].transforms if key in self._pipelines else ():
            own = SYMMETRIES_OF.get(type(step).__name__)
            if own is None:
                return None
            versions = [apply_symmetry(probe, symmetry) for probe in reached.values() for symmetry in own]
            reached = {version.tobytes(): version for version in versions}
        return tuple(sorted(_SYMMETRY_OF_PROBE[version] for version in reached))

    def _seeded(self, key: str, seed: int) -> albumentations.Compose:
        pipeline = self._pipelines[key]
        # One generator for all steps: set_random_seed would give each step the same numbers, so flips would coincide.
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return pipeline
