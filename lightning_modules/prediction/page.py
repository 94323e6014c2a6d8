"""The page to send on: every photograph with its decision, the worst first, in one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_modules.prediction.drawing import colours
from results.common.shown import printable

PANELS = ("original", "map", "regions above the threshold")
BUDGET = 15_000_000
"""Bytes of pictures in one page: mail programs seldom take more than 20 MB, and embedding adds a third."""


@dataclass(frozen=True)
class Shown:
    """A photograph on the page.

    Args:
        image: Its path.
        decision: good, defect or cannot tell.
        facts: What to say of it, name and value.
        regions: Of each, left, top, width, height, area in pixels and peak.
        pictures: JPEG files of the `PANELS`; empty if there are none.
        ends: What the two ends of the colour bar mean.
    """

    image: str
    decision: str
    facts: dict[str, str]
    regions: Sequence[tuple[int, int, int, int, int, float]] = ()
    pictures: Sequence[Path] = ()
    ends: tuple[str, str] = ("", "")


def page(title: str, lead: Sequence[str], photographs: Sequence[Shown], folder: str = "") -> str:
    """The page as HTML text.

    Args:
        title: Its heading.
        lead: Paragraphs before the photographs.
        photographs: In their order on the page. Pictures are embedded until `BUDGET` is spent; what comes later is a line of
            a table.
        folder: Where all pictures lie.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pictured, left = [], BUDGET
    for one in photographs:
        left -= sum(file.stat().st_size for file in one.pictures)
        if left < 0:
            break
        pictured.append((one, [_uri("jpeg", file.read_bytes()) for file in one.pictures]))
    rest = photographs[len(pictured) :]
    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["printable"] = printable
    counts = {word: sum(one.decision == word for one in photographs) for word in ("defect", "cannot tell", "good")}
    return environment.get_template("page.html.j2").render(
        title=title, lead=lead, counts=counts, pictured=pictured, rest=rest, folder=folder, panels=PANELS, bar=_bar(),
        style=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
    )  # fmt: skip


def _bar() -> str:
    buffer = io.BytesIO()
    Image.fromarray(colours(np.linspace(0, 1, 256, dtype=np.float32)[None], 0, 1)).save(buffer, "png")
    return _uri("png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
