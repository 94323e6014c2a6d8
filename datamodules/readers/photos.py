"""The photographs of real products that come with the project; see `datamodules/photos/README.md`."""

from __future__ import annotations

from pathlib import Path

from datamodules.problems import Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import read_tree


@register
class Photos(DatasetReader):
    name = "photos"
    layout = "<category>/{train/good, test/<good|defect>, ground_truth/<defect>/<stem>_mask.png}"
    default_root = Path(__file__).parents[1] / "photos"
    counts = {"ball_screw": Counts(60, 30, 40), "cookie": Counts(31, 14, 32)}  # noqa: RUF012

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        return read_tree(category, root / category, problems, endings=("_mask",))
