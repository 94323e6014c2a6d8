"""MVTec AD: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021. 15 categories, pixel masks 0/255."""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import read_tree


@register
class MVTecAD(DatasetReader):
    name = "mvtec_ad"
    layout = "<category>/{train/good, test/<good|defect>, ground_truth/<defect>/<stem>_mask.png}"
    homepage = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    counts = {  # noqa: RUF012
        "bottle": Counts(209, 20, 63),
        "cable": Counts(224, 58, 92),
        "capsule": Counts(219, 23, 109),
        "carpet": Counts(280, 28, 89),
        "grid": Counts(264, 21, 57),
        "hazelnut": Counts(391, 40, 70),
        "leather": Counts(245, 32, 92),
        "metal_nut": Counts(220, 22, 93),
        "pill": Counts(267, 26, 141),
        "screw": Counts(320, 41, 119),
        "tile": Counts(230, 33, 84),
        "toothbrush": Counts(60, 12, 30),
        "transistor": Counts(213, 60, 40),
        "wood": Counts(247, 19, 60),
        "zipper": Counts(240, 32, 119),
    }

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        return read_tree(category, root / category, problems, endings=("_mask",))
