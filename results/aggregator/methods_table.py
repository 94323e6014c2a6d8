"""The table of the sweep `methods`: its rows by family, each method against one control, and what ranks can tell."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from results.aggregator import names
from results.aggregator.records import RecordError, StoredRecord
from results.aggregator.scores import Query, axis_value, seed_means
from results.aggregator.spec import Entry, Spec
from results.aggregator.sweep_cells import SweepCells
from results.aggregator.table import Cell, Column, Row, Table, Value
from results.common import untrusted
from results.common.methods import COMPARE, METHOD

HEADERS = ("Method", "Backbone", "Images")
CONTROLS = ("nearest_neighbours", "uniad")
"""The control of a comparison: the first one that was run."""
APART = {
    "test": "Given the classes of the test images (not ranked)",
    "training": "Given the classes of the training images (not ranked)",
}
EXPERIMENTS = {
    "recipe": "each with its own backbone and image size",
    "matched": "one backbone and image size for all",
    "longer": "each with its own backbone and image size, trained three times as long",
}
SETTINGS = {"unified": "one model for all categories", "per_category": "one model per category"}
IMAGE_METRICS = ("image_auroc", "image_ap")
DRAWS = 2000
PRICES = ("train_seconds", "images_per_second", "peak_memory")
"""Costs that are drawn against quality."""


def rows(spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None) -> list[Entry]:
    """A row for each method, by family; methods that are told classes stand apart, at the end."""
    listed = (sweep.values.get(METHOD) if sweep else None) or []
    found = dict.fromkeys([*map(str, listed), *(str(s.record.cell.get(METHOD)) for s in records)])
    default = str(spec.default.get(METHOD, ""))
    order = [*names.FAMILIES, names.OTHER_FAMILY, *APART.values()]
    entries = []
    for method in found:
        mine = [stored for stored in records if stored.record.cell.get(METHOD) == method]
        told = next((stored.labels for stored in mine if stored.labels), "")
        backbones = sorted({stored.record.backbone["name"].partition(".")[0] for stored in mine})
        sizes = sorted({images(stored) for stored in mine})
        labels = (names.method_label(method), " or ".join(backbones), " or ".join(sizes))
        group = APART[told] if told else names.family(method)
        runs = {"cell": {METHOD: method}}
        entries.append(Entry(labels, group, default=method == default, apart=bool(told), runs=runs))
    return sorted(entries, key=lambda entry: order.index(entry.group))


def quality(table: Table) -> str:
    """The metric of a figure of cost against quality: the mean of seven where a row has it, else the first that is ranked."""
    metrics = [column.metric for column in table.columns if column.ranked]
    for metric in ("mean_of_seven", *metrics):
        if any(
            c.key.get("metric") == metric and c.runs and c.runs.mean is not None for row in table.cells for c in row
        ):
            return metric
    return next(iter(metrics), "")


def images(stored: StoredRecord) -> str:
    """Size of a run's images, and of what they are the centre of: `392x392 of 448`."""
    crop = re.search(r"^ +crop_from: *(.*)$", stored.config_text, re.MULTILINE)
    whole = "" if crop is None or crop[1] == "null" else f" of {crop[1] or 'larger ones'}"
    return axis_value(stored, "image size") + whole


def experiment(records: Sequence[StoredRecord]) -> tuple[str, str]:
    """(end of the table's name, what its title says) of the experiment that the records are of."""
    compares = sorted({str(stored.record.cell.get(COMPARE)) for stored in records})
    settings = sorted({stored.record.setting for stored in records})
    if len(compares) != 1 or len(settings) != 1:
        return "", ""
    words = [EXPERIMENTS.get(compares[0], compares[0]), SETTINGS[settings[0]]]
    return f".{compares[0]}.{settings[0]}", ", ".join(words)


def of_method(records: Sequence[StoredRecord], method: str) -> list[StoredRecord]:
    """The records of a method's cell."""
    return [stored for stored in records if stored.record.cell.get(METHOD) == method]


def control(records: Sequence[StoredRecord]) -> str:
    """The method that the others are compared with; empty if none of `CONTROLS` was run."""
    return next((name for name in CONTROLS if of_method(records, name)), "")


# ---- paired bootstrap over images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A difference in points of percent, its 95 % interval over images, and what it was taken over."""

    difference: float
    low: float
    high: float
    images: int
    categories: int
    seeds: tuple[int, ...]


