"""What is in a dataset on disk, beside what its authors published, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from datamodules.errors import DataError
from datamodules.images import REMARKABLE, read_header, read_image, read_mask
from datamodules.problems import ERROR, WARNING, Problem, number_of
from datamodules.readers import Counts, Listing, list_dataset
from datamodules.sample_table import GOOD, SampleTable, rows_of

COLUMNS = ("train", "val", "test_good", "structural", "logical")
SMALLEST = 32
"""Sides of an image below it deserve a word."""
TOGETHER = {
    **{f"{mode} image": rule for mode, rule in REMARKABLE.items()},
    "small image": f"a side is shorter than {SMALLEST} pixels",
    "mostly marked mask": "more than half of the image is marked: inverted?",
}
"""Remarks that are made once per category, with all their files, and what they say."""


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        listing: the dataset as read.
        counts: category -> images by train, val, test_good, structural, logical.
        masks: category -> (anomalous images with a mask, anomalous images).
        problems: all findings, errors first.
    """

    listing: Listing
    counts: dict[str, Counts]
    masks: dict[str, tuple[int, int]]
    problems: tuple[Problem, ...] = field(default=())

    @property
    def errors(self) -> int:
        return sum(problem.severity == ERROR for problem in self.problems)

    @property
    def warnings(self) -> int:
        return len(self.problems) - self.errors


def count(table: SampleTable) -> dict[str, Counts]:
    """Images per category as in the published counts."""
    counts = {}
    for category, rows in table.groupby("category"):
        test = rows[rows["split"] == "test"]
        by_type = test["anomaly_type"].value_counts()
        counts[category] = Counts(
            train=int((rows["split"] == "train").sum()),
            val=int((rows["split"] == "val").sum()),
            test_good=int(by_type.get(GOOD, 0)),
            structural=int(by_type.get("structural", 0)),
            logical=int(by_type.get("logical", 0)),
        )
    return counts


def check(
    name: str, root: str | Path, categories: Sequence[str] | None = None, console: Console | None = None
) -> Report:
    """Read a dataset and open every file of it.

    Args:
        name, root, categories: as in `list_dataset`.
        console: shows progress if given.

    Raises:
        DataError: the dataset cannot be found at all; everything smaller is in the report.
    """
    listing = list_dataset(name, root, categories)
    problems = list(listing.problems)
    counts = count(listing.table)
    problems += _count_problems(listing, counts)
    problems += _file_problems(listing, console)
    anomalous = listing.table[listing.table["label"] == 1]
    masks = {
        category: (int((rows["mask_paths"].map(len) > 0).sum()), len(rows))
        for category, rows in anomalous.groupby("category")
    }
    problems.sort(key=lambda problem: (problem.severity != ERROR, problem.category, problem.kind, problem.files))
    return Report(listing, counts, masks, tuple(problems))


def _count_problems(listing: Listing, counts: dict[str, Counts]) -> list[Problem]:
    public = listing.reader.counts
    problems = []
    if not public:
        return problems
    for category, found in counts.items():
        if category not in public:
            what = f"{listing.reader.name} as published has no such category"
            problems.append(Problem(WARNING, "unknown category", category, what))
            continue
        different = [
            f"{column} {getattr(found, column)} instead of {getattr(public[category], column)}"
            for column in COLUMNS
            if getattr(found, column) != getattr(public[category], column)
        ]
        if different:
            problems.append(Problem(WARNING, "other counts than published", category, ", ".join(different)))
    absent = sorted(set(public) - set(listing.available))
    if absent:
        problems.append(Problem(WARNING, "absent categories", listing.reader.name, ", ".join(absent)))
    return problems


