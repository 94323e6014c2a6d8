"""Any MVTec-like tree of a user's own images; masks are optional.

The root holds categories, or is itself one category (then named after the root folder). Masks may be called
`<stem>_mask.<suffix>` or `<stem>.<suffix>`, or be a folder `<stem>/` of masks whose union counts. A test folder whose
name starts with "logical" holds logical anomalies, any other but good, ok and normal structural ones.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import is_category, list_folders, read_tree


@register
class Folder(DatasetReader):
    name = "folder"
    holdout = 0.2
    layout = "[<category>/]{train/good, test/<good|defect>} and, with masks, ground_truth/<defect>/<stem>_mask.png"

    def categories(self, root: Path) -> list[str]:
        return [root.resolve().name] if is_category(root) else super().categories(root)

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        folder = root if is_category(root) else root / category
        logical = {p.name: "logical" for p in list_folders(folder / "test") if p.name.startswith("logical")}
        return read_tree(category, folder, problems, strict=False, anomaly_type=logical, flat=True)
