"""`AnomalyMetrics`: the numbers of a test set, exact, per category, averaged and pooled, on one or many processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch

from .definitions import (
    IMAGE_METRICS,
    NOT_AVERAGED,
    OVERLAP_METRICS,
    VERSION,
    aupro_name,
    describe,
    did_you_mean,
    select_metrics,
)
from .keys import float_to_key, key_to_float
from .means import mean_over_categories
from .pixels import PixelResult, evaluate_pixels
from .ranking import rank
from .regions import RegionCache
from .segmentation import SEGMENTATION_DEFINITIONS, SEGMENTATION_METRICS, segmentation_f1
from .store import Category, Maps
from .sync import Group

Vector: TypeAlias = torch.Tensor | np.ndarray | Sequence
Stack: TypeAlias = torch.Tensor | np.ndarray
COLUMNS = ("variant", "scope", "dataset", "category", "metric", "value", "n", "reason")
Values = dict[str, tuple[float, int, str]]  # metric -> (value, n, reason)


class MetricResult:
    """Numbers and what they mean.

    table: DataFrame with the columns variant, scope (category | mean | pooled), dataset, category, metric, value
    (float64, fraction in [0, 1] except thresholds; NaN = undefined), n (images, for means categories averaged), reason
    (why a value is undefined, or which categories a mean misses). dataset "" = all datasets together.
    version, definitions: of the metrics in the table.
    """

    def __init__(self, table: pd.DataFrame, version: str, definitions: dict[str, str]) -> None:
        self.table = table
        self.version = version
        self.definitions = definitions

    def value(self, metric: str, category: str = "", scope: str | None = None, dataset: str = "") -> float:
        """One number: of a category, else of `scope` ("mean", the default, or "pooled") over `dataset` ("" = all).

        Raises KeyError naming what the table holds if there is no such row.
        """
        scope = scope or ("category" if category else "mean")
        t = self.table
        rows = t[(t.metric == metric) & (t.scope == scope) & (t.category == category)]
        if scope != "category" or dataset:
            rows = rows[rows.dataset == dataset]
        if len(rows) != 1:
            held = {column: sorted(set(t[column])) for column in ("metric", "scope", "category", "dataset")}
            asked = {"metric": metric, "scope": scope, "category": category, "dataset": dataset}
            raise KeyError(f"{len(rows)} rows for {asked}; the table holds {held}")
        return float(rows.value.iloc[0])

    @staticmethod
    def concatenate(results: Sequence[MetricResult]) -> MetricResult:
        """One result with the rows of several, for example of the variants of one run. Versions must agree."""
        versions = {result.version for result in results}
        if len(versions) != 1:
            raise ValueError(f"results of different metric versions cannot be joined: {sorted(versions)}")
        definitions = {name: text for result in results for name, text in result.definitions.items()}
        return MetricResult(pd.concat([r.table for r in results], ignore_index=True), versions.pop(), definitions)


class AnomalyMetrics:
    """Accumulates anomaly maps, masks, image scores and labels, in batches of any size and order.

    This is a plain object, not a `torchmetrics.Metric`: its result is a table with reasons, and processes exchange
    counts in `compute`, never states. `copy.deepcopy` and `pickle` copy it with its samples (not with maps on disk).

    categories: category -> dataset name, or a sequence of categories (dataset ""), or None to take them as they come
        (sorted by name); a sample of a category that is not listed is an error.
    metrics: names to compute (None = all, see `definitions.METRICS`). Without a pixel metric no map is kept.
    pooled: also rank all categories together.
    fpr_limits: limits of AUPRO; 0.3 is named `pixel_aupro`, others `pixel_aupro_<limit>`.
    connectivity: 8 or 4, of the regions of AUPRO. regions: a `RegionCache` to share between metrics of one test set.
    variant: text for the variant column. threads: worker threads of `compute` (None = one; each
        needs memory of its own).
    maps_directory: keep the maps in temporary files of this directory instead of memory, for sets whose maps do not
        fit; about 1 kB per image stays in memory, the numbers are the same.
    expected: category -> how many images it has. In one process and without `pooled`, a category is then evaluated as
        soon as it has them, and its maps are let go: at most the maps of the categories that are not complete are kept.

    Scores are any finite numbers: they are ranked, never squashed. Call `update` for each batch, `compute` at the end,
    `reset` before the next evaluation. Processes exchange counts in `compute`; samples with an id seen before, in any
    process (padded samplers), count once.
    """

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
        maps_directory: str | Path | None = None,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        self.fpr_limits = tuple(float(limit) for limit in fpr_limits)
        for limit in self.fpr_limits:
            if not 0 < limit <= 1:
                raise ValueError(f"an FPR limit lies in (0, 1], found {limit}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, found {threads}")
        if maps_directory is not None and not Path(maps_directory).is_dir():
            raise ValueError(f"maps_directory {str(maps_directory)!r} is not a directory")
        self.maps_directory = maps_directory
        self.metrics = select_metrics(metrics, self.fpr_limits)
        self.pooled = pooled
        self.expected = {} if pooled or expected is None else dict(expected)
        self.variant = variant
        self.threads = threads or 1
        if regions is not None and regions.connectivity != connectivity:
            raise ValueError(f"the region cache uses connectivity {regions.connectivity}, the metric {connectivity}")
        self.regions = regions if regions is not None else RegionCache(connectivity)
        if categories is None:
            self.datasets: dict[str, str] | None = None
        elif isinstance(categories, Mapping):
            self.datasets = dict(categories)
        elif isinstance(categories, str):
            raise TypeError(f"categories is a mapping or a sequence of names, found the text {categories!r}")
        else:
            self.datasets = dict.fromkeys(categories, "")
        if self.datasets and not all(self.datasets.values()) and any(self.datasets.values()):
            unnamed = [name for name, dataset in self.datasets.items() if not dataset]
            raise ValueError(f"either all categories name their dataset or none; without one: {', '.join(unnamed)}")
        self.keeps_maps = any(name not in IMAGE_METRICS for name in self.metrics)
        self._clear()

    def _clear(self) -> None:
        self._categories: dict[str, Category] = {}
        self._seen: dict[int, tuple[str, bool]] = {}  # sample id -> (category, label)
        self._evaluated: dict[str, PixelResult] = {}
        self._numbered = False

    def reset(self) -> None:
        """Forget all samples (not the regions: the cache stays)."""
        self._clear()

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
        maps: Stack | None,
        masks: Stack | None,
        image_scores: Vector,
        labels: Vector,
        categories: Sequence[str],
        ids: Vector | None = None,
        has_mask: Vector | None = None,
    ) -> None:
        """Add a batch.

        maps: float32 (B, H, W), higher = more anomalous (float64 is rounded to float32); masks: bool (B, H, W), or
        integers, anomalous where not zero; both may be None if only image metrics are selected. (B, 1, H, W) is taken
        as well. image_scores: (B,); labels: (B,), 0 normal, 1 anomalous; categories: B names; ids: (B,) integers,
        unique per sample over all processes (None numbers the samples, for one process only); has_mask: bool (B,),
        False for an image whose mask is not known: it counts for image metrics only.

        Raises ValueError or TypeError, naming the sample, for scores that are not finite, masks that are not bool or
        integer, sizes that differ, labels other than 0 and 1, a normal image with anomalous pixels, unknown categories,
        more images than expected and an id that was used for another sample. A batch that raises is not added.
        """
        names = [str(name) for name in categories]
        B = len(names)
        if ids is None:
            numbers = np.arange(len(self._seen), len(self._seen) + B)
        else:
            numbers = _vector("ids", ids, B)
            if not np.issubdtype(numbers.dtype, np.integer):
                raise TypeError(f"ids must be integers, found {numbers.dtype}")

        def sample(b: int) -> str:
            return f"sample {b} of the batch (id {numbers[b]}, category {names[b]!r})"

        truth = _vector("labels", labels, B)
        scores = _vector("image_scores", image_scores, B).astype(np.float64)
        known = np.ones(B, dtype=bool) if has_mask is None else _vector("has_mask", has_mask, B).astype(bool)
        self._check_samples(names, truth, scores, sample)
        first = self._first_seen(names, truth, numbers, sample)
        for b in first:
            if names[b] in self._evaluated:
                count = self.expected[names[b]]
                raise ValueError(
                    f"{sample(b)}: the {count} images that this category was expected to have are complete"
                )
        if self.keeps_maps:
            maps = _stack("maps", maps, B)
            masks = _check_masks(masks, maps, sample)
            keys = _to_keys(maps, sample)
            scored = [b for b in first if known[b]]
            found = self.regions.get(numbers[scored] if ids is not None else None, masks[scored])
            regions = dict(zip(scored, found, strict=True))
            for b, r in regions.items():
                if not truth[b] and len(r.starts):
                    raise ValueError(f"{sample(b)}: label 0 (normal), but {r.pixels} pixels of its mask are anomalous")

        self._numbered |= ids is None
        for name in dict.fromkeys(names[b] for b in first):
            category = self._categories.get(name)
            if category is None:
                category = self._categories[name] = self._new_category(name)
            for b in (b for b in first if names[b] == name):
                self._seen[int(numbers[b])] = (name, bool(truth[b]))
                category.ids.append(int(numbers[b]))
                category.labels.append(bool(truth[b]))
                category.scores.append(float(scores[b]))
                category.rows.append(len(category.maps) if self.keeps_maps and known[b] else -1)
                if category.rows[-1] >= 0:
                    category.maps.append(keys[b], regions[b])
            if self.keeps_maps and len(category.ids) == self.expected.get(name) and Group().size == 1:
                self._evaluated[name] = self._pixel_results([category], Group())[0][0]
                category.maps = Maps()

    def _check_samples(
        self, names: list[str], labels: np.ndarray, scores: np.ndarray, sample: Callable[[int], str]
    ) -> None:
        for b, name in enumerate(names):
            if self.datasets is not None and name not in self.datasets:
                hint = did_you_mean(name, self.datasets)
                raise ValueError(f"{sample(b)}: unknown category{hint} Known: {', '.join(self.datasets)}")
            if labels[b] not in (0, 1):
                raise ValueError(f"{sample(b)}: label {labels[b]}, allowed are 0 (normal) and 1 (anomalous)")
            if not math.isfinite(scores[b]):
                raise ValueError(f"{sample(b)}: its image score {scores[b]} is not finite")

    def _first_seen(
        self, names: list[str], labels: np.ndarray, ids: np.ndarray, sample: Callable[[int], str]
    ) -> list[int]:
        """Positions in the batch of the samples whose id is new."""
        new: dict[int, tuple[int, tuple[str, bool]]] = {}
        for b, number in enumerate(ids.tolist()):
            what = (names[b], bool(labels[b]))
            before = self._seen.get(number) or (new[number][1] if number in new else None)
            if before is None:
                new[number] = (b, what)
            elif before != what:
                raise ValueError(
                    f"{sample(b)} with label {int(labels[b])}: this id was given before, to a sample of category "
                    f"{before[0]!r} with label {int(before[1])}. Ids must be unique over the whole test set"
                )
        return [b for b, _ in new.values()]

    def _new_category(self, name: str) -> Category:
        dataset = self.datasets[name] if self.datasets is not None else ""
        return Category(name, dataset, Maps(self.maps_directory))

    def compute(self) -> MetricResult:
        """All numbers of the samples so far. On several processes: call it on all of them; all get the same result."""
        group = Group()
        if group.size > 1:
            self._agree(group)
        names = list(self.datasets) if self.datasets is not None else sorted(self._categories)
        categories = [self._categories.get(name) or self._new_category(name) for name in names]
        scopes = self._evaluate(categories, group)
        rows = [
            (self.variant, *scope, metric, *values[metric])
            for scope, values in scopes.items()
            for metric in self.metrics
            if metric in values
        ]
        table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": np.float64, "n": np.int64})
        return MetricResult(table, self.version, self.definitions)

    def segmentation(self, thresholds: Mapping[str, float]) -> MetricResult:
        """SegF1 in both readings (`segmentation.SEGMENTATION_METRICS`), after `compute`; see `segmentation`.

        thresholds: category -> its threshold; a category without one has no value and a reason.
        Raises ValueError if no map is kept, as without a pixel metric or with `expected`.
        """
        if not self.keeps_maps or self._evaluated:
            raise ValueError("SegF1 needs all maps: select a pixel metric, and leave `expected` out")
        names = list(self.datasets) if self.datasets is not None else sorted(self._categories)
        found = [self._categories[name] for name in names if name in self._categories]
        group = Group()
        scored = segmentation_f1([c for c in found if c.name in thresholds], thresholds, group)
        values = dict(zip([c.name for c in found if c.name in thresholds], scored, strict=True))
        rows, single = [], {}
        for category in found:
            one = values.get(category.name)
            reason, numbers = "", (math.nan,) * 3
            if one is None:
                reason = "no normal image for a threshold"
            elif math.isnan(one.pooled):
                reason = "no anomalous pixel in the masks"
            else:
                numbers = (one.pooled, one.images, thresholds[category.name])
            single[category.name] = dict(zip(SEGMENTATION_METRICS, numbers, strict=True))
            n = 0 if one is None else one.n
            for metric, value in single[category.name].items():
                rows.append((self.variant, "category", category.dataset, category.name, metric, value, n, reason))
        for dataset in dict.fromkeys([*(c.dataset for c in found), ""]):
            part = [c.name for c in found if dataset in ("", c.dataset)]
            for metric in SEGMENTATION_METRICS:
                if metric not in NOT_AVERAGED:
                    mean = mean_over_categories((name, single[name][metric]) for name in part)
                    rows.append((self.variant, "mean", dataset, "", metric, *mean))
        table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": np.float64, "n": np.int64})
        return MetricResult(table, self.version, SEGMENTATION_DEFINITIONS)

    def _agree(self, group: Group) -> None:
        """Drop samples that a lower rank has too, and learn the categories of the other processes."""
        if any(group.gather_objects(self._numbered)):
            raise ValueError("with several processes `update` needs ids; without them, samples cannot be told apart")
        if self.datasets is None:
            everywhere = {name for names in group.gather_objects(list(self._categories)) for name in names}
            for name in everywhere:
                self._categories.setdefault(name, self._new_category(name))
        owned = group.gather(np.array(list(self._seen), dtype=np.int64))
        earlier = set().union(*(part.tolist() for part in owned[: group.rank]))
        for category in self._categories.values():
            category.dropped = {i for i, number in enumerate(category.ids) if number in earlier}

    def _evaluate(self, categories: list[Category], group: Group) -> dict[tuple[str, str, str], Values]:
        """(scope, dataset, category) -> values, in the order of the table. Categories without a sample are left out."""
        images = self._images(categories, group)
        present = [i for i, (scores, _) in enumerate(images) if len(scores)]
        datasets = list(dict.fromkeys(categories[i].dataset for i in present))
        parts = {d: [i for i in present if categories[i].dataset == d] for d in datasets}
        parts[""] = present

        single: dict[int, Values] = {i: self._image_values(*images[i]) for i in present}
        pooled: dict[str, Values] = {}
        for dataset, part in parts.items():
            if dataset == "" and len(datasets) == 1 and datasets[0]:  # the same samples as those of the only dataset
                pooled[""] = pooled[datasets[0]]
                continue
            scores, labels = (np.concatenate([images[i][k] for i in part] or [np.zeros(0)]) for k in (0, 1))
            labels = labels.astype(bool)
            pooled[dataset] = self._image_values(scores, labels)
            if self.keeps_maps and (dataset or self.pooled or datasets == [""]):
                left = [i for i in part if categories[i].name not in self._evaluated]
                results, whole = self._pixel_results([categories[i] for i in left], group)
                found = self._evaluated | {categories[i].name: r for i, r in zip(left, results, strict=True)}
                for i in part:
                    single[i] |= self._pixel_values(found[categories[i].name], images[i][1])
                if self.pooled:
                    pooled[dataset] |= self._pixel_values(whole, labels)

        scopes = {("category", categories[i].dataset, categories[i].name): single[i] for i in present}
        for dataset, part in parts.items():
            scopes["mean", dataset, ""] = self._mean({categories[i].name: single[i] for i in part})
        if self.pooled:
            for dataset in parts:
                scopes["pooled", dataset, ""] = pooled[dataset]
        return scopes

    def _pixel_results(self, categories: list[Category], group: Group) -> tuple[list[PixelResult], PixelResult]:
        overlaps = any(name in OVERLAP_METRICS for name in self.metrics)
        return evaluate_pixels(categories, self.fpr_limits, group, self.pooled, overlaps, self.threads)

    @staticmethod
    def _images(categories: list[Category], group: Group) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per category (scores float64 (N,), labels bool (N,)) of all processes, ordered by sample id."""
        kept = [(n, i) for n, c in enumerate(categories) for i in range(len(c.ids)) if i not in c.dropped]
        whole = np.array([(n, categories[n].ids[i], categories[n].labels[i]) for n, i in kept], dtype=np.int64)
        number, ids, labels = np.concatenate(group.gather(whole.reshape(-1))).reshape(-1, 3).T
        scores = np.concatenate(group.gather(np.array([categories[n].scores[i] for n, i in kept], dtype=np.float64)))
        order = np.argsort(ids, kind="stable")
        chosen = [order[number[order] == n] for n in range(len(categories))]
        return [(scores[c], labels[c].astype(bool)) for c in chosen]

    @staticmethod
    def _image_values(scores: np.ndarray, labels: np.ndarray) -> Values:
        reason = "" if labels.any() else "no anomalous image"
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
        if not labels.any():
            reason = "no anomalous image"
        elif not result.labelled:
            reason = "no mask for any anomalous image"
        elif not ranking.positives:
            reason = "no anomalous pixel in the masks"
        no_normal = reason or ("" if ranking.negatives else "no normal pixel")
        values: Values = {
            "pixel_auroc": _value(ranking.auroc, n, no_normal),
            "pixel_ap": _value(ranking.average_precision, n, reason),
            "pixel_f1max": _value(ranking.f1_max, n, reason),
        }
        for limit in self.fpr_limits:
            values[aupro_name(limit)] = _value(partial(ranking.aupro, limit), n, no_normal)
        best = ranking.best_sum
        at_sum, at_f1, at_all = result.at_sum, result.at_f1, result.at_all
        texts = {
            "dsc": lambda: at_sum.dice / n,
            "dsc_threshold": lambda: key_to_float(int(best.key)),
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

    def _mean(self, categories: Mapping[str, Values]) -> Values:
        averaged = [metric for metric in self.metrics if metric not in NOT_AVERAGED]
        return {m: mean_over_categories((c, values[m][0]) for c, values in categories.items()) for m in averaged}


def _value(formula: Callable[[], float], n: int, reason: str) -> tuple[float, int, str]:
    return (math.nan, n, reason) if reason else (float(formula()), n, "")


def _numpy(values: Stack | Vector) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _vector(name: str, values: Vector, length: int) -> np.ndarray:
    array = _numpy(values)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}, but the batch has {length} categories: expected ({length},)")
    return array


