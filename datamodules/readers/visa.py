"""VisA: Zou et al., SPot-the-Difference, ECCV 2022, in the one-class split of its authors.

Two layouts are read: the raw download, whose `split_csv/1cls.csv` names images and masks, and the converted one that
the authors' script writes (`<object>/{train/good, test/{good,bad}, ground_truth/bad}`). Raw masks hold small class ids
and look black. The one defect class is called "bad" in both.
"""

from __future__ import annotations

import csv
from pathlib import Path

from datamodules.problems import ERROR, Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import GOOD, Sample
from datamodules.tree import read_tree

_CSV = Path("split_csv") / "1cls.csv"


@register
class VisA(DatasetReader):
    name = "visa"
    layout = (
        f"raw: {_CSV.as_posix()} and <object>/Data/{{Images/{{Normal,Anomaly}}, Masks/Anomaly}}; or converted: "
        "<object>/{train/good, test/{good,bad}, ground_truth/bad}"
    )
    homepage = "https://github.com/amazon-science/spot-diff"
    counts = {  # noqa: RUF012
        "candle": Counts(900, 100, 100),
        "capsules": Counts(542, 60, 100),
        "cashew": Counts(450, 50, 100),
        "chewinggum": Counts(453, 50, 100),
        "fryum": Counts(450, 50, 100),
        "macaroni1": Counts(900, 100, 100),
        "macaroni2": Counts(900, 100, 100),
        "pcb1": Counts(904, 100, 100),
        "pcb2": Counts(901, 100, 100),
        "pcb3": Counts(905, 101, 100),
        "pcb4": Counts(904, 101, 100),
        "pipe_fryum": Counts(450, 50, 100),
    }

    def locate(self, root: Path) -> Path:
        converted = root / "visa_pytorch"
        return converted if converted.is_dir() and not (root / _CSV).is_file() else root

    def categories(self, root: Path) -> list[str]:
        if (root / _CSV).is_file():
            return sorted({row["object"] for row in _split(root)})
        return super().categories(root)

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        if not (root / _CSV).is_file():
            return read_tree(category, root / category, problems)
        samples = []
        for row in _split(root):
            if row["object"] != category:
                continue
            image = root / row["image"]
            if not image.is_file():
                what = f"{_CSV.as_posix()} names {row['image']}, which is not there"
                problems.append(Problem(ERROR, "missing image", category, what, (str(image),)))
                continue
            if row["label"] == "normal":
                samples.append(Sample(category, row["split"], GOOD, GOOD, str(image)))
                continue
            mask = root / (row["mask"] or "")
            masks = (str(mask),) if mask.is_file() else ()
            if not masks:
                what = f"{_CSV.as_posix()} names the mask {row['mask'] or '(none)'} of {row['image']}, not there"
                problems.append(Problem(ERROR, "missing mask", category, what, (str(image),)))
            samples.append(Sample(category, row["split"], "bad", "structural", str(image), masks))
        return samples


def _split(root: Path) -> list[dict[str, str]]:
    with open(root / _CSV, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))
