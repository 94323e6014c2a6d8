"""Walking image folders and pairing masks with images by name: the pieces that the readers share."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.images import IMAGE_SUFFIXES
from datamodules.problems import ERROR, WARNING, Problem, number_of
from datamodules.sample_table import GOOD, Sample
from results.common.contents import CLUTTER
from results.common.did_you_mean import nearest

NORMAL_NAMES = (GOOD, "ok", "normal")
"""Folders of normal images, in any case."""


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder` by suffix, hidden ones (.DS_Store, ._001.png) left out, sorted by name."""
    return [folder / name for name in _image_names(folder)]


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # which looks at links only, where a path looks at every file
        return sorted(
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            and not entry.name.startswith(".")
            and (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file())
        )


def list_folders(folder: Path) -> list[Path]:
    """Folders directly in `folder`, hidden ones left out, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def is_normal(folder: Path) -> bool:
    """Whether a folder is called as one of normal images."""
    return folder.name.casefold() in NORMAL_NAMES


def is_category(folder: Path) -> bool:
    """Whether a folder looks like one category of an MVTec-like tree."""
    return (folder / "train").is_dir()


@dataclass(frozen=True)
class Pairing:
    """Masks by image. `masks` holds an entry for each image; images without a mask have an empty tuple."""

    masks: dict[Path, tuple[Path, ...]]
    orphans: tuple[Path, ...]
    duplicates: tuple[tuple[Path, ...], ...]

    @property
    def unpaired(self) -> tuple[Path, ...]:
        return tuple(image for image, masks in self.masks.items() if not masks)


def pair_masks(images: Sequence[Path], folder: Path, endings: Sequence[str] = ("_mask", "")) -> Pairing:
    """Pair each image with the masks in `folder` by name, never by order.

    The mask of `007.jpg` is a file `007<ending>.<any image suffix>`, where an ending earlier in `endings` wins, or else
    every file in a folder `007/`. If several suffixes exist, .png wins; the losers are reported as duplicates.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in list_images(folder):
        by_stem[mask.stem].append(mask)
    folders = {path.name: path for path in list_folders(folder)}
    used: set[Path] = set()
    duplicates: list[tuple[Path, ...]] = []
    masks: dict[Path, tuple[Path, ...]] = {}
    for image in images:
        candidates = [mask for ending in endings for mask in by_stem.get(image.stem + ending, [])]
        if candidates:
            best_stem = candidates[0].stem
            best = min((m for m in candidates if m.stem == best_stem), key=lambda m: (m.suffix.lower() != ".png", m))
            masks[image] = (best,)
            if len(candidates) > 1:
                duplicates.append((best, *(m for m in candidates if m != best)))
            used.update(candidates)
        elif image.stem in folders:
            masks[image] = tuple(list_images(folders[image.stem]))
            used.update(masks[image])
        else:
            masks[image] = ()
    on_disk = [*list_images(folder), *(mask for name in folders.values() for mask in list_images(name))]
    return Pairing(masks, tuple(mask for mask in on_disk if mask not in used), tuple(duplicates))


def pairing_problems(category: str, defect: str, pairing: Pairing, strict: bool) -> list[Problem]:
    """What is wrong with a pairing. With `strict` (public datasets) a missing mask is an error, else a warning.

    Masks that all fail to pair are an error either way: that is a naming mistake, not missing annotation.
    """
    problems = []
    unpaired, orphans = pairing.unpaired, pairing.orphans
    nothing_pairs = bool(orphans) and len(unpaired) == len(pairing.masks) > 0
    if unpaired:
        what = f"{len(unpaired)} of {number_of(len(pairing.masks), 'image')} of defect {defect!r} without a mask"
        if nothing_pairs:
            what += f", beside {number_of(len(orphans), 'mask')} of other names: name that of 007.jpg 007_mask.png or 007.png"
        elif strict:
            what += ": complete the data set, or read it with DATASET=folder, where masks are optional"
        else:
            what += "; pixel metrics leave them out"
        severity = ERROR if strict or nothing_pairs else WARNING
        problems.append(Problem(severity, "missing mask", category, what, tuple(map(str, unpaired))))
    if orphans:
        what = f"{number_of(len(orphans), 'mask')} of defect {defect!r} without an image"
        problems.append(Problem(WARNING, "orphan mask", category, what, tuple(map(str, orphans))))
    for kept, *others in pairing.duplicates:
        what = f"{kept.name} is used, {', '.join(o.name for o in others)} is not"
        problems.append(Problem(WARNING, "duplicate mask", category, what, tuple(map(str, (kept, *others)))))
    return problems