def _file_problems(listing: Listing, console: Console | None) -> list[Problem]:
    rows = list(rows_of(listing.table))
    threshold = listing.reader.mask_threshold
    found: list[list[tuple[str, str, str]]] = []
    digests: dict[str, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda row: _look_at(row, threshold), rows)
        if console is not None:
            results = track(results, "opening files", len(rows), console=console, transient=True)
        for number, (digest, remarks) in enumerate(results):
            found.append(remarks)
            if digest:
                digests[digest].append(number)
    problems = []
    together: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row, remarks in zip(rows, found, strict=True):
        for severity, kind, what in remarks:
            if kind in TOGETHER:
                together[severity, row.category, kind] += row.mask_paths if kind.endswith("mask") else (row.image_path,)
            else:
                files = (row.image_path, *row.mask_paths)
                problems.append(Problem(severity, kind, row.category, what, files))
    for (severity, category, kind), files in together.items():
        what = f"{number_of(len(files), kind.split()[-1])}: {TOGETHER[kind]}"
        problems.append(Problem(severity, kind, category, what, tuple(files)))
    for same in digests.values():
        splits = {rows[number].split for number in same}
        if "test" in splits and len(splits) > 1:
            files = tuple(rows[number].image_path for number in same)
            what = "the very same file is trained on and tested on"
            problems.append(Problem(WARNING, "test image in training", rows[same[0]].category, what, files))
    return problems


def _look_at(row, threshold: int) -> tuple[str, list[tuple[str, str, str]]]:
    """Digest of the image file and remarks (severity, kind, sentence) on one row."""
    remarks = []
    try:
        mode = read_header(row.image_path).mode
        if mode in REMARKABLE:
            severity = ERROR if mode == "floating point" else WARNING
            remarks.append((severity, f"{mode} image", REMARKABLE[mode]))
        if mode == "floating point":
            return "", remarks
        image = read_image(row.image_path)
    except DataError as error:
        return "", [(ERROR, "unreadable image", str(error))]
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    if min(image.shape[:2]) < SMALLEST:
        remarks.append((WARNING, "small image", TOGETHER["small image"]))
    if not row.mask_paths:
        return digest, remarks
    try:
        mask = read_mask(row.mask_paths, threshold)
    except DataError as error:
        return digest, [*remarks, (ERROR, "unreadable mask", str(error))]
    if mask.shape != image.shape[:2]:
        sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (image, mask)]
        remarks.append((ERROR, "size mismatch", f"the image is {sizes[0]}, its mask {sizes[1]} (width x height)"))
    elif not mask.any():
        remarks.append((WARNING, "empty mask", "the image counts as anomalous, but no pixel is marked"))
    elif mask.all():
        remarks.append((WARNING, "full-window mask", "every pixel is marked: is this really a mask of the defect?"))
    elif mask.mean() > 0.5:
        remarks.append((WARNING, "mostly marked mask", TOGETHER["mostly marked mask"]))
    return digest, remarks


def show(report: Report, console: Console, limit: int = 50) -> None:
    """Print counts beside the published ones, then every problem with up to `limit` files each."""
    public = report.listing.reader.counts
    title = f"{report.listing.reader.name} in {report.listing.root}"
    table = Table(title=title, caption="found / published, red where they differ" if public else None)
    table.add_column("category")
    for column in (*COLUMNS, "with mask"):
        table.add_column(column.replace("_", " "), justify="right")
    totals = dict.fromkeys(COLUMNS, 0)
    for category, found in report.counts.items():
        cells = []
        for column in COLUMNS:
            here = getattr(found, column)
            totals[column] += here
            there = getattr(public[category], column) if category in public else None
            cell = str(here) if there is None else f"{here} / {there}"
            cells.append(f"[red]{cell}[/]" if there not in (None, here) else cell)
        with_mask, anomalous = report.masks.get(category, (0, 0))
        table.add_row(escape(category), *cells, f"{with_mask} of {anomalous}")
    with_mask, anomalous = (sum(pair[i] for pair in report.masks.values()) for i in (0, 1))
    table.add_section()
    table.add_row("all", *map(str, totals.values()), f"{with_mask} of {anomalous}")
    console.print(table)
    for problem in report.problems:
        colour = "red" if problem.severity == ERROR else "yellow"
        text = f"{escape(problem.category)}: {problem.kind}: {escape(problem.message)}"
        console.print(f"[{colour}]{problem.severity}[/] {text}", highlight=False, soft_wrap=True)
        for file in problem.files[:limit]:
            console.print(f"    {escape(file)}", highlight=False, soft_wrap=True)
        if len(problem.files) > limit:
            console.print(f"    ... and {len(problem.files) - limit} more", highlight=False)
    console.print(f"{number_of(report.errors, 'error')}, {number_of(report.warnings, 'warning')}", highlight=False)