def image_scores(stored: StoredRecord) -> dict[str, dict[str, tuple[int, float]]]:
    """category -> image path -> (label, image score) of a record's test images; RecordError if it kept none."""
    try:
        text = untrusted.file_inside(stored.path, "image_scores.csv").read_text(
            encoding="utf-8", errors="surrogateescape"
        )
    except (untrusted.UntrustedError, OSError) as error:
        raise RecordError(f"{stored.name} has no image_scores.csv: {error}") from None
    found: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    try:
        for line in csv.DictReader(text.splitlines()):
            found[line["category"]][line["path"]] = int(line["label"]), float(line["image_score"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{stored.name}: image_scores.csv cannot be read: {error}") from None
    return dict(found)


def bootstrap(
    one: Sequence[StoredRecord], other: Sequence[StoredRecord], metric: str, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean over seeds and categories of one's metric minus the other's, with the interval over test images.

    In each draw a category's normal and anomalous images are drawn again with replacement, the same for both sides and all
    seeds, which are scored on the same images. The interval (2.5 and 97.5 % of the draws) is therefore about images only:
    another training or another category may differ by more.

    Raises:
        ValueError: no seed in common, or not the same test images.
    """
    scores = [{stored.record.seed: image_scores(stored) for stored in side} for side in (one, other)]
    seeds = tuple(sorted(set(scores[0]) & set(scores[1])))
    if not seeds:
        raise ValueError(f"seeds {sorted(scores[0])} and {sorted(scores[1])} have none in common to pair")
    categories = sorted(scores[0][seeds[0]])
    generator = np.random.default_rng(seed)
    points, samples, images = [], [], 0
    for category in categories:
        tables = [[side[number].get(category, {}) for number in seeds] for side in scores]
        paths = sorted(tables[0][0])
        if any(sorted(table) != paths for side in tables for table in side):
            raise ValueError(f"the test images of {category} are not the same")
        labels = np.array([tables[0][0][path][0] for path in paths], dtype=bool)
        if labels.all() or not labels.any():
            continue  # the metric is undefined there
        images += len(paths)
        weights = np.ones((draws + 1, len(paths)))
        for label in (False, True):
            count = int((labels == label).sum())
            weights[1:, labels == label] = generator.multinomial(count, np.full(count, 1 / count), size=draws)
        means = [
            np.mean(
                [_weighted(np.array([t[path][1] for path in paths]), labels, weights, metric) for t in side], axis=0
            )
            for side in tables
        ]
        points.append(means[0][0] - means[1][0])
        samples.append(means[0][1:] - means[1][1:])
    if not points:
        raise ValueError("no category has both normal and anomalous test images")
    low, high = np.quantile(np.mean(samples, axis=0), (0.025, 0.975))
    return Interval(100 * float(np.mean(points)), 100 * float(low), 100 * float(high), images, len(points), seeds)


def _weighted(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, metric: str) -> np.ndarray:
    """AUROC or average precision of images that count as often as each row of weights (D, N) says; float64 (D,)."""
    _, place = np.unique(-scores, return_inverse=True)  # equal scores are one threshold, the highest first
    hits = np.zeros((len(weights), place.max() + 1))
    alarms = np.zeros_like(hits)
    np.add.at(hits.T, place[labels], weights[:, labels].T)
    np.add.at(alarms.T, place[~labels], weights[:, ~labels].T)
    if metric == "image_auroc":
        above = hits.cumsum(1) - hits / 2
        return (alarms * above).sum(1) / (hits.sum(1) * alarms.sum(1))
    if metric == "image_ap":
        true = hits.cumsum(1)
        return (hits * true / np.maximum(true + alarms.cumsum(1), 1e-12)).sum(1) / hits.sum(1)
    raise ValueError(f"metric {metric!r} cannot be drawn again from image scores; allowed: {', '.join(IMAGE_METRICS)}")


def control_table(spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None) -> Table | None:
    """Every method minus the control, with intervals; None if no control was run."""
    against = control(records)
    if not against:
        return None
    suffix, what = experiment(records)
    columns = [
        Column(label, names.metric_label(metric), "threshold", 1)
        for metric in IMAGE_METRICS
        for label in ("difference", "from", "to")
    ]
    lines, cells, missing = [], [], []
    used: list[Interval] = []
    for entry in rows(spec, records, sweep):
        method = str(entry.runs["cell"][METHOD])
        mine = of_method(records, method)
        if not mine or method == against:
            continue
        line = []
        for metric in IMAGE_METRICS:
            try:
                found = bootstrap(mine, of_method(records, against), metric)
            except (ValueError, RecordError) as error:
                line += [Cell(runs=Value(reason=str(error)))] * 3
                missing.append(f"{entry.labels[0]}: {names.metric_label(metric)}: {error}")
                continue
            used.append(found)
            runs = tuple(stored.name for stored in mine)
            line += [Cell(runs=Value(n, None, None, records=runs)) for n in (found.difference, found.low, found.high)]
        lines.append(Row(entry.labels[:1], entry.group, apart=entry.apart))
        cells.append(line)
    if not lines:
        return None
    caption = f"Points of percent, 95 % interval of {DRAWS} paired draws over test images within each category"
    if used:
        caption += (
            f" ({used[0].images} images, {used[0].categories} categories, seeds {', '.join(map(str, used[0].seeds))})"
        )
    notes = [
        "The intervals are about the test images alone: they do not say how another training or other categories would do.",
        "Pixel metrics have none, because records keep no anomaly maps; `python -m results compare` pairs them over categories.",
    ]
    title = f"Methods against {names.method_label(against)}" + (f", {what}" if what else "")
    return Table(
        f"{spec.name}{suffix}.control", title, "runs", HEADERS[:1], lines, columns, cells, f"{caption}.", notes, missing
    )


# ---- ranks over categories --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Average ranks over categories (1 is best): Friedman's p and Nemenyi's critical difference at 5 %.

    `silent` is why the number of categories allows no statement, a sentence; empty if it allows one.
    """

    metric: str
    methods: tuple[str, ...]
    average: tuple[float, ...]
    categories: int
    p: float | None
    critical: float
    silent: str


def ranks(records: Sequence[StoredRecord], metric: str = "image_auroc") -> Ranks:
    """Ranks of the methods that are told no classes, averaged over the categories of all data sets."""
    found = dict.fromkeys(str(stored.record.cell[METHOD]) for stored in records if not stored.labels)
    values: dict[str, dict[str, float]] = {}
    datasets = sorted({dataset["name"] for stored in records for dataset in stored.record.datasets})
    for method in found:
        mean: dict[str, list[float]] = defaultdict(list)
        for dataset in datasets:
            for by_category in seed_means(of_method(records, method), Query(metric, dataset)).values():
                for category, value in by_category.items():
                    mean[f"{dataset}/{category}"].append(value)
        values[method] = {category: float(np.mean(several)) for category, several in mean.items()}
    values = {method: known for method, known in values.items() if known}
    shared = sorted(set.intersection(*map(set, values.values()))) if values else []
    k, n = len(values), len(shared)
    if k < 2 or n < 1:
        return Ranks(metric, tuple(values), (), n, None, math.inf, "Fewer than two methods have a category in common.")
    table = np.array([[values[method][category] for method in values] for category in shared])
    average = stats.rankdata(-np.round(table, 6), axis=1).mean(0)
    critical = critical_difference(k, n)
    p = float(stats.friedmanchisquare(*table.T).pvalue) if k > 2 and n > 1 and len(np.unique(table)) > 1 else None
    silent = ""
    if critical > k - 1:
        least = next(m for m in range(2, 1000) if critical_difference(k, m) <= k - 1)
        silent = (
            f"With {n} categor{'y' if n == 1 else 'ies'} and {k} methods no difference of average ranks can be significant: "
            f"the critical difference is {critical:.2f} ranks, the largest possible one {k - 1}; {least} categories are the "
            "least that could show one."
        )
    order = np.argsort(average, kind="stable")
    listed = tuple(values)
    return Ranks(
        metric, tuple(listed[i] for i in order), tuple(float(average[i]) for i in order), n, p, critical, silent
    )


def sentence(found: Ranks) -> str:
    """What the ranks say."""
    parts = [f"{names.method_label(m)} {rank:.2f}" for m, rank in zip(found.methods, found.average, strict=True)]
    test = "" if found.p is None else f"; Friedman p = {found.p:.3g}"
    return (
        f"Average ranks over {found.categories} categories by {names.metric_label(found.metric)}: {', '.join(parts)}. Methods "
        f"differ significantly (Nemenyi, 5 %) if their ranks differ by more than {found.critical:.2f}{test}."
    )


def critical_difference(k: int, n: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of the average ranks of k methods over n categories (Demsar, JMLR 2006)."""
    quantile = float(stats.studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(k * (k + 1) / (6 * n))
