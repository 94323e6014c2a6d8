"""A slow, obviously correct reference and small problems full of ties."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from lightning_modules.metrics import AnomalyMetrics


@dataclass
class Problem:
    """A test set: maps float32 (N, H, W), masks bool (N, H, W), categories N names."""

    maps: np.ndarray
    masks: np.ndarray
    categories: list[str]

    @property
    def labels(self) -> np.ndarray:
        return self.masks.any(axis=(1, 2)).astype(int)

    @property
    def scores(self) -> np.ndarray:
        return self.maps.max(axis=(1, 2))

    def feed(self, metrics: AnomalyMetrics, order: np.ndarray | None = None, batch: int = 5) -> AnomalyMetrics:
        order = np.arange(len(self.maps)) if order is None else order
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            names = [self.categories[i] for i in part]
            metrics.update(self.maps[part], self.masks[part], self.scores[part], self.labels[part], names, part)
        return metrics

    def compute(self, **options: object):
        return self.feed(AnomalyMetrics(**options)).compute()


def make_problem(seed: int, images: int = 6, size: tuple[int, int] = (9, 11), levels: int = 0, categories: int = 1):
    """Random maps (0 levels = continuous scores, else that many distinct ones, negative and zero among them)."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(images, *size)).astype(np.float32)
    masks = np.zeros((images, *size), dtype=bool)
    for i in range(images):
        for _ in range(rng.integers(0, 4) if i else 2):  # the first image of a problem is anomalous
            y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
            masks[i, y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    maps[masks] += np.float32(0.8)
    if levels:
        maps = np.round(maps * levels / 4).astype(np.float32)
        maps[rng.random(maps.shape) < 0.2] *= np.float32(-0.0)  # zeros of both signs
    names = [f"c{i % categories}" for i in range(images)]
    return Problem(maps, masks, names)


@pytest.fixture(scope="session")
def problem():
    return make_problem


class Reference:
    """Metrics by going through every threshold, in float64 and by the definitions' words."""

    def __init__(self, maps: np.ndarray, masks: np.ndarray) -> None:
        self.maps, self.masks = maps.astype(np.float64), masks
        self.thresholds = np.unique(self.maps)[::-1]

    def aupro(self, limit: float, connectivity: int = 8) -> float:
        structure = np.ones((3, 3)) if connectivity == 8 else None
        regions = []
        for values, mask in zip(self.maps, self.masks, strict=True):
            labels, count = ndimage.label(mask, structure)
            regions += [values[labels == k] for k in range(1, count + 1)]
        normal = self.maps[~self.masks]
        curve = [(0.0, 0.0)]
        for t in self.thresholds:
            curve.append(((normal >= t).mean(), float(np.mean([(r >= t).mean() for r in regions]))))
        area = 0.0
        for (x0, y0), (x1, y1) in pairwise(curve):
            if x0 >= limit or x1 == x0:
                continue
            right = min(x1, limit)
            y_right = y0 + (y1 - y0) * (right - x0) / (x1 - x0)
            area += (right - x0) * (y0 + y_right) / 2
        return area / limit

    def at(self, t: float) -> tuple[float, float, float]:
        """Precision, recall, F1."""
        predicted = self.maps >= t
        hits = (predicted & self.masks).sum()
        return (
            hits / predicted.sum(),
            hits / self.masks.sum(),
            2 * hits / (predicted.sum() + self.masks.sum()),
        )

    def best_sum(self) -> float:
        """The lowest threshold with the highest precision + recall."""
        sums = [sum(self.at(t)[:2]) for t in self.thresholds]
        return float(min(t for t, s in zip(self.thresholds, sums, strict=True) if s >= max(sums) - 1e-12))

    def best_f1(self) -> float:
        values = [self.at(t)[2] for t in self.thresholds]
        return float(min(t for t, v in zip(self.thresholds, values, strict=True) if v >= max(values) - 1e-12))

    def overlap(self, t: float, kind: str = "dice", anomalous_only: bool = False) -> float:
        values = []
        for scores, mask in zip(self.maps, self.masks, strict=True):
            predicted = scores >= t
            both = (predicted & mask).sum()
            if not mask.any():
                if not anomalous_only:
                    values.append(0.0 if predicted.any() else 1.0)
            elif kind == "dice":
                values.append(2 * both / (predicted.sum() + mask.sum()))
            else:
                values.append(both / (predicted | mask).sum())
        return float(np.mean(values))

    def all(self) -> dict[str, float]:
        t, f = self.best_sum(), self.best_f1()
        precision, recall, _ = self.at(t)
        values = {
            "pixel_f1max": self.at(f)[2],
            "pixel_aupro": self.aupro(0.3),
            "dsc_threshold": t,
            "dsc_precision": precision,
            "dsc_recall": recall,
        }
        for name, kind in (("dsc", "dice"), ("iou", "iou")):
            values |= {
                name: self.overlap(t, kind),
                f"{name}_floor_nothing": self.overlap(np.inf, kind),
                f"{name}_floor_all": self.overlap(-np.inf, kind),
                f"{name}_f1max": self.overlap(f, kind),
                f"{name}_anomalous": self.overlap(t, kind, anomalous_only=True),
            }
        return values


@pytest.fixture(scope="session")
def reference():
    return Reference
