"""VisA: Zou et al., SPot-the-Difference, ECCV 2022, in the one-class split of its authors.

Two layouts are read: the raw download, whose `split_csv/1cls.csv` names images and masks, and the converted one that
the authors' script writes (`<object>/{train/good, test/{good,bad}, ground_truth/bad}`). Raw masks hold small class ids
and look black. The one defect class is called "bad" in both.
"""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

from datamodules.errors import DataError
from datamodules.problems import ERROR, Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import GOOD, SPLITS, Sample
from datamodules.tree import read_tree

_CSV = Path("split_csv") / "1cls.csv"
_COLUMNS = ("object", "split", "label", "image", "mask")


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
    """Rows of the split file; DataError with file and line for one that is not as the authors write it."""
    path = root / _CSV
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if missing := [column for column in _COLUMNS if column not in header]:
                raise DataError(
                    f"{path}, line 1: no column {', '.join(missing)} in {header}; columns are {', '.join(_COLUMNS)}, "
                    "separated by commas."
                )
            rows = []
            for cells in filter(any, lines):
                row = dict(zip(header, cells, strict=False))
                for column, allowed in (("split", SPLITS), ("label", ("normal", "anomaly"))):
                    if row.get(column) not in allowed:
                        found = f"{column} {row[column]!r}" if column in row else f"only {len(cells)} cells, {cells}"
                        raise DataError(
                            f"{path}, line {lines.line_num}: {found}; {column} is one of {', '.join(allowed)}."
                        )
                if not row["object"] or not row.get("image") or (row["label"] == "anomaly" and "mask" not in row):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells, {cells}; a row names its object, split, label "
                        "and image, and an anomaly's mask."
                    )
                for column in ("image", "mask"):
                    place = PurePosixPath(row.get(column, ""))
                    if place.is_absolute() or ".." in place.parts:
                        raise DataError(
                            f"{path}, line {lines.line_num}: {column} {row[column]!r} leads out of the data set; a file is "
                            "named by its path below the folder of the data set."
                        )
                rows.append({"mask": ""} | row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}.") from error
    return rows
