"""Numbers of datasets with logical anomalies (MVTec LOCO AD): by type of anomaly, and with saturated regions.

* image AUROC of the logical and of the structural anomalies, each against all good images, and their average;
* AU-sPRO of each type with all good images, at the resolution of the masks, up to the FPR limits 0.05 (the dataset's
  paper) and 0.3, and the averages; see `lightning_modules.metrics.spro`.

The official evaluation prints the same three columns: logical, structural, mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.readers.mvtec_loco import CONFIG, load_regions
from lightning_modules.metrics.means import mean_over_categories
from lightning_modules.metrics.ranking import rank
from lightning_modules.metrics.spro import LIMITS, Region, Sample, saturation_area, spro_curve
from lightning_modules.metrics.sync import Group

TYPES = ("logical", "structural")
MEAN = "types"
"""Suffix of the average over both types."""


def spro_name(limit: float) -> str:
    """`pixel_auspro` for the limit 0.05, `pixel_auspro_0.3` for 0.3."""
    return "pixel_auspro" if limit == LIMITS[0] else f"pixel_auspro_{limit:g}"


DEFINITIONS = {
    "image_auroc_logical": "image_auroc of the images with logical anomalies against all good images",
    "image_auroc_structural": "image_auroc of the images with structural anomalies against all good images",
    "image_auroc_types": "average of image_auroc_logical and image_auroc_structural (MVTec LOCO AD's official mean)",
} | {
    f"{spro_name(limit)}_{kind}": (
        (
            f"area under the mean saturated overlap of the {kind} regions as a function of the FPR over the pixels in no "
            f"region of the {kind} and good images, from FPR 0 to {limit:g}, divided by it; a region is one mask file, "
            "saturated as defects_config.json says, at the masks' resolution; one step per distinct score"
        )
        if kind in TYPES
        else f"average of {spro_name(limit)}_logical and {spro_name(limit)}_structural"
    )
    for limit in LIMITS
    for kind in (*TYPES, MEAN)
}


def has_logical(table: pd.DataFrame) -> bool:
    """Whether a sample table holds logical anomalies."""
    return bool((table["anomaly_type"] == "logical").any())


class LogicalEvaluation:
    """Collects what `logical` needs during a test; only categories with logical anomalies take part.

    table: the sample table; keys: the category key of each of its rows.
    """

    def __init__(self, table: pd.DataFrame, keys: Sequence[str]) -> None:
        rows = table.assign(key=list(keys))[table["split"] == "test"]
        chosen = set(rows.loc[rows["anomaly_type"] == "logical", "key"])
        rows = rows[rows["key"].isin(chosen)]
        self._rows = {row.id: row for row in rows.itertuples(index=False)}
        self._keys = list(dict.fromkeys(rows["key"]))
        self._datasets = dict(zip(rows["key"], rows["dataset"], strict=True))
        self._scores: dict[str, dict[int, float]] = {}
        self._maps: dict[int, np.ndarray] = {}
        self._saturated = {key: self._has_config(rows[rows["key"] == key]) for key in self._keys}

    @staticmethod
    def _has_config(rows: pd.DataFrame) -> bool:
        masks = [path for paths in rows["mask_paths"] for path in paths]
        return bool(masks) and all((Path(path).parents[3] / CONFIG).is_file() for path in masks[:1])

    def update(self, variant: str, batch: Mapping[str, Any], maps: Tensor, image_scores: Tensor) -> None:
        """Adds a batch's image scores and, for the method itself (variant ""), its maps (B, H, W)."""
        scores = self._scores.setdefault(variant, {})
        for number, (image, score) in enumerate(zip(batch["id"].tolist(), image_scores.tolist(), strict=True)):
            row = self._rows.get(image)
            if row is None:
                continue
            scores[image] = score
            if variant == "" and self._saturated[row.key]:
                self._maps[image] = maps[number].float().cpu().numpy()

    def rows(self) -> pd.DataFrame:
        """Rows for metrics.csv: per category, and unweighted means over the categories."""
        self._group = Group()
        self._gather()
        rows = []
        for variant, scores in self._scores.items():
            values = {key: self._image_values(key, scores) for key in self._keys}
            if variant == "":
                for key in self._keys:
                    values[key] |= self._region_values(key)
            for key in self._keys:
                for metric, (value, n, reason) in values[key].items():
                    rows.append((variant, "category", self._datasets[key], key, metric, value, n, reason))
            for dataset in dict.fromkeys([*self._datasets.values(), ""]):
                keys = [key for key in self._keys if dataset in ("", self._datasets[key])]
                rows += [(variant, "mean", dataset, "", *row) for row in self._means([(k, values[k]) for k in keys])]
        columns = ["variant", "scope", "dataset", "category", "metric", "value", "n", "reason"]
        return pd.DataFrame(rows, columns=columns)

    def _gather(self) -> None:
        """The image scores of all processes. Maps stay where they are; an image of several counts in the first."""
        owned = self._group.gather_objects((self._scores, list(self._maps)))
        for scores, _ in owned:
            for variant, values in scores.items():
                self._scores.setdefault(variant, {}).update(values)
        earlier = {image for _, images in owned[: self._group.rank] for image in images}
        self._counted = set(self._maps) - earlier

    def _of(self, key: str, kind: str) -> list[int]:
        """Ids of a category's scored images that are good or of one anomaly type."""
        scored = self._scores[""]
        return [
            i for i, row in self._rows.items() if row.key == key and row.anomaly_type in ("good", kind) and i in scored
        ]

    def _image_values(self, key: str, scores: Mapping[int, float]) -> dict[str, tuple[float, int, str]]:
        values = {}
        for kind in TYPES:
            ids = self._of(key, kind)
            labels = np.array([self._rows[i].label == 1 for i in ids], dtype=bool)
            reason = "" if labels.any() else f"no {kind} anomaly"
            reason = reason or ("no good image" if labels.all() else "")
            value = math.nan if reason else float(rank(np.array([scores[i] for i in ids]), labels).auroc())
            values[f"image_auroc_{kind}"] = (value, len(ids), reason)
        values[f"image_auroc_{MEAN}"] = _average([values[f"image_auroc_{kind}"] for kind in TYPES])
        return values

    def _region_values(self, key: str) -> dict[str, tuple[float, int, str]]:
        values = {}
        for kind in TYPES:
            ids = self._of(key, kind)
            ids = [i for i in ids if self._rows[i].label == 0 or self._rows[i].mask_paths]
            curve, reason = None, f"no {CONFIG}"
            if self._saturated[key]:
                try:
                    curve, reason = spro_curve(partial(self._samples, ids), group=self._group), ""
                except ValueError as error:
                    if any(self._rows[i].mask_paths for i in ids):
                        raise
                    reason = str(error)
            for limit in LIMITS:
                value = math.nan if curve is None else curve.area(limit)
                values[f"{spro_name(limit)}_{kind}"] = (value, len(ids), reason)
        for limit in LIMITS:
            both = [values[f"{spro_name(limit)}_{kind}"] for kind in TYPES]
            values[f"{spro_name(limit)}_{MEAN}"] = _average(both)
        return values

    def _samples(self, ids: Sequence[int]) -> Iterator[Sample]:
        """This process's maps at the masks' resolution, one at a time; good images at that of the first mask."""
        good_size = None
        for i in ids:
            if self._rows[i].mask_paths:
                good_size = load_regions(self._rows[i].mask_paths)[0].mask.shape
                break
        for i in (i for i in ids if i in self._counted):
            regions = [
                Region(r.mask, saturation_area(int(r.mask.sum()), r.defect.saturation_threshold, r.defect.relative))
                for r in load_regions(self._rows[i].mask_paths)
            ]
            size = regions[0].pixels.shape if regions else good_size
            anomaly_map = torch.from_numpy(self._maps[i])[None, None]
            if size is not None and tuple(anomaly_map.shape[-2:]) != size:
                anomaly_map = F.interpolate(anomaly_map, size=size, mode="bilinear", align_corners=False)
            yield anomaly_map[0, 0].numpy(), regions

    @staticmethod
    def _means(values: Sequence[tuple[str, dict[str, tuple[float, int, str]]]]) -> list[tuple[str, float, int, str]]:
        rows = []
        for metric in dict.fromkeys(metric for _, own in values for metric in own):
            rows.append((metric, *mean_over_categories((key, own[metric][0]) for key, own in values)))
        return rows


def _average(values: Sequence[tuple[float, int, str]]) -> tuple[float, int, str]:
    reason = "; ".join(dict.fromkeys(reason for _, _, reason in values if reason))
    value = math.nan if reason else math.fsum(value for value, _, _ in values) / len(values)
    return value, sum(n for _, n, _ in values), reason
