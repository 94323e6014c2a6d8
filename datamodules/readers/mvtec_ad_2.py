"""MVTec AD 2: Heckler-Kram et al., The MVTec AD 2 Dataset, arXiv 2503.21622. Eight categories, pixel masks 0/255.

Read are train, validation and the public test set. The private test sets (`test_private` under the light of the training,
`test_private_mixed` under any) have no labels: they are scored by the authors' server, see
`python -m lightning_modules submission`. Images are called `<number>_<light>.png`; light `regular` is that of the training
images, every other (overexposed, underexposed, shift_1 ...) is a shift.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import DatasetReader, register
from datamodules.sample_table import GOOD, Sample
from datamodules.tree import (
    list_folders,
    list_images,
    pair_masks,
    pairing_problems,
    unexpected_problems,
    unread_problems,
)

REGULAR = "regular"
PUBLIC, PRIVATE = "test_public", ("test_private", "test_private_mixed")


@register
class MVTecAD2(DatasetReader):
    name = "mvtec_ad_2"
    layout = (
        "<category>/{train/good, validation/good, test_public/{good, bad, ground_truth/bad/<stem>_mask.png}, "
        "test_private, test_private_mixed}"
    )
    homepage = "https://www.mvtec.com/company/research/datasets/mvtec-ad-2"
    fpr_limits = (0.05, 0.3)
    segmentation = True

    def locate(self, root: Path) -> Path:
        unpacked = root / "mvtec_ad_2"
        return unpacked if unpacked.is_dir() else root

    def categories(self, root: Path) -> list[str]:
        return [folder.name for folder in list_folders(root) if (self.folder(root, folder.name) / PUBLIC).is_dir()]

    def folder(self, root: Path, category: str) -> Path:
        """A category's folder; the archives of single categories hold it one level deeper."""
        inner = root / category / category
        return inner if (inner / PUBLIC).is_dir() else root / category

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        folder = self.folder(root, category)
        problems += unexpected_problems(category, folder, ["train", "validation", PUBLIC, *PRIVATE])
        problems += unexpected_problems(category, folder / PUBLIC, [GOOD, "bad", "ground_truth"])
        normal = {"train": folder / "train" / GOOD, "val": folder / "validation" / GOOD, "test": folder / PUBLIC / GOOD}
        samples = []
        for split, part in normal.items():
            problems += unread_problems(category, part)
            samples += [Sample(category, split, GOOD, GOOD, str(image)) for image in list_images(part)]
        bad = folder / PUBLIC / "bad"
        problems += unread_problems(category, bad)
        pairing = pair_masks(list_images(bad), folder / PUBLIC / "ground_truth" / "bad", ("_mask",))
        problems += pairing_problems(category, "bad", pairing, strict=True)
        samples += [
            Sample(category, "test", "bad", "structural", str(image), tuple(map(str, masks)))
            for image, masks in pairing.masks.items()
        ]
        return samples

    def condition(self, image_path: str) -> str:
        _, _, light = Path(image_path).stem.partition("_")
        return "" if not light else f"light={REGULAR if light == REGULAR else 'shifted'}"
