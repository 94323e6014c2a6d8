"""What is in a dataset on disk, beside what its authors published, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from datamodules.anomaly_ratio import DEFINITIONS, OURS, Marked, ratios
from datamodules.anomaly_ratio import look as marked_in
from datamodules.errors import DataError
from datamodules.images import MAX_MEGAPIXELS, REMARKABLE, check_crop, read_header, read_image, read_mask, resize_mask
from datamodules.margin import kept, margin
from datamodules.near_duplicates import near_pairs, perceptual_hashes, thumbnail
from datamodules.problems import ERROR, WARNING, Problem, number_of
from datamodules.readers import Counts, Listing, list_dataset
from datamodules.sample_table import GOOD, SampleTable, TableRow, rows_of
from results.common.shown import printable

COLUMNS = ("train", "val", "test_good", "structural", "logical")
SMALLEST = 32
"""An image with a shorter side is remarked on."""
SIZES = (64, 128, 256)
"""Sides of square images at which masks of defects are looked for, in pixels."""
TOGETHER = {
    **{f"{mode} image": rule for mode, rule in REMARKABLE.items()},
    "small image": f"a side is shorter than {SMALLEST} pixels",
    "mostly marked mask": "more than half of the image is marked: inverted?",
    "several frames image": "only the first frame is read",
    "turned image": "EXIF orientation is applied to the image, so that its mask has to be one of the image as shown",
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
        anomaly_ratios: category -> definition -> percent of the test images that is marked, see `datamodules.anomaly_ratio`;
            categories without masks are absent.
    """

    listing: Listing
    counts: dict[str, Counts]
    masks: dict[str, tuple[int, int]]
    problems: tuple[Problem, ...] = field(default=())
    anomaly_ratios: dict[str, dict[str, float]] = field(default_factory=dict)

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
    name: str,
    root: str | Path,
    categories: Sequence[str] | None = None,
    console: Console | None = None,
    sizes: Sequence[int] = SIZES,
    max_megapixels: float = MAX_MEGAPIXELS,
    crop: tuple[int, int] | None = None,
) -> Report:
    """Read a dataset and open every file of it.

    Args:
        name, root, categories: as in `list_dataset`.
        console: shows progress if given.
        sizes: sides of square images in pixels, at which masks of defects are looked for.
        max_megapixels: as in `decode`.
        crop: sides of square images before and after a centre crop; what its margin holds of defects is then counted.

    Raises:
        DataError: the dataset cannot be found at all; everything smaller is in the report.
    """
    if crop is not None:
        check_crop((crop[0], crop[0]), (crop[1], crop[1]))
    listing = list_dataset(name, root, categories)
    problems = list(listing.problems)
    counts = count(listing.table)
    problems += _count_problems(listing, counts)
    rows = list(rows_of(listing.table))
    looks = _look_at_all(rows, listing.reader.mask_threshold, console, sizes, max_megapixels, crop)
    problems += _file_problems(rows, looks, sizes, crop)
    anomalous = listing.table[listing.table["label"] == 1]
    masks = {
        category: (int((rows["mask_paths"].map(len) > 0).sum()), len(rows))
        for category, rows in anomalous.groupby("category")
    }
    problems.sort(key=lambda problem: (problem.severity != ERROR, problem.category, problem.kind, problem.files))
    seen: dict[str, list[Marked]] = {}
    for row, found in zip(rows, looks, strict=True):
        if row.split == "test" and found.marked is not None:
            seen.setdefault(row.category, []).append(found.marked)
    anomalies = {category: ratios(images) for category, images in seen.items() if any(image.marked for image in images)}
    return Report(listing, counts, masks, tuple(problems), anomalies)


def _count_problems(listing: Listing, counts: dict[str, Counts]) -> list[Problem]:
    public = listing.reader.counts
    problems = []
    if listing.reader.totals is not None and len(counts) == listing.reader.totals[0]:
        published = listing.reader.totals[1]
        sums = {column: sum(getattr(found, column) for found in counts.values()) for column in COLUMNS}
        different = [
            f"{column} {sums[column]} instead of {getattr(published, column)}"
            for column in COLUMNS
            if sums[column] != getattr(published, column)
        ]
        if different:
            what = f"all {len(counts)} categories: {', '.join(different)}"
            problems.append(Problem(WARNING, "other counts than published", listing.reader.name, what))
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


@dataclass(frozen=True)
class _Look:
    """What opening one row's files found: remarks (severity, kind, sentence), digest and thumbnail of the image, the
    sizes at which its mask marks nothing, its defective pixels without and with the centre crop, and what is marked of
    it (None if that is unknown)."""

    remarks: list[tuple[str, str, str]]
    digest: str = ""
    thumbnail: np.ndarray | None = None
    vanishes: tuple[int, ...] = ()
    inside: tuple[int, int] = (0, 0)
    marked: Marked | None = None


