"""BTAD: Mishra et al., VT-ADL, ISIE 2021. Good is called ok, defective ko; masks have their image's stem.

The archive mixes .bmp and .png, and well-known loaders convert the one to the other in place: both suffixes are read,
and where both exist for one stem the .png counts, once.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import read_tree


@register
class BTAD(DatasetReader):
    name = "btad"
    layout = "<01|02|03>/{train/ok, test/{ok,ko}, ground_truth/ko/<stem>.<png|bmp>}"
    homepage = "https://github.com/pankajmishra000/VT-ADL"
    counts = {"01": Counts(400, 21, 49), "02": Counts(399, 30, 200), "03": Counts(1000, 400, 41)}  # noqa: RUF012

    def locate(self, root: Path) -> Path:
        unpacked = root / "BTech_Dataset_transformed"
        return unpacked if unpacked.is_dir() else root

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        return read_tree(category, root / category, problems, endings=("",), one_per_stem=True)