def duplicate_stem_problems(category: str, images: Sequence[Path], severity: str, so: str) -> list[Problem]:
    """Images of one folder that differ in their suffix only; `so` says what becomes of them."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
    return [
        Problem(
            severity,
            "duplicate stem",
            category,
            f"{' and '.join(p.name for p in same)} in {same[0].parent.name} differ only in their suffix: {so}",
            tuple(map(str, same)),
        )
        for same in by_stem.values()
        if len(same) > 1
    ]


def unread_problems(category: str, folder: Path) -> list[Problem]:
    """What lies in a folder of images without being read: folders, dead links, files of other suffixes."""
    if not folder.is_dir():
        return []
    others = set(os.listdir(folder)).difference(_image_names(folder))
    left = [folder / name for name in others if not name.startswith(".") and name.casefold() not in CLUTTER]
    if not left:
        return []
    names = sorted(p.name + "/" * p.is_dir() for p in left)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    where = f"{folder.parent.name}/{folder.name}"
    what = f"{shown} in {where} left out: images lie in that folder itself and end with {', '.join(IMAGE_SUFFIXES)}"
    return [Problem(WARNING, "not read", category, what, tuple(sorted(map(str, left))))]


_MASK_FOLDERS = ("mask", "masks", "gt", "label", "labels", "annotation", "annotations", "ground_truths", "groundtruth")


def unexpected_problems(category: str, folder: Path, expected: Sequence[str]) -> list[Problem]:
    """Folders of a category that are not read, each with the name that it may have been meant to have."""
    problems = []
    for part in list_folders(folder):
        if part.name in expected:
            continue
        name = part.name.casefold().replace(" ", "_").replace("-", "_")
        near = ["ground_truth"] if name in _MASK_FOLDERS else nearest(name, expected)
        hint = f": if it is meant as {near[0]}, rename it" if near else ""
        what = f"{part.name}/ left out, beside {', '.join(f'{e}/' for e in expected)}{hint}"
        problems.append(Problem(WARNING, "not read", category, what, (str(part),)))
    return problems


def read_tree(
    category: str,
    folder: Path,
    problems: list[Problem],
    *,
    endings: Sequence[str] = ("_mask", ""),
    strict: bool = True,
    anomaly_type: dict[str, str] | None = None,
    flat: bool = False,
    one_per_stem: bool = False,
) -> list[Sample]:
    """Samples of one category in an MVTec-like tree; findings are appended to `problems`.

    `train/good`, optional `validation/good` (or `val/good`), `test/<good|defect>`, `ground_truth/<defect>`; good may be
    called ok or normal, in any case. Each part is found by joining names to `folder`, so words in parent folders do not
    matter.

    Args:
        endings: what a mask's stem adds to its image's stem.
        strict: whether a missing mask is an error.
        anomaly_type: defect -> structural or logical; a defect not named is structural.
        flat: whether training images may lie in `train` itself, without `good`.
        one_per_stem: whether files that differ in their suffix only are one image stored twice; .png wins.
    """
    samples: list[Sample] = []

    def images_of(part: Path, anomalous: bool) -> list[Path]:
        images = list_images(part)
        if part.parent != folder:  # not for `train` itself, whose folders are looked at below
            problems.extend(unread_problems(category, part))
        if one_per_stem:
            problems.extend(duplicate_stem_problems(category, images, WARNING, "stored twice, the .png is used"))
            best = {p.stem: p for p in sorted(images, key=lambda p: p.suffix.lower() == ".png")}
            return sorted(best.values(), key=lambda p: p.name)
        severity = ERROR if anomalous else WARNING
        problems.extend(duplicate_stem_problems(category, images, severity, "each counts as an image of its own"))
        return images

    def add_normals(split: str, part: Path) -> None:
        samples.extend(Sample(category, split, GOOD, GOOD, str(image)) for image in images_of(part, anomalous=False))

    parts = {"train": folder / "train", "val": folder / "validation", "test": folder / "test"}
    if not parts["val"].is_dir():
        parts["val"] = folder / "val"
    problems.extend(unexpected_problems(category, folder, [*(part.name for part in parts.values()), "ground_truth"]))
    for split, part in parts.items():
        for normals in filter(is_normal, list_folders(part)):
            add_normals(split, normals)
    loose = {part: list_images(part) for part in parts.values()}
    if flat and not any(sample.split == "train" for sample in samples):
        add_normals("train", parts["train"])
        loose.pop(parts["train"])
    for part, images in loose.items():
        if images:
            what = (
                f"{number_of(len(images), 'image')} in {part.name}/ itself left out: they belong in one of its folders"
            )
            problems.append(Problem(WARNING, "not read", category, what, tuple(map(str, images))))
    for part in (parts["train"], parts["val"]):
        unused = [p.name for p in list_folders(part) if not is_normal(p)]
        if unused:
            what = f"{part.name} holds {', '.join(unused)}, left out: only good, ok or normal is trained on"
            problems.append(Problem(WARNING, "unused folder", category, what, (str(part),)))
    defects = [part for part in list_folders(parts["test"]) if not is_normal(part)]
    for part in defects:
        images = images_of(part, anomalous=True)
        pairing = pair_masks(images, folder / "ground_truth" / part.name, endings)
        if strict or (folder / "ground_truth").is_dir():
            problems.extend(pairing_problems(category, part.name, pairing, strict))
        kind = (anomaly_type or {}).get(part.name, "structural")
        samples.extend(
            Sample(category, "test", part.name, kind, str(image), tuple(map(str, pairing.masks[image])))
            for image in images
        )
    for part in list_folders(folder / "ground_truth"):
        if not strict and is_normal(part) and (masks := list_images(part)):
            what = (
                f"{number_of(len(masks), 'mask')} of normal images, not looked at: put images with a defect into a folder of "
                "test/ that is called after it"
            )
            problems.append(Problem(WARNING, "mask of a normal image", category, what, tuple(map(str, masks))))
        if part.name not in {defect.name for defect in defects} and not is_normal(part):
            what = f"ground_truth/{part.name} has no test/{part.name}"
            problems.append(Problem(WARNING, "orphan mask", category, what, (str(part),)))
    return samples
