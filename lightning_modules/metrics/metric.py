"""`AnomalyMetrics`: the numbers of a test set, exact, per category, averaged and pooled, on one or many processes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torchmetrics import Metric

from .definitions import (
    IMAGE_METRICS,
    NOT_AVERAGED,
    OVERLAP_METRICS,
    VERSION,
    aupro_name,
    describe,
    select_metrics,
)
from .counting import key_to_float
from .evaluation import PixelEvaluation, PixelResult, default_threads
from .ranking import Ranking, rank
from .regions import RegionCache
from .store import Category, MemoryMaps
from .sync import Group

COLUMNS = ("variant", "scope", "dataset", "category", "metric", "value", "n", "reason")
Values = dict[str, tuple[float, int, str]]  # metric -> (value, n, reason)


class MetricResult:
    """Numbers and what they mean.

    table: DataFrame with the columns variant, scope (category | mean | pooled), dataset, category, metric, value
    (float64, fraction in [0, 1] except thresholds; NaN = undefined), n (images, for means categories averaged), reason
    (why a value is undefined, or which categories a mean misses). dataset "" = all datasets together.
    version, definitions: of the metrics in the table.
    """

    # A plain class: torchmetrics refuses frozen dataclasses as results and copies the others field by field.
    def __init__(self, table: pd.DataFrame, version: str, definitions: dict[str, str]) -> None:
        self.table = table
        self.version = version
        self.definitions = definitions

    def value(self, metric: str, category: str = "", scope: str | None = None, dataset: str | None = None) -> float:
        """One number: of a category, else of `scope` ("mean" or "pooled") over all datasets or over `dataset`.

        Raises KeyError naming what the table holds if there is no such row.
        """
        scope = scope or ("category" if category else "mean")
        t = self.table
        rows = t[(t.metric == metric) & (t.scope == scope) & (t.category == category)]
        if scope != "category":
            rows = rows[rows.dataset == (dataset or "")]
        if len(rows) != 1:
            raise KeyError(
                f"{len(rows)} rows for metric {metric!r}, scope {scope!r}, category {category!r}, dataset {dataset!r}; "
                f"metrics: {sorted(set(t.metric))}, scopes: {sorted(set(t.scope))}, categories: {sorted(set(t.category))}"
            )
        return float(rows.value.iloc[0])


class AnomalyMetrics(Metric):
    """Accumulates anomaly maps, masks, image scores and labels, in batches of any size and order.

    categories: category -> dataset name, or a sequence of categories (dataset ""), or None to take them as they come;
        a sample of a category that is not listed is an error.
    metrics: names to compute (None = all, see `definitions.METRICS`). Without a pixel metric no map is kept.
    pooled: also rank all categories together.
    fpr_limits: limits of AUPRO; 0.3 is named `pixel_aupro`, others `pixel_aupro_<limit>`.
    connectivity: 8 or 4, of the regions of AUPRO. regions: a `RegionCache` to share between metrics of one test set.
    variant: text for the variant column. threads: worker threads of `compute` (None = cores, at most 4).

    Scores are any finite numbers: they are ranked, never squashed. Call `update` for each batch, `compute` at the end,
    `reset` before the next evaluation. Processes exchange counts in `compute`; samples with an id seen before, in any
    process (padded samplers), count once.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        categories: Mapping[str, str] | Sequence[str] | None = None,
        metrics: Sequence[str] | None = None,
        pooled: bool = True,
        fpr_limits: Sequence[float] = (0.3,),
        connectivity: int = 8,
        regions: RegionCache | None = None,
        variant: str = "",
        threads: int | None = None,
    ) -> None:
        super().__init__(sync_on_compute=False, dist_sync_on_step=False)
        self.fpr_limits = tuple(float(limit) for limit in fpr_limits)
        for limit in self.fpr_limits:
            if not 0 < limit <= 1:
                raise ValueError(f"an FPR limit lies in (0, 1], found {limit}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, found {threads}")
        self.metrics = select_metrics(metrics, self.fpr_limits)
        self.pooled = pooled
        self.variant = variant
        self.threads = threads or default_threads()
        if regions is not None and regions.connectivity != connectivity:
            raise ValueError(f"the region cache is {regions.connectivity}-connected, the metric {connectivity}-connected")
        self.regions = regions if regions is not None else RegionCache(connectivity)
        if categories is None:
            self.datasets: dict[str, str] | None = None
        elif isinstance(categories, Mapping):
            self.datasets = dict(categories)
        elif isinstance(categories, str):
            raise TypeError(f"categories is a mapping or a sequence of names, found the text {categories!r}")
        else:
            self.datasets = dict.fromkeys(categories, "")
        self.keeps_maps = any(name not in IMAGE_METRICS for name in self.metrics)
        self._clear()

    def _clear(self) -> None:
        self._categories: dict[str, Category] = {}
        self._seen: dict[int, tuple[str, bool]] = {}
        self._numbered = False

    def reset(self) -> None:
        """Forget all samples (not the regions: the cache stays)."""
        super().reset()
        self._clear()

    def forward(self, *args: object, **kwargs: object) -> None:
        """Same as `update`: the numbers of a single batch mean nothing."""
        self.update(*args, **kwargs)

    @property
    def version(self) -> str:
        """Version of the definitions."""
        return VERSION

    @property
    def definitions(self) -> dict[str, str]:
        """What each selected metric means."""
        return describe(self.metrics, self.fpr_limits, self.regions.connectivity)

    def update(
        self,
        maps: torch.Tensor | np.ndarray | None,
        masks: torch.Tensor | np.ndarray | None,
        image_scores: torch.Tensor | np.ndarray | Sequence[float],
        labels: torch.Tensor | np.ndarray | Sequence[int],
        categories: Sequence[str],
        ids: torch.Tensor | np.ndarray | Sequence[int] | None = None,
        has_mask: torch.Tensor | np.ndarray | Sequence[bool] | None = None,
    ) -> None:
        """Add a batch.

        maps: float32 (B, H, W), higher = more anomalous (float64 is rounded to float32); masks: bool (B, H, W), integers
        are anomalous where not zero; both may be None if only image metrics are selected. image_scores: (B,);
        labels: (B,), 0 normal, 1 anomalous; categories: B names; ids: (B,) integers, unique per sample over all
        processes (None numbers the samples, for one process only); has_mask: bool (B,), False for an image whose mask is
        not known: it counts for image metrics only.

        Raises ValueError or TypeError, naming the sample, for scores that are not finite, masks that are not bool or
        integer, sizes that differ, labels other than 0 and 1, a normal image with anomalous pixels, unknown categories.
        """
        names = [str(name) for name in categories]
        B = len(names)
        labels_ = _vector("labels", labels, B)
        scores = _vector("image_scores", image_scores, B).astype(np.float64)
        known = np.ones(B, dtype=bool) if has_mask is None else _vector("has_mask", has_mask, B).astype(bool)
        if ids is None:
            self._numbered = True
            numbers = np.arange(len(self._seen), len(self._seen) + B)
        else:
            numbers = _vector("ids", ids, B)
            if not np.issubdtype(numbers.dtype, np.integer):
                raise TypeError(f"ids must be integers, found {numbers.dtype}")

        def sample(b: int) -> str:
            return f"sample {b} of the batch (id {numbers[b]}, category {names[b]!r})"

        for b, name in enumerate(names):
            if self.datasets is not None and name not in self.datasets:
                near = difflib.get_close_matches(name, self.datasets, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{sample(b)}: unknown category{hint} Known: {', '.join(self.datasets)}")
            if labels_[b] not in (0, 1):
                raise ValueError(f"{sample(b)}: label {labels_[b]!r}, allowed are 0 (normal) and 1 (anomalous)")
            if not math.isfinite(scores[b]):
                raise ValueError(f"{sample(b)}: image score {scores[b]} is not finite")
        labels_ = labels_.astype(bool)
        first = []
        for b in range(B):
            key = int(numbers[b])
            seen = self._seen.get(key)
            if seen is None:
                first.append(b)
            elif seen != (names[b], bool(labels_[b])):
                raise ValueError(f"{sample(b)} with label {int(labels_[b])}: this id was given before for {seen}")
            self._seen[key] = (names[b], bool(labels_[b]))
        if self.keeps_maps:
            values, truth = _maps_and_masks(maps, masks, B, known, sample)
        for name in dict.fromkeys(names[b] for b in first):
            chosen = [b for b in first if names[b] == name]
            category = self._categories.get(name)
            if category is None:
                dataset = self.datasets[name] if self.datasets is not None else ""
                category = self._categories[name] = Category(name, dataset, MemoryMaps())
            category.ids.extend(int(numbers[b]) for b in chosen)
            category.labels.extend(bool(labels_[b]) for b in chosen)
            category.scores.extend(float(scores[b]) for b in chosen)
            scored = [b for b in chosen if known[b]] if self.keeps_maps else []
            row = len(category.regions)
            category.rows.extend(row + scored.index(b) if b in scored else -1 for b in chosen)
            if scored:
                found = self.regions.get(numbers[scored] if ids is not None else None, truth[scored])
                for b, regions in zip(scored, found, strict=True):
                    if not labels_[b] and len(regions.starts):
                        raise ValueError(f"{sample(b)}: label 0 (normal), but its mask has {regions.pixels} anomalous pixels")
                category.maps.append(values[scored])
                category.regions.extend(found)
                rows = np.arange(row, row + len(scored))
                category.highest.extend(int(keys.max()) for keys in category.maps.read(rows))

    def compute(self) -> MetricResult:
        """All numbers of the samples so far. On several processes: call it on all of them; all get the same result."""
        group = Group()
        if group.size > 1:
            self._agree(group)
        names = list(self.datasets) if self.datasets is not None else list(self._categories)
        scopes = self._evaluate(names, group)
        rows = []
        for scope, dataset, category, values in scopes:
            for metric in self.metrics:
                if metric in values:
                    rows.append((self.variant, scope, dataset, category, metric, *values[metric]))
        return MetricResult(pd.DataFrame(rows, columns=list(COLUMNS)), self.version, self.definitions)

    def _agree(self, group: Group) -> None:
        """Drop samples that a lower rank has too, and learn the categories of the other processes."""
        if any(group.gather_objects(self._numbered)):
            raise ValueError("with several processes `update` needs ids, otherwise samples cannot be told apart")
        if self.datasets is None:
            for names in group.gather_objects(list(self._categories)):
                for name in names:
                    self._categories.setdefault(name, Category(name, "", MemoryMaps()))
            order = sorted(self._categories)
            self._categories = {name: self._categories[name] for name in order}
        owned = group.gather(np.array(list(self._seen), dtype=np.int64))
        earlier = set().union(*(part.tolist() for part in owned[: group.rank]))
        for category in self._categories.values():
            category.dropped = {i for i, number in enumerate(category.ids) if number in earlier}

    def _evaluate(self, names: list[str], group: Group) -> list[tuple[str, str, str, Values]]:
        empty = {n: Category(n, self.datasets[n] if self.datasets else "", MemoryMaps()) for n in names}
        categories = [self._categories.get(name, empty[name]) for name in names]
        images = [self._image_rows(category, group) for category in categories]
        present = [(c, s, t) for c, (s, t) in zip(categories, images, strict=True) if len(s)]
        categories = [c for c, _, _ in present]
        datasets = list(dict.fromkeys(c.dataset for c in categories))

        values: dict[tuple[str, ...], Values] = {}
        for category, scores, labels in present:
            values["category", category.dataset, category.name] = self._image_values(scores, labels)
        parts = [(d, [p for p in present if p[0].dataset == d]) for d in datasets if d or len(datasets) > 1]
        if len(datasets) > 1 or not parts:
            parts.append(("", present))
        if self.pooled:
            for dataset, part in parts:
                scores, labels = (np.concatenate([p[k] for p in part] or [np.zeros(0)]) for k in (1, 2))
                values["pooled", dataset, ""] = self._image_values(scores, labels.astype(bool))
        if self.keeps_maps:
            for dataset, part in parts:
                if dataset == "" and len(datasets) > 1 and not self.pooled:
                    continue
                evaluation = PixelEvaluation([p[0] for p in part], self.fpr_limits, group, self.threads)
                overlaps = any(name in OVERLAP_METRICS for name in self.metrics)
                results, pooled = evaluation.run(self.pooled, overlaps)
                for (category, _, labels), result in zip(part, results, strict=True):
                    values["category", category.dataset, category.name] |= self._pixel_values(result, labels)
                if self.pooled:
                    labels = np.concatenate([p[2] for p in part] or [np.zeros(0, dtype=bool)])
                    values["pooled", dataset, ""] |= self._pixel_values(pooled, labels)
        scopes = [(*key, value) for key, value in values.items() if key[0] == "category"]
        for dataset in dict.fromkeys([*(d for d, _ in parts), ""]):
            scopes.append(("mean", dataset, "", self._mean([s for s in scopes if s[0] == "category"], dataset)))
        for dataset in dict.fromkeys([*(d for d, _ in parts), ""]):
            if self.pooled:
                pooled_values = values["pooled", dataset if ("pooled", dataset, "") in values else parts[0][0], ""]
                scopes.append(("pooled", dataset, "", pooled_values))
        return scopes

    @staticmethod
    def _image_rows(category: Category, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """(scores float64 (N,), labels bool (N,)) of all processes, ordered by sample id."""
        kept = [i for i in range(len(category.ids)) if i not in category.dropped]
        ids, scores, labels = (
            np.concatenate(group.gather(np.array([column[i] for i in kept], dtype=dtype)))
            for column, dtype in ((category.ids, np.int64), (category.scores, np.float64), (category.labels, np.int8))
        )
        order = np.argsort(ids)
        return scores[order], labels[order].astype(bool)

    def _image_values(self, scores: np.ndarray, labels: np.ndarray) -> Values:
        reason = ""
        if not labels.any():
            reason = "no anomalous image"
        ranking = rank(scores, labels)
        no_normal = reason or ("" if ranking.negatives else "no normal image")
        return {
            "image_auroc": _value(ranking.auroc, len(scores), no_normal),
            "image_ap": _value(ranking.average_precision, len(scores), reason),
            "image_f1max": _value(ranking.f1_max, len(scores), reason),
        }

    def _pixel_values(self, result: PixelResult, labels: np.ndarray) -> Values:
        ranking, n, m = result.ranking, result.images, result.anomalous
        reason = ""
        if not ranking.positives:
            if not labels.any():
                reason = "no anomalous image"
            elif n == 0 or (labels.sum() and n <= (~labels).sum()):
                reason = "no masks for the anomalous images"
            else:
                reason = "no anomalous pixel in any mask"
        no_normal = reason or ("" if ranking.negatives else "no normal pixel")
        values: Values = {
            "pixel_auroc": _value(ranking.auroc, n, no_normal),
            "pixel_ap": _value(ranking.average_precision, n, reason),
            "pixel_f1max": _value(ranking.f1_max, n, reason),
        }
        for limit in self.fpr_limits:
            values[aupro_name(limit)] = _value(lambda limit=limit: ranking.aupro(limit), n, no_normal)
        best = ranking.best_sum
        at_sum, at_f1, at_all = result.at_sum, result.at_f1, result.at_all
        texts = {
            "dsc": lambda: at_sum.dice / n,
            "dsc_threshold": lambda: key_to_float(best.key),
            "dsc_precision": lambda: best.hits / best.predicted,
            "dsc_recall": lambda: best.hits / ranking.positives,
            "dsc_floor_nothing": lambda: (n - m) / n,
            "dsc_floor_all": lambda: at_all.dice / n,
            "dsc_f1max": lambda: at_f1.dice / n,
            "iou": lambda: at_sum.iou / n,
            "iou_floor_nothing": lambda: (n - m) / n,
            "iou_floor_all": lambda: at_all.iou / n,
            "iou_f1max": lambda: at_f1.iou / n,
        }
        for name, formula in texts.items():
            values[name] = _value(formula, n, reason)
        values["dsc_anomalous"] = _value(lambda: at_sum.dice_anomalous / m, m, reason)
        values["iou_anomalous"] = _value(lambda: at_sum.iou_anomalous / m, m, reason)
        return values

    def _mean(self, scopes: list[tuple[str, str, str, Values]], dataset: str) -> Values:
        chosen = [(category, values) for _, owner, category, values in scopes if dataset in ("", owner)]
        means: Values = {}
        for metric in self.metrics:
            if metric in NOT_AVERAGED:
                continue
            numbers = {category: values[metric][0] for category, values in chosen}
            defined = [v for v in numbers.values() if not math.isnan(v)]
            missing = [category for category, v in numbers.items() if math.isnan(v)]
            reason = f"undefined in {', '.join(missing)}" if missing else ("" if numbers else "no sample")
            means[metric] = (math.fsum(defined) / len(defined) if defined else math.nan, len(defined), reason)
        return means


def _value(formula: object, n: int, reason: str) -> tuple[float, int, str]:
    return (math.nan, n, reason) if reason else (float(formula()), n, "")


def _vector(name: str, values: object, length: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}, but there are {length} categories in the batch")
    return array


def _maps_and_masks(maps: object, masks: object, B: int, known: np.ndarray, sample: object) -> tuple:
    """Checked float32 (B, H, W) maps and bool (B, H, W) masks."""
    if maps is None or masks is None:
        raise ValueError("maps and masks are needed for the selected pixel metrics, found None")
    arrays = []
    for name, value in (("maps", maps), ("masks", masks)):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.ndim == 4 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 3 or len(array) != B:
            raise ValueError(f"{name} has shape {array.shape}, expected ({B}, H, W) for {B} samples")
        arrays.append(array)
    values, truth = arrays
    if values.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"maps are {values.dtype}, expected float32: half precision moves pixel AP by up to 1e-3. "
            "Convert the feature distances with .float() before they are upsampled"
        )
    if B and values.shape != truth.shape:
        raise ValueError(f"{sample(0)}: its map is {values.shape[1:]}, its mask {truth.shape[1:]}; resize the masks")
    if not np.isfinite(values.sum(dtype=np.float64)):
        for b in range(B):
            bad = ~np.isfinite(values[b])
            if bad.any():
                y, x = np.argwhere(bad)[0]
                raise ValueError(
                    f"{sample(b)}: {bad.sum()} of its map's scores are not finite, first {values[b, y, x]} at ({y}, {x})"
                )
    if truth.dtype != np.bool_:
        if not np.issubdtype(truth.dtype, np.integer):
            raise TypeError(
                f"{sample(0)}: masks are {truth.dtype}, expected bool (or integers, anomalous where not zero). "
                "Binarise them by the dataset's rule before resizing"
            )
        truth = truth != 0
    return values.astype(np.float32, copy=False), truth
