"""MPDD: Jezek et al., Deep Learning-based Defect Detection of Metal Parts, ICUMT 2021. The layout of MVTec AD."""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import read_tree


@register
class MPDD(DatasetReader):
    name = "mpdd"
    layout = "<category>/{train/good, test/<good|defect>, ground_truth/<defect>/<stem>_mask.png}"
    homepage = "https://github.com/stepanje/MPDD"
    counts = {  # noqa: RUF012
        "bracket_black": Counts(289, 32, 47),
        "bracket_brown": Counts(185, 26, 51),
        "bracket_white": Counts(110, 30, 30),
        "connector": Counts(128, 30, 14),
        "metal_plate": Counts(54, 26, 71),
        "tubes": Counts(122, 32, 69),
    }

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        return read_tree(category, root / category, problems, endings=("_mask",))
