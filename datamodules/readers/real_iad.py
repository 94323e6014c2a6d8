"""Real-IAD: Wang et al., CVPR 2024. 30 categories, each object seen from five sides (C1 is the top, C2 to C5 oblique).

The download has one folder of images per resolution (`realiad_256`, `realiad_512`, `realiad_1024`, `realiad_raw`) and the
authors' splits in `realiad_jsons`: one JSON file per category, with paths relative to the category's folder. `real_iad` is
their split over all five views, every view an image of its own; `real_iad_sv` is their split of single views. A view is
anomalous exactly if its `anomaly_class` is not the file's normal class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.errors import DataError
from datamodules.problems import ERROR, WARNING, Problem, number_of
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import GOOD, Sample
from datamodules.tree import list_folders

JSONS = "realiad_jsons"
DEFECTS = {
    "AK": "pit", "BX": "deformation", "CH": "abrasion", "HS": "scratch", "PS": "damage", "QS": "missing_parts",
    "YW": "foreign_objects", "ZW": "contamination",
}  # fmt: skip
"""The authors' codes of anomaly classes."""


@dataclass(frozen=True)
class Entry:
    """One view in a split file; `defect` is "good" or the kind of defect, `mask` "" where there is none."""

    split: str
    defect: str
    image: str
    mask: str


def read_entries(path: Path) -> Iterator[Entry]:
    """The views of a split file, training images first; DataError with file and place for what is not as published."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(split), list) for split in ("train", "test")):
        raise DataError(f"{path}: the lists train and test are missing; is it a split file of Real-IAD?")
    meta = content.get("meta")
    normal = meta.get("normal_class", "OK") if isinstance(meta, dict) else "OK"
    for split in ("train", "test"):
        for number, entry in enumerate(content[split]):
            yield _entry(entry, split, normal, f"{path}, {split}[{number}]")


def _entry(entry: Any, split: str, normal: str, where: str) -> Entry:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("image_path", "anomaly_class")):
        raise DataError(
            f"{where}: {entry!r}; a view has the texts image_path and anomaly_class, and mask_path or null."
        )
    image, mask = (str(entry.get(name) or "").replace("\\", "/") for name in ("image_path", "mask_path"))
    for file in (image, mask):
        if file.startswith("/") or ".." in file.split("/"):
            raise DataError(f"{where}: {file!r} leads out of the category's folder.")
    kind = entry["anomaly_class"]
    return Entry(split, GOOD if kind == normal else DEFECTS.get(kind, kind), image, mask)


def read_views(
    category: str, folder: Path, split_file: Path, problems: list[Problem], unmasked_is_normal: bool
) -> list[Sample]:
    """Samples of one category's split file.

    Args:
        folder: what the file's paths are relative to.
        unmasked_is_normal: whether a test view of a defective object that has no mask shows no defect.
    """
    samples, missing, unmasked, defective, marked = [], [], [], [], []
    for entry in read_entries(split_file):
        image, defect = folder / entry.image, entry.defect
        mask = folder / entry.mask if entry.mask else None
        absent = [str(file) for file in (image, mask) if file is not None and not file.is_file()]
        if absent:
            missing += absent
            continue
        if defect == GOOD and mask is not None:
            marked.append(str(mask))
        if defect != GOOD and mask is None:
            unmasked.append(str(image))
            defect = GOOD if unmasked_is_normal else defect
        if defect != GOOD and entry.split == "train":
            defective.append(str(image))
            continue
        kind, masks = (GOOD, ()) if defect == GOOD else ("structural", () if mask is None else (str(mask),))
        samples.append(Sample(category, entry.split, defect, kind, str(image), masks))
    for severity, kind, files, what in (
        (ERROR, "missing image", missing, f"{number_of(len(missing), 'file')} that {split_file.name} names, not there"),
        (ERROR, "anomalous training image", defective, f"{split_file} trains on defects; only test may hold them"),
    ):
        if files:
            problems.append(Problem(severity, kind, category, what, tuple(files)))
    if marked:
        what = (
            f"{number_of(len(marked), 'view')} that {split_file.name} calls normal, with a mask: the mask is not looked at; name "
            "the defect in anomaly_class if there is one"
        )
        problems.append(Problem(WARNING, "mask of a normal image", category, what, tuple(marked)))
    if unmasked and not unmasked_is_normal:
        what = f"{number_of(len(unmasked), 'anomalous view')} without a mask; pixel metrics leave them out"
        problems.append(Problem(WARNING, "missing mask", category, what, tuple(unmasked)))
    return samples


def split_files(images: Path, *folders: str) -> dict[str, Path]:
    """Category -> split file, from the first of some folders beside the folder of images that holds any."""
    for folder in folders:
        files = sorted((images.parent / folder).glob("*.json"))
        if files:
            return {file.stem: file for file in files if not file.name.startswith(".")}
    return {}


def images_folder(root: Path, prefix: str) -> Path:
    """The folder `<prefix><resolution>` that is `root` or lies in it; DataError if several lie there."""

    def holds_images(folder: Path) -> bool:
        return folder.name.startswith(prefix) and not folder.name.startswith(f"{prefix}jsons")

    if holds_images(root):
        return root
    found = [folder for folder in list_folders(root) if holds_images(folder)]
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise DataError(f"{root} holds several resolutions: {names}. Name one as the root, for example {found[0]}.")
    return found[0] if found else root


def category_folder(images: Path, category: str) -> Path:
    """A category's folder; some archives hold it one level deeper."""
    inner = images / category / category
    return inner if inner.is_dir() else images / category


@register
class RealIAD(DatasetReader):
    name = "real_iad"
    layout = (
        "realiad_<256|512|1024|raw>/<category>/{OK, NG/<defect>}/<object>/<view>.jpg with <view>.png masks, and beside it "
        "realiad_jsons/realiad_jsons/<category>.json. The root is the folder of both, or that of one resolution"
    )
    homepage = "https://realiad4ad.github.io/Real-IAD"
    totals = (30, Counts(train=36465, test_good=63256, structural=51329))
    splits: ClassVar[tuple[str, ...]] = (f"{JSONS}/{JSONS}", JSONS)
    """Folders of split files beside the folder of images; the first that holds any counts."""
    prefix: ClassVar[str] = "realiad_"
    unmasked_is_normal: ClassVar[bool] = False

    def locate(self, root: Path) -> Path:
        return images_folder(root, self.prefix)

    def categories(self, root: Path) -> list[str]:
        return [name for name in split_files(root, *self.splits) if category_folder(root, name).is_dir()]

    def unread(self, root: Path) -> list[Problem]:
        known = split_files(root, *self.splits)
        return [
            Problem(
                WARNING,
                "no split file",
                folder.name,
                f"{folder} is left out: {next(iter(known.values())).parent / folder.name}.json, which says what is "
                "trained on and tested, is not there",
                (str(folder),),
            )
            for folder in list_folders(root)
            if folder.name not in known
        ]

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        file, folder = split_files(root, *self.splits)[category], category_folder(root, category)
        return read_views(category, folder, file, problems, self.unmasked_is_normal)


@register
class RealIADSingleView(RealIAD):
    name = "real_iad_sv"
    layout = RealIAD.layout.replace("realiad_jsons/realiad_jsons/", "realiad_jsons/realiad_jsons_sv/")
    totals = None
    splits = (f"{JSONS}/{JSONS}_sv", f"{JSONS}_sv")
