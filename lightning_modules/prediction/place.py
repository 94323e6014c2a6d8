"""Where a prediction goes: no earlier one of other images is lost for it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.common.files import read_json

COCO, TABLE, PAGE = "predictions.json", "scores.csv", "predictions.html"


class PlaceError(ValueError):
    """A prediction must not go where it was told to go."""


@dataclass(frozen=True)
class Source:
    """What was predicted, and with what.

    Args:
        run: The record's folder.
        images: Files and folders as they were given, absolute.
    """

    run: str
    images: tuple[str, ...]

    @classmethod
    def of(cls, run: Path, images: Sequence[str | Path]) -> Source:
        return cls(str(run.resolve()), tuple(str(Path(image).expanduser().absolute()) for image in images))

    def as_info(self) -> dict[str, Any]:
        """As it stands in `predictions.json`, by which the next prediction knows it."""
        return {"run": self.run, "images": list(self.images)}


def choose(default: Path, out: str | Path | None, source: Source) -> Path:
    """The folder for a prediction's files.

    Args:
        default: Where it goes unless told otherwise; if that is another's, `<default>-2` and so on.
        out: Where it was told to go.
        source: What is predicted; the same source again takes its earlier files' place.

    Raises:
        PlaceError: `out` holds the prediction of something else, is a file, or lies among the images.
    """
    if out is None:
        places = (default if n == 1 else default.with_name(f"{default.name}-{n}") for n in itertools.count(1))
        return next(place for place in places if _free_or_of(place, source))
    place = Path(out).expanduser()
    if place.exists() and not place.is_dir():
        raise PlaceError(f"OUT={out} is a file: give a folder, which is made if it is missing.")
    if (around := _around(place, source)) is not None:
        raise PlaceError(
            f"OUT={out} lies in {around}, so its pictures would be predicted next time: give another folder."
        )
    if not _free_or_of(place, source):
        info = read_json(place / COCO).get("info") or {}
        of = f" of {', '.join(info['images'])} with {info['run']}" if {"images", "run"} <= set(info) else ""
        raise PlaceError(f"OUT={out} holds a prediction{of}: give another folder, or delete this one.")
    return place


def _around(place: Path, source: Source) -> str | None:
    """The folder of images in which a place lies."""
    real = place.absolute().resolve()
    folders = (folder for folder in source.images if Path(folder).is_dir())
    return next((folder for folder in folders if real.is_relative_to(Path(folder).resolve())), None)


def _free_or_of(place: Path, source: Source) -> bool:
    """Whether a folder holds no prediction, or an earlier one of the same source."""
    if not any((place / name).exists() for name in (COCO, TABLE)):
        return True
    info = read_json(place / COCO).get("info")
    return isinstance(info, dict) and {key: info.get(key) for key in ("run", "images")} == source.as_info()


def replace(new: Path, place: Path) -> None:
    """Puts a finished prediction's files into a place; those of an earlier one go, other files beside them stay."""
    place.mkdir(parents=True, exist_ok=True)
    for file in (*place.glob("[0-9]" * 6 + "-*"), *(place / name for name in (COCO, TABLE, PAGE))):
        file.unlink(missing_ok=True)
    for file in new.iterdir():
        shutil.move(file, place / file.name)
    new.rmdir()
