"""The frozen weights that a run had, found again on this machine; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.pretrained import cached_file
from models.weight_files import file_sha256


def recorded_weights(
    options: Mapping[str, Any], recorded: Mapping[str, Any], folders: Sequence[Path], given: str | Path | None = None
) -> str:
    """The option `backbone.weights` that gives the weights of a finished run, whatever its configuration says.

    Args:
        options: The configuration's `backbone`.
        recorded: The record's `backbone`: name, weights (imagenet, packaged, random or file), source, sha256.
        folders: Where a weight file may lie besides its recorded path.
        given: The path of the weight file, if the caller knows it.

    Raises:
        FileNotFoundError: a weight file, or timm's weights in its cache, are missing.
        ValueError: the file at hand is another one.
    """
    kind, name = recorded["weights"], recorded["name"]
    if kind not in ("imagenet", "packaged", "random", "file"):
        raise ValueError(f"The record's backbone has weights {kind!r}; known are imagenet, packaged, random and file.")
    if kind == "imagenet" and cached_file(name) is None:
        raise FileNotFoundError(
            f"The run's backbone {name} has timm's ImageNet weights, which are not in timm's cache on this machine, and "
            f"nothing is downloaded: fetch them with `python models/pretrained.py {name}`."
        )
    if kind != "file":
        return kind
    written = Path(str(options.get("weights") or recorded.get("source") or ""))
    places = [Path(given)] if given is not None else [written, *(folder / written.name for folder in folders)]
    there = [place for place in places if place.is_file()]
    fitting = next((place for place in there if file_sha256(place) == recorded.get("sha256")), None)
    if fitting is not None:
        return str(fitting)
    wanted = f"sha256 {str(recorded.get('sha256'))[:12]}"
    if there:
        raise ValueError(
            f"{there[0]} is not the file of the run's backbone {name}: its sha256 is {file_sha256(there[0])[:12]}, the "
            f"run's {wanted}."
        )
    raise FileNotFoundError(
        f"The file of the run's backbone {name} ({wanted}) is not at {' or '.join(dict.fromkeys(map(str, places)))}: give "
        "its path as backbone_file."
    )
