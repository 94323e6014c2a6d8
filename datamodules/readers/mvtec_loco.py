"""MVTec LOCO AD: Bergmann et al., Beyond Dents and Scratches, IJCV 2022. Structural and logical anomalies.

The mask of an image is a folder with one PNG per annotated region. A region's pixel value names its defect in the
category's `defects_config.json`, which also says how much of the region must be found (its saturation). The sample
table takes the union of the regions; `load_regions` gives them one by one for metrics such as sPRO.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from datamodules.errors import DataError
from datamodules.images import read_mask_values
from datamodules.problems import WARNING, Problem
from datamodules.readers.base import Counts, DatasetReader, register
from datamodules.sample_table import Sample
from datamodules.tree import read_tree

CONFIG = "defects_config.json"


@register
class MVTecLOCO(DatasetReader):
    name = "mvtec_loco"
    layout = (
        "<category>/{train/good, validation/good, test/{good,logical_anomalies,structural_anomalies}, "
        f"ground_truth/<type>_anomalies/<stem>/<number>.png, {CONFIG}}}"
    )
    homepage = "https://www.mvtec.com/company/research/datasets/mvtec-loco"
    counts = {  # noqa: RUF012
        "breakfast_box": Counts(351, 102, 90, 83, val=62),
        "juice_bottle": Counts(335, 94, 94, 142, val=54),
        "pushpins": Counts(372, 138, 81, 91, val=69),
        "screw_bag": Counts(360, 122, 82, 137, val=60),
        "splicing_connectors": Counts(354, 119, 85, 108, val=59),
    }

    def read_category(self, root: Path, category: str, problems: list[Problem]) -> list[Sample]:
        folder = root / category
        if not (folder / CONFIG).is_file():
            what = f"no {CONFIG}: everything works but metrics with saturation thresholds"
            problems.append(Problem(WARNING, "missing defects config", category, what, (str(folder / CONFIG),)))
        types = {"logical_anomalies": "logical", "structural_anomalies": "structural"}
        return read_tree(category, folder, problems, endings=(), anomaly_type=types)


@dataclass(frozen=True)
class DefectConfig:
    """How a defect of MVTec LOCO counts. With `relative` the threshold is a fraction of the region, else pixels."""

    name: str
    pixel_value: int
    saturation_threshold: float
    relative: bool


@dataclass(frozen=True)
class Region:
    """One annotated region at native resolution: `mask` bool (H, W) and the defect it belongs to."""

    mask: np.ndarray
    defect: DefectConfig

    @property
    def saturation_area(self) -> float:
        """Number of pixels of the region that must be found for it to count as found completely."""
        area = float(self.mask.sum())
        if self.defect.relative:
            return self.defect.saturation_threshold * area
        return min(self.defect.saturation_threshold, area)


@lru_cache(maxsize=64)
def load_defect_configs(path: str) -> dict[int, DefectConfig]:
    """Entries of a `defects_config.json` by pixel value."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        configs = [
            DefectConfig(
                entry["defect_name"],
                int(entry["pixel_value"]),
                float(entry["saturation_threshold"]),
                bool(entry["relative_saturation"]),
            )
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable MVTec LOCO defect configuration: {error!r}.") from error
    return {config.pixel_value: config for config in configs}


def load_regions(mask_paths: Sequence[str]) -> list[Region]:
    """Regions of one image of MVTec LOCO.

    Args:
        mask_paths: the row's `mask_paths`, `<category>/ground_truth/<type>_anomalies/<stem>/<number>.png`.

    Returns:
        One region per file and pixel value in it, in the order of the files; empty for a normal image.

    Raises:
        DataError: no configuration, or a pixel value that it does not name.
    """
    regions = []
    for path in mask_paths:
        config_path = Path(path).parents[3] / CONFIG
        configs = load_defect_configs(str(config_path))
        values, _ = read_mask_values(path)
        for value in np.unique(values[values > 0]).tolist():
            if value not in configs:
                raise DataError(f"{path}: pixel value {value} is not among {sorted(configs)} of {config_path}.")
            regions.append(Region(values == value, configs[value]))
    return regions