def _look_at_all(
    rows: Sequence[TableRow],
    threshold: int,
    console: Console | None,
    sizes: Sequence[int],
    max_megapixels: float,
    crop: tuple[int, int] | None,
) -> list[_Look]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results: Iterable[_Look] = pool.map(lambda row: _look_at(row, threshold, sizes, max_megapixels, crop), rows)
        if console is not None:
            results = track(results, "opening files", len(rows), console=console, transient=True)
        return list(results)


def _file_problems(
    rows: Sequence[TableRow], looks: Sequence[_Look], sizes: Sequence[int], crop: tuple[int, int] | None
) -> list[Problem]:
    problems = []
    together: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    vanishing: dict[str, dict[int, list[str]]] = defaultdict(lambda: {size: [] for size in sizes})
    digests: dict[str, list[int]] = defaultdict(list)
    for number, (row, look) in enumerate(zip(rows, looks, strict=True)):
        if look.digest:
            digests[look.digest].append(number)
        for size in look.vanishes:
            vanishing[row.category][size].append(row.mask_paths[0])
        for severity, kind, what in look.remarks:
            if kind in TOGETHER:
                together[severity, row.category, kind] += row.mask_paths if kind.endswith("mask") else (row.image_path,)
            else:
                files = (row.image_path, *row.mask_paths)
                problems.append(Problem(severity, kind, row.category, what, files))
    for (severity, category, kind), named in together.items():
        what = f"{number_of(len(named), kind.split()[-1])}: {TOGETHER[kind]}"
        problems.append(Problem(severity, kind, category, what, tuple(named)))
    for category, lost in vanishing.items():
        masks = sum(bool(row.mask_paths) for row in rows if row.category == category)
        told = ", ".join(f"{len(files)} at {size} x {size}" for size, files in lost.items() if files)
        what = f"of {number_of(masks, 'mask')} of defects vanish {told} pixels; mask_resize=area keeps them"
        files = tuple(dict.fromkeys(file for files in lost.values() for file in files))
        problems.append(Problem(WARNING, "defects too small", category, what, files))
    for category in sorted({row.category for row in rows}) if crop else ():
        mine = [(row, look) for row, look in zip(rows, looks, strict=True) if row.category == category]
        found = margin(look.inside for _, look in mine)
        files = tuple(row.mask_paths[0] for row, look in mine if look.inside[0] and not look.inside[1])
        what = found.sentence((crop[0], crop[0]), (crop[1], crop[1]))
        if found.cut_pixels:
            problems.append(Problem(WARNING, "defects in the margin", category, what, files))
    for same in digests.values():
        splits = {rows[number].split for number in same}
        if "test" in splits and len(splits) > 1:
            files = tuple(rows[number].image_path for number in same)
            what = "the same file is used for training and for testing"
            problems.append(Problem(WARNING, "test image in training", rows[same[0]].category, what, files))
    return problems + _near_duplicates(rows, looks)


def _near_duplicates(rows: Sequence[TableRow], looks: Sequence[_Look]) -> list[Problem]:
    """Test images that show what a training image of their category shows, but were encoded anew."""
    problems = []
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (row, look) in enumerate(zip(rows, looks, strict=True)):
        if look.thumbnail is not None:
            groups[row.category].append(number)
    for category, numbers in groups.items():
        hashes = perceptual_hashes(np.stack([looks[number].thumbnail for number in numbers]))
        test = np.array([rows[number].split == "test" for number in numbers])
        pairs = near_pairs(hashes[test], hashes[~test])
        found = [(np.array(numbers)[test][i], np.array(numbers)[~test][j]) for i, j in pairs]
        found = [(one, other) for one, other in found if looks[one].digest != looks[other].digest]
        if found:
            few = number_of(len(found), "test image")
            what = f"{few}: nearly the same picture is used for training (files in pairs, test first)"
            files = tuple(rows[number].image_path for pair in found for number in pair)
            problems.append(Problem(WARNING, "test image near training", category, what, files))
    return problems


