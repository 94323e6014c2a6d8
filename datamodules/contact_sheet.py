"""Contact sheets of a dataset: good images and every kind of defect, with what the masks mark, before anything is trained."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont

from datamodules.check import Report
from datamodules.errors import DataError
from datamodules.images import MAX_MEGAPIXELS, infer_bit_depth, odd_mode, read_image, read_mask
from datamodules.outline import outlined
from datamodules.problems import number_of
from datamodules.sample_table import TableRow, rows_of
from results.common.files import replacing, write_text
from results.common.shown import printable

PAGE = "index.html"
COUNT = 8
"""Images of each kind that are shown."""
TILE = 176
"""Side of a picture in pixels."""
SUSPECT = (
    "unreadable image",
    "unreadable mask",
    "size mismatch",
    "empty mask",
    "full-window mask",
    "mostly marked mask",
)
"""Findings of `check` whose images come first, framed in red."""
_MARGIN, _LINE, _HEAD = 8, 15, 24
_RED, _DARK, _PALE = (200, 30, 30), (40, 40, 40), (110, 110, 110)
_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1560px; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
img { max-width: 100%; height: auto; } .error { color: #b01e1e; } .files { color: #777; font-size: .85em; }
nav a { margin-right: .8em; } @media print { section { break-inside: avoid; } }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ explained }}</p>
<nav>{% for sheet in sheets %}<a href="#sheet-{{ loop.index }}">{{ sheet.title }}</a>{% endfor %}</nav>
{% for sheet in sheets %}<section id="sheet-{{ loop.index }}"><h2>{{ sheet.title }}</h2>
<p>{{ sheet.counts }}</p>
{% if sheet.findings %}<ul>{% for severity, text, files in sheet.findings %}<li class="{{ severity }}">{{ severity }}: {{ text }}
{% if files %}<div class="files">{{ files }}</div>{% endif %}</li>{% endfor %}</ul>{% endif %}
<a href="{{ sheet.file | urlencode }}">
<img src="{{ sheet.file | urlencode }}" alt="{{ sheet.title }}" loading="lazy"></a></section>
{% endfor %}</body></html>
"""


@dataclass(frozen=True)
class Sheet:
    """A category's contact sheet: its `file`, what it is of, and what the check found there."""

    file: str
    title: str
    counts: str
    findings: tuple[tuple[str, str, str], ...]