def _stack(name: str, values: Stack | None, B: int) -> Stack:
    """(B, H, W) from (B, H, W) or (B, 1, H, W)."""
    if values is None:
        raise ValueError(f"the selected pixel metrics need {name}, found None")
    values = values.detach() if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3 or len(values) != B:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({B}, H, W): one for each category given")
    return values


def _to_keys(maps: Stack, sample: Callable[[int], str]) -> np.ndarray:
    """Keys (int32 (B, H * W)) of float maps (B, H, W), copied to the CPU."""
    if str(maps.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(
            f"maps are {maps.dtype}, expected float32: half precision moves pixel AP by up to 1e-3. "
            "Convert the feature distances with .float() before they are upsampled"
        )
    try:
        with np.errstate(over="ignore"):
            values = _numpy(maps).astype(np.float32, copy=False)
        return float_to_key(values.reshape(len(maps), math.prod(maps.shape[1:])))
    except ValueError:
        for b, values in enumerate(_numpy(maps)):
            with np.errstate(over="ignore"):
                bad = np.argwhere(~np.isfinite(values.astype(np.float32)))
            if len(bad):
                y, x = bad[0].tolist()
                raise ValueError(
                    f"{sample(b)}: {len(bad)} scores of its map are not finite in float32, "
                    f"the first is {values[y, x]} at ({y}, {x})"
                ) from None
        raise


def _check_masks(masks: Stack | None, maps: Stack, sample: Callable[[int], str]) -> np.ndarray:
    """bool (B, H, W) masks of the size of the maps."""
    masks = _numpy(_stack("masks", masks, len(maps)))
    if len(maps) and masks.shape != tuple(maps.shape):
        raise ValueError(
            f"{sample(0)}: its map is {tuple(maps.shape[1:])}, its mask {masks.shape[1:]}. "
            "Resize the mask (nearest) to the size of the map"
        )
    if masks.dtype == np.bool_:
        return masks
    if not np.issubdtype(masks.dtype, np.integer):
        raise TypeError(
            f"{sample(0)}: masks are {masks.dtype}, expected bool, or integers that are anomalous where not zero. "
            "Binarise them by the rule of the dataset before resizing"
        )
    return masks != 0
