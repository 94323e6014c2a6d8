"""Threshold metrics from counts.

Every metric here is a function of, for each distinct score u of an anomalous item: how many items are anomalous with
exactly this score, how many normal items score >= u and how many score > u. Between two such scores only normal items are
passed: recall and PRO stand still, precision and F1 fall. So nothing but the scores of the anomalous items is a
candidate threshold, and ties between normal and anomalous items are the difference of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BLOCK = 1 << 16


@dataclass
class Threshold:
    """A point of the precision-recall curve. key: the score or its ordered key; hits and predicted: counts >= key."""

    value: float = -1.0
    key: int | float = 0
    hits: int = 0
    predicted: int = 0


@dataclass
class Ranking:
    """Sums over the distinct anomalous scores of one ranking, fed from the highest score down.

    positives, negatives: numbers of anomalous and of normal items; regions: number of ground-truth regions (0 when
    there are none to score); fpr_limits: limits of the areas under the PRO curve.
    """

    positives: int
    negatives: int
    regions: int = 0
    fpr_limits: tuple[float, ...] = ()
    best_f1: Threshold = field(default_factory=Threshold)
    best_sum: Threshold = field(default_factory=Threshold)
    _hits: int = 0
    _pairs: int = 0
    _precision: float = 0.0
    _areas: dict[float, float] = field(default_factory=dict)

    def add(
        self,
        keys: np.ndarray,
        hits: np.ndarray,
        false_at: np.ndarray,
        false_above: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        """Add a stretch of distinct scores, all below those added before.

        keys: (U,) descending; hits: int (U,), anomalous items with this score; false_at, false_above: int (U,), normal
        items with score >= and > key; weights: float64 (U,), sum over the anomalous pixels with this score of their
        weight in the regions (1 / area for PRO).
        """
        for start in range(0, len(keys), BLOCK):
            part = slice(start, start + BLOCK)
            c, ge, gt = (np.asarray(a[part], dtype=np.int64) for a in (hits, false_at, false_above))
            tp = np.cumsum(c) + self._hits
            predicted = tp + ge
            self._pairs += int((c * (2 * self.negatives - ge - gt)).sum())
            precision = tp / predicted
            self._precision += float((c * precision).sum())
            self._keep_best(self.best_f1, 2 * tp / (self.positives + predicted), keys[part], tp, predicted)
            self._keep_best(self.best_sum, precision + tp / self.positives, keys[part], tp, predicted)
            if weights is not None:
                for limit in self.fpr_limits:
                    area = float((weights[part] * area_right_of(gt, ge, limit * self.negatives)).sum())
                    self._areas[limit] = self._areas.get(limit, 0.0) + area
            self._hits = int(tp[-1])

    @staticmethod
    def _keep_best(
        best: Threshold, values: np.ndarray, keys: np.ndarray, tp: np.ndarray, predicted: np.ndarray
    ) -> None:
        last = len(values) - 1 - int(np.argmax(values[::-1]))  # on ties the lowest threshold
        if values[last] >= best.value:
            best.value, best.key = float(values[last]), keys[last].item()
            best.hits, best.predicted = int(tp[last]), int(predicted[last])

    def auroc(self) -> float:
        """Fraction of (anomalous, normal) pairs in the right order, ties one half."""
        return self._pairs / (2 * self.positives * self.negatives)

    def average_precision(self) -> float:
        """Step-wise average precision."""
        return self._precision / self.positives

    def f1_max(self) -> float:
        """Highest F1."""
        return self.best_f1.value

    def aupro(self, limit: float) -> float:
        """Area under the PRO curve up to FPR `limit`, divided by the limit."""
        return self._areas.get(limit, 0.0) / (self.regions * limit * self.negatives)


def area_right_of(false_gt: np.ndarray, false_ge: np.ndarray, limit: float) -> np.ndarray:
    """Area, up to `limit` false positives, under a curve that climbs linearly by 1 from `false_gt` to `false_ge`."""
    width = false_ge - false_gt
    full = limit - (false_gt + false_ge) / 2
    inside = np.maximum(limit - false_gt, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cut = inside * inside / (2 * width)
    return np.where(false_ge <= limit, full, np.where(false_gt >= limit, 0.0, cut))


def rank(scores: np.ndarray, labels: np.ndarray) -> Ranking:
    """Ranking of a small set of scores (float (N,)) with labels (bool (N,), True = anomalous), by sorting."""
    normal = np.sort(scores[~labels])
    keys, hits = np.unique(scores[labels], return_counts=True)
    false_at = len(normal) - np.searchsorted(normal, keys, side="left")
    false_above = len(normal) - np.searchsorted(normal, keys, side="right")
    ranking = Ranking(positives=int(labels.sum()), negatives=len(normal))
    ranking.add(keys[::-1], hits[::-1], false_at[::-1], false_above[::-1])
    return ranking