def write_sheets(
    reports: Sequence[Report],
    out: str | Path,
    count: int = COUNT,
    seed: int = 0,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Path:
    """Write one JPEG per category, and a page that shows them all.

    A sheet has a row per kind of image: good ones of training, validation and test, then every defect. Images with a
    finding (`SUSPECT`) come first, at most half of a row, then a seeded choice of the others. Only chosen files are opened.

    Args:
        reports: what `check` found, one per dataset.
        out: folder to write into; files of other names stay as they are.
        count: images per row, at least 1.
        seed: of the choice.
        max_megapixels: as in `decode`.

    Returns:
        The page, `out/index.html`.

    Raises:
        DataError: the folder cannot be written, or `count` is below 1.
    """
    if count < 1:
        raise DataError(f"A contact sheet shows at least one image of each kind, found {count}.")
    out = Path(out).expanduser()
    sheets = []
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for number, report in enumerate(reports):
                for category, rows in report.listing.table.groupby("category"):
                    prefix = f"{number + 1}-" if len(reports) > 1 else ""
                    name = printable(f"{prefix}{report.listing.reader.name}-{category.replace(os.sep, '-')}.jpg")
                    picture = _sheet(report, category, list(rows_of(rows)), count, seed, max_megapixels, pool)
                    with replacing(out / name) as part:
                        picture.save(part, "JPEG", quality=88, subsampling=0)
                    sheets.append(_described(report, category, name))
        page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
        explained = (
            f"Up to {number_of(count, 'image')} of each kind: those that the check remarks on first (red), the others chosen at "
            f"random (seed {seed}). What a mask marks is outlined and tinted yellow; the percentage is its share of the image."
        )
        title = "Contact sheets: " + ", ".join(f"{r.listing.reader.name} in {r.listing.root}" for r in reports)
        write_text(out / PAGE, page.render(title=printable(title), explained=explained, sheets=sheets))
    except OSError as error:
        raise DataError(f"The contact sheets cannot be written into {out}: {error.strerror or error}.") from error
    return out / PAGE


def _described(report: Report, category: str, file: str) -> Sheet:
    findings = []
    for problem in report.problems:
        if problem.category == category:
            names = [os.path.relpath(path, report.listing.root) for path in problem.files[:5]]
            more = f" and {len(problem.files) - 5} more" if len(problem.files) > 5 else ""
            text = f"{problem.kind}: {problem.message}"
            findings.append((problem.severity, printable(text), printable(", ".join(names) + more)))
    found, (with_mask, anomalous) = report.counts[category], report.masks.get(category, (0, 0))
    counts = f"{found.train} to train"
    counts += f", {found.val} held out" if found.val else ""
    counts += f"; test: {found.test_good} good, {number_of(anomalous, 'defect')}, {with_mask} of them with a mask"
    return Sheet(file, printable(f"{report.listing.reader.name}: {category}"), counts, tuple(findings))


def _sheet(
    report: Report,
    category: str,
    rows: Sequence[TableRow],
    count: int,
    seed: int,
    max_megapixels: float,
    pool: ThreadPoolExecutor,
) -> Image.Image:
    """The category's picture: a heading and a row of tiles per kind of image."""
    suspects: dict[str, list[str]] = defaultdict(list)
    for problem in report.problems:
        if problem.category == category and problem.kind in SUSPECT:
            for path in problem.files:
                suspects[path].append(problem.kind)
    kinds: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        kinds[f"{row.split}: {row.defect}"].append(row)
    threshold = report.listing.reader.mask_threshold
    chosen = {
        kind: _choose(mine, suspects, count, random.Random(printable(f"{seed} {category} {kind}")))
        for kind, mine in kinds.items()
    }
    every = [row for mine in chosen.values() for row in mine]
    tiles = pool.map(lambda row: _tile(row, _remarks(row, suspects), threshold, max_megapixels), every)
    drawn = {row.id: tile for row, tile in zip(every, tiles, strict=True)}
    columns = max(4, *map(len, chosen.values()))
    step, height = TILE + _MARGIN, TILE + 2 * _LINE + _MARGIN
    canvas = Image.new("RGB", (columns * step + _MARGIN, len(chosen) * (height + _HEAD) + _MARGIN), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, (kind, mine) in enumerate(chosen.items()):
        top = _MARGIN + number * (height + _HEAD)
        remarked = sum(bool(_remarks(row, suspects)) for row in kinds[kind])
        heading = f"{kind}, {len(mine)} of {len(kinds[kind])}" + (f", {remarked} remarked on" if remarked else "")
        pen.text((_MARGIN, top), printable(heading), _DARK, font)
        for column, row in enumerate(mine):
            canvas.paste(drawn[row.id], (_MARGIN + column * step, top + _HEAD))
    return canvas


def _choose(
    rows: Sequence[TableRow], suspects: dict[str, list[str]], count: int, generator: random.Random
) -> list[TableRow]:
    """Up to `count` rows, those with a finding first; of more than half of them only as many as leave no place empty."""
    found = [row for row in rows if _remarks(row, suspects)]
    others = [row for row in rows if not _remarks(row, suspects)]
    first = min(len(found), max(-(-count // 2), count - len(others)))
    chosen = generator.sample(found, first)
    return chosen + generator.sample(others, min(len(others), count - len(chosen)))


def _remarks(row: TableRow, suspects: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(kind for path in (row.image_path, *row.mask_paths) for kind in suspects.get(path, ())))


def _tile(row: TableRow, remarks: Sequence[str], threshold: int, max_megapixels: float) -> Image.Image:
    """A picture of one row with two lines below it: its file, and what is marked in it or wrong with it."""
    tile = Image.new("RGB", (TILE, TILE + 2 * _LINE), "white")
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(11)
    told = "no mask" if row.label else ""
    try:
        deep = odd_mode(row.image_path) == "16-bit"
        bits = infer_bit_depth([row.image_path], max_megapixels=max_megapixels) if deep else None
        image = read_image(row.image_path, bits, max_megapixels)
        scale = min(TILE / max(image.shape[:2]), 1)
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        if row.mask_paths:
            mask = read_mask(row.mask_paths, threshold, max_megapixels)
            small = outlined(small, mask, tint=0.25)
            told = f"{100 * mask.mean():.2g} % marked"
        tile.paste(Image.fromarray(small), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    except DataError as error:
        pen.rectangle((0, 0, TILE - 1, TILE - 1), (225, 225, 225))
        remarks = remarks or [str(error)]
    if remarks:
        pen.rectangle((0, 0, TILE - 1, TILE - 1), None, _RED, 3)
        told = "; ".join((*remarks, told) if told else remarks)
    pen.text((0, TILE + 1), _fitting(printable(os.path.basename(row.image_path)), font), _PALE, font)
    pen.text((0, TILE + 1 + _LINE), _fitting(printable(told), font), _RED if remarks else _PALE, font)
    return tile


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or its beginning and end where it is wider than a tile."""
    half = len(text) // 2
    shown = text
    while font.getlength(shown) > TILE and half > 1:
        half -= 1
        shown = f"{text[:half]}...{text[-half:]}"
    return shown