def _look_at(
    row: TableRow, threshold: int, sizes: Sequence[int], max_megapixels: float, crop: tuple[int, int] | None
) -> _Look:
    remarks = []
    try:
        header = read_header(row.image_path)
        if header.mode in REMARKABLE:
            remarks.append((WARNING, f"{header.mode} image", REMARKABLE[header.mode]))
        if header.frames > 1:
            remarks.append((WARNING, "several frames image", TOGETHER["several frames image"]))
        if header.turned and row.mask_paths:
            remarks.append((WARNING, "turned image", TOGETHER["turned image"]))
        image = read_image(row.image_path, max_megapixels=max_megapixels)
    except DataError as error:
        return _Look([(ERROR, "unreadable image", str(error))])
    if min(image.shape[:2]) < SMALLEST:
        remarks.append((WARNING, "small image", TOGETHER["small image"]))
    look = _Look(remarks, hashlib.sha256(image.tobytes()).hexdigest(), thumbnail(image))
    if not row.mask_paths:
        return look if row.label else replace(look, marked=Marked(image.shape[0] * image.shape[1]))
    try:
        mask = read_mask(row.mask_paths, threshold, max_megapixels)
    except DataError as error:
        remarks.append((ERROR, "unreadable mask", str(error)))
        return look
    if mask.shape != image.shape[:2]:
        found = [f"{array.shape[1]} x {array.shape[0]}" for array in (image, mask)]
        why = " and its EXIF orientation turns it" if header.turned else ""
        remarks.append((ERROR, "size mismatch", f"the image is {found[0]}{why}, its mask {found[1]} (width x height)"))
    elif not mask.any():
        remarks.append((WARNING, "empty mask", "the image counts as anomalous, but no pixel is marked"))
    elif mask.all():
        remarks.append((WARNING, "full-window mask", "every pixel is marked: is this really a mask of the defect?"))
    elif mask.mean() > 0.5:
        remarks.append((WARNING, "mostly marked mask", TOGETHER["mostly marked mask"]))
    lost = tuple(size for size in sizes if mask.any() and not resize_mask(mask, (size, size)).any())
    inside = kept(resize_mask(mask, (crop[0], crop[0])), (crop[1], crop[1])) if crop else (0, 0)
    return replace(look, vanishes=lost, inside=inside, marked=marked_in(mask))


def show(report: Report, console: Console, limit: int = 50) -> None:
    """Print counts beside the published ones, then every problem with up to `limit` files each."""
    public = report.listing.reader.counts
    title = escape(printable(f"{report.listing.reader.name} in {report.listing.root}"))
    table = Table(title=title, caption="found / published, red where they differ" if public else None)
    table.add_column("category")
    told_apart = any(counts.logical for counts in (*report.counts.values(), *public.values()))
    columns = COLUMNS if told_apart else COLUMNS[:-1]
    for column in (*columns, "with mask"):
        name = "defects" if column == "structural" and not told_apart else column.replace("_", " ")
        table.add_column(name, justify="right")
    totals = dict.fromkeys(columns, 0)
    for category, found in report.counts.items():
        cells = []
        for column in columns:
            here = getattr(found, column)
            totals[column] += here
            there = getattr(public[category], column) if category in public else None
            cell = str(here) if there is None else f"{here} / {there}"
            cells.append(f"[red]{cell}[/]" if there not in (None, here) else cell)
        with_mask, anomalous = report.masks.get(category, (0, 0))
        table.add_row(escape(printable(category)), *cells, f"{with_mask} of {anomalous}")
    with_mask, anomalous = (sum(pair[i] for pair in report.masks.values()) for i in (0, 1))
    table.add_section()
    table.add_row("all", *map(str, totals.values()), f"{with_mask} of {anomalous}")
    console.print(table)
    _show_anomaly_ratios(report, console)
    for problem in report.problems:
        colour = "red" if problem.severity == ERROR else "yellow"
        text = f"{escape(problem.category)}: {problem.kind}: {escape(problem.message)}"
        console.print(printable(f"[{colour}]{problem.severity}[/] {text}"), highlight=False, soft_wrap=True)
        for file in problem.files[:limit]:
            console.print(f"    {escape(printable(file))}", highlight=False, soft_wrap=True)
        if len(problem.files) > limit:
            console.print(f"    ... and {len(problem.files) - limit} more", highlight=False)
    console.print(f"{number_of(report.errors, 'error')}, {number_of(report.warnings, 'warning')}", highlight=False)


def _show_anomaly_ratios(report: Report, console: Console) -> None:
    """A column per definition, since the paper that prints such ratios gives no formula."""
    if not report.anomaly_ratios:
        return
    caption = "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in DEFINITIONS.items())
    table = Table(
        title="Anomaly ratio of the test images [%], by definition", padding=(0, 1, 0, 0), box=None,  # eighty columns
        caption=f"{caption}. Ours is the first. Of masks at their own size; a run's anomaly_ratio.csv is of the size it scores.",
    )  # fmt: skip
    table.add_column("category", no_wrap=True)
    for name in (OURS, *(name for name in DEFINITIONS if name != OURS)):
        table.add_column(name.replace("_", " "), justify="right")
    for category, found in report.anomaly_ratios.items():
        table.add_row(escape(printable(category)), *(f"{value:.2f}" for value in found.values()))
    console.print(table)
