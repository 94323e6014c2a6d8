"""The embedded benchmark that `python -m datamodules synthetic` writes, in either of its layouts."""

from __future__ import annotations

import json
from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import DatasetReader, register
from datamodules.readers.mvtec_loco import MVTecLOCO
from datamodules.sample_table import Sample
from datamodules.tree import read_tree

MANIFEST = "synthetic.json"


@register
class Synthetic(DatasetReader):
    name = "synthetic"
    layout = (
        f"{MANIFEST} and <category>/{{train/good, test/<good|defect>, ground_truth/<defect>/<stem>_mask.png}}, or the "
        "layout of mvtec_loco"
    )
    homepage = "the command `python -m datamodules synthetic FOLDER`"

    def categories(self, root: Path) -> list[str]:
        return super().categories(root) if (root / MANIFEST).is_file() else []

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if manifest["layout"] == MVTecLOCO.name:
            return MVTecLOCO().read_category(root, category, problems)
        types = manifest["anomaly_types"]
        return read_tree(category, root / category, problems, endings=("_mask",), anomaly_type=types)
