"""What a run needs that a machine may not have: weights of its backbone, packages, files.

A sweep asks before its first cell and leaves the cells out that lack something. A run of its own does not ask: it ends with
the program's message.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lightning_modules.base import ReconstructionModule
from models.pretrained import cached_file, fetch, hub_answers, package_of

OPTIONS = ("model.class_path", "model.init_args.backbone")
"""Options of every method that decide what is needed; those below and above them count, too."""


def options(method: type[ReconstructionModule]) -> tuple[str, ...]:
    """The options that decide what a run of the method needs, by dotted name."""
    own = () if method.has_backbone else ("trunk", "net", "start")
    return (*OPTIONS, *(f"model.init_args.{name}" for name in (*method.needs_files, *own)))


def method_of(config: Mapping[str, Any]) -> type[ReconstructionModule]:
    """The class of a configuration's method."""
    module, _, name = config["model"]["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def lacking(config: Mapping[str, Any], insisted: bool = False) -> str | None:
    """Why a run cannot be made on this machine now, as a sentence; None if nothing is known to be absent.

    Weights that timm's hub would have to deliver are fetched into its cache, so that a later run finds them there.

    Args:
        config: Of the run, complete, as nested mappings.
        insisted: Whether the user named the weights (`WEIGHTS=`): a run without them is then to fail.
    """
    method, arguments = method_of(config), config["model"]["init_args"]
    if absent := method.absent_package():
        return absent
    for option in method.needs_files:
        path = arguments.get(option)
        if path is None:
            return f"{method.method} needs a file, and none is named: give --model.init_args.{option}=<path>."
        if not Path(path).expanduser().exists():
            return f"{method.method} needs the file {path} (model.init_args.{option}), which does not exist."
    data = config.get("data", {}).get("init_args", {})
    pictures = (data.get("anomalies") or {}).get("folder")
    if pictures and not Path(pictures).expanduser().is_dir():
        return f"{method.method} needs the folder of pictures {pictures} (data.init_args.anomalies.folder), which is not there."
    if not method.has_backbone:
        start = method.starts_from(arguments)
        return None if insisted or start is None else _weights(*start)
    backbone = arguments.get("backbone")
    return None if insisted or not isinstance(backbone, Mapping) else _weights(backbone["name"], backbone["weights"])


def _weights(name: str, weights: str) -> str | None:
    """Why the weights of a backbone are not to be had, or None."""
    import timm  # late: it takes seconds

    if weights in ("random", "auto") or not timm.is_model(name.partition(".")[0]):
        return None
    if weights == "packaged":
        package = package_of(name)
        if package is not None and package.version is None:
            return f"The weights of {name} are in the Python package {package.package}, which is not installed."
        return None
    if weights != "imagenet":
        return None if Path(weights).is_file() else f"The weight file {weights} of {name} does not exist."
    return _from_hub(name)


@cache
def _from_hub(name: str) -> str | None:
    """Why timm cannot deliver the weights of a backbone, or None; they are in its cache then."""
    if cached_file(name):
        return None
    if not hub_answers():
        return f"{name} has no trained weights on this machine: timm's cache has none, and its hub does not answer."
    print(f"Fetching the weights of {name}.", file=sys.stderr, flush=True)
    return None if fetch(name) else f"{name} has no trained weights on this machine: timm's hub did not deliver them."
