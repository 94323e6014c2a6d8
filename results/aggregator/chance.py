"""Which numbers a guess would reach too: image AUROCs that the number of test images does not tell from 50."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from results.aggregator.names import PARTIAL_MEANS
from results.aggregator.records import StoredRecord
from results.aggregator.table import Table
from results.common import untrusted
from results.common.pair import plain

METRIC = "image_auroc"
ERRORS = 1.96
"""A number this many standard errors of a guess above 50, or less, is near chance."""


def limit(stored: StoredRecord, dataset: str, category: str = "mean") -> float | None:
    """The highest image AUROC in percent that is near chance; None if the run does not say how many images it scored.

    The scores of m normal and n anomalous images that are drawn from one distribution have an AUROC of 0.5 with the variance
    (m + n + 1) / (12 m n) (Mann and Whitney, Annals of Mathematical Statistics 1947); a mean over categories has their mean
    over the number of categories. Seeds are scored on the same images and make it no smaller.

    Args:
        stored: A run.
        dataset: The name of one of its data sets.
        category: A category, `mean`, or the name of a published partial mean.
    """
    counts = _counts(stored.path, dataset)
    known = [plain(d["name"], c) for d in stored.record.datasets if d["name"] == dataset for c in d["categories"]]
    wanted = known if category == "mean" else PARTIAL_MEANS.get((dataset, category), (category,))
    pairs = [counts.get(name, (0, 0)) for name in wanted]
    if not pairs or not all(m and n for m, n in pairs):
        return None
    variance = sum((m + n + 1) / (12 * m * n) for m, n in pairs) / len(pairs) ** 2
    return 100 * (0.5 + ERRORS * math.sqrt(variance))


def notes(table: Table, records: Iterable[StoredRecord]) -> list[str]:
    """One note that names the rows whose image AUROC is near chance; empty if there is none."""
    by_name = {stored.name: stored for stored in records}
    columns = [j for j, column in enumerate(table.columns) if column.metric == METRIC]
    found: dict[str, None] = {}
    for row, line in zip(table.rows, table.cells, strict=True):
        for j in columns:
            value, key = line[j].runs, line[j].key
            if value is None or value.mean is None:
                continue
            stored = next((by_name[name] for name in value.records if name in by_name), None)
            highest = limit(stored, key.get("dataset", ""), key.get("category", "mean")) if stored else None
            if highest is not None and value.mean <= highest:
                column = f" ({f'{table.columns[j].group} {table.columns[j].label}'.strip()})" * (len(columns) > 1)
                found["".join((" / ".join(filter(None, (row.group, *row.labels))), column))] = None
    if not found:
        return []
    return [
        f"Near chance (image AUROC at most {ERRORS} standard errors of a guess on these test images above 50): "
        f"{', '.join(found)}."
    ]


def remark(stored: StoredRecord) -> str:
    """The same of one run, with the numbers; empty if its image AUROC is above chance or nothing is known of it."""
    parts = []
    for dataset in dict.fromkeys(d["name"] for d in stored.record.datasets):
        values = [
            stored.scores.get(("", "category", name, category, METRIC), (math.nan, ""))[0]
            for name, category in stored.record.category_keys
            if name == dataset
        ]
        mean, highest = 100 * math.fsum(values) / len(values), limit(stored, dataset)
        if highest is not None and mean <= highest:
            parts.append(f"image AUROC {mean:.1f} on {dataset}; a guess reaches up to {highest:.1f} on its test images")
    return f"Near chance: {'; '.join(parts)}." if parts else ""


def _counts(path: Path, dataset: str) -> dict[str, tuple[int, int]]:
    """category -> (normal, anomalous) test images of a record's image_scores.csv; empty if it has none that can be read."""
    try:
        file = untrusted.file_inside(path, "image_scores.csv")
        lines = _read(file, file.stat().st_mtime_ns)
    except (untrusted.UntrustedError, OSError, KeyError, TypeError, ValueError, csv.Error):
        return {}
    return {plain(dataset, category): pair for category, pair in lines}


@lru_cache(maxsize=20000)
def _read(file: Path, _modified: int) -> Sequence[tuple[str, tuple[int, int]]]:
    counts: dict[str, list[int]] = {}
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        for line in csv.DictReader(stream):
            counts.setdefault(line["category"], [0, 0])[bool(int(line["label"]))] += 1
    return [(category, (pair[0], pair[1])) for category, pair in counts.items()]
