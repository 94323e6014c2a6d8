"""A record's configuration is data, whoever made it: it names the project's own classes, and starts nothing else."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_modules.running.backbone import recorded_weights
from lightning_modules.running.settings import work_folder
from results.common.files import restore_replaced
from results.common.untrusted import read_mapping

OURS = ("datamodules.UnifiedDataModule", "datamodules.unified.UnifiedDataModule")
SCHEDULES = "lightning_modules.running.schedules"
"""Functions that give schedules."""
CALLABLE = ("optimizer", "lr_scheduler", "schedule")
"""Keys whose value may be the bare path of a class or a function."""
RUN = (
    "name",
    "sweep",
    "protocol",
    "selection",
    "curve_every",
    "alpha",
    "rule",
    "heatmaps",
    "upload",
    "keep_epochs",
    "compile",
    "cuda_graphs",
)
TRAINER = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "max_epochs", "min_epochs", "max_steps", "min_steps",
    "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "deterministic", "benchmark",
    "log_every_n_steps", "sync_batchnorm", "detect_anomaly",
)  # fmt: skip
"""Options of the trainer that a record may set; all are plain words and numbers."""
LARGEST = 2**20
"""Bytes of a configuration; the program's own have a few thousand."""


class UntrustedError(ValueError):
    """A record's configuration asks for what a record may not."""


def as_data(arguments: Sequence[str], methods: Iterable[type]) -> list[str]:
    """The arguments with each configuration of a record replaced by what a record may say.

    Of a record is a configuration with `record.json` beside it, and whatever `predict` is given. Its model and data
    are kept if they name the project's own classes, its trainer's numbers (`TRAINER`), and of its places only those
    that its own place gives.

    Raises:
        UntrustedError: it names a class that is not the project's own, or is none at all.
    """
    out, given = [], list(arguments)
    command = "".join(given[:1])
    predicts = command == "predict"
    while given:
        argument = given.pop(0)
        if argument in ("--config", "-c") and given:
            file = given.pop(0)
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            out.append(argument)
            continue
        path = Path(file)
        if not path.is_file():
            restore_replaced(path.parent.parent)  # where a record lies whose replacing was cut off
        if path.is_file() and not (predicts or (path.parent / "record.json").is_file()):
            _check_text(path)
        elif path.is_file():
            # In a folder of its own: the parser works in a configuration's folder, and could import from there.
            folder = Path(tempfile.mkdtemp(prefix="unirecon-"))
            _left.append(folder)
            path = folder / "config.yaml"
            content = read(Path(file), methods)
            if command in ("validate", "test", "predict"):
                _settle_backbone(content, Path(file).parent)
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        out.append(f"--config={path}")
    return out


def _check_text(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UntrustedError(
            f"{file} is no configuration: it is not UTF-8 text ({error.reason}, byte {error.start})."
        ) from None
    except OSError as error:
        raise UntrustedError(f"{file} cannot be read: {error.strerror}.") from None


def clean_up() -> None:
    """Removes what `as_data` wrote."""
    for folder in _left:
        (folder / "config.yaml").unlink(missing_ok=True)
        folder.rmdir()
    _left.clear()


_left: list[Path] = []


def read(file: Path, methods: Iterable[type]) -> dict[str, Any]:
    """What a record's configuration may say; see `as_data`."""
    if file.stat().st_size > LARGEST:
        raise UntrustedError(f"{file} has {file.stat().st_size:,} bytes: it is no configuration of a run.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8", errors="surrogateescape"))
    except (yaml.YAMLError, RecursionError) as error:
        raise UntrustedError(f"{file} is not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UntrustedError(f"{file} is no configuration: found {type(content).__name__}, not keys and values.")
    kept: dict[str, Any] = {key: content[key] for key in ("seed_everything",) if _plain(content.get(key))}
    for key in ("model", "data"):
        if key in content:
            check(content[key], file, methods)
            kept[key] = content[key]
    run = content.get("run")
    run = {key: run[key] for key in RUN if _plain(run.get(key))} if isinstance(run, dict) else {}
    place = file.resolve().parent
    if len(place.parts) > 3 and place.parts[-3] == "runs":
        run["results"] = _as_given(place.parents[2])
    elif isinstance(content.get("run"), dict) and not (file.parent / "record.json").is_file():
        run["results"] = str(content["run"].get("results") or "results")
    kept["run"] = run
    cache = content.get("cache")
    if isinstance(cache, dict) and _plain(cache.get("mode")):
        kept["cache"] = {"mode": cache["mode"]}
    trainer = content.get("trainer")
    if isinstance(trainer, dict):
        words = {key: trainer[key] for key in TRAINER if _plain(trainer.get(key))}
        kept["trainer"] = {key: word for key, word in words.items() if not (isinstance(word, str) and "." in word)}
        if trainer.get("logger") is False:
            kept["trainer"]["logger"] = False
    return kept


def _settle_backbone(content: dict[str, Any], folder: Path) -> None:
    """The backbone has the weights that the record names, wherever their file lies now; `auto` could find others."""
    # What is missing here is told later: by the parser, by the backbone, or by the checkpoint.
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        backbone = content["model"]["init_args"]["backbone"]
        recorded = read_mapping(folder, "record.json")["backbone"]
        backbone["weights"] = recorded_weights(backbone, recorded, (work_folder(folder), folder))


def check(section: Any, file: Path, methods: Iterable[type]) -> None:
    """Refuses a section `model` or `data` that names anything but the project's own classes.

    Raises:
        UntrustedError: names the class.
    """
    if not isinstance(section, Mapping):
        raise UntrustedError(f"{file}: model and data are a class_path with init_args each, found {section!r}.")
    known = {*OURS, *(f"{method.__module__}.{method.__qualname__}" for method in methods)}
    for path in _paths(section, set()):
        if path not in known and not _schedules(path):
            raise UntrustedError(
                f"{file} names the class {path!r}. A record may only name methods of lightning_modules, "
                f"{OURS[0]}, and optimisers and schedules, torch's or the project's. Put a configuration of your own elsewhere, "
                "without a record.json beside it, and train with it."
            )


def _paths(value: Any, seen: set[int]) -> Iterator[str]:
    """Every class that a section names."""
    if isinstance(value, (Mapping, list)):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == "class_path" or (key in CALLABLE and isinstance(part, str)):
                yield str(part)
            else:
                yield from _paths(part, seen)
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part, seen)


def _schedules(path: str) -> bool:
    """Whether it is an optimiser or a schedule, of torch or of the project."""
    module, _, name = path.rpartition(".")
    if module.split(".")[0] in ("models", "lightning_modules"):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            return False
    elif module in ("torch.optim", "lightning.pytorch.cli") or module.startswith("torch.optim."):
        found = getattr(sys.modules.get(module), name, None)
    else:
        return False
    if module == SCHEDULES:
        return getattr(found, "__module__", "") == module
    kinds = torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler
    return isinstance(found, type) and issubclass(found, kinds)


def _plain(value: Any) -> bool:
    """A number, or a word that cannot be the path of a class."""
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and bool(re.fullmatch(r"[\w=,+-][\w.=,+-]*", value))
    )


def _as_given(folder: Path) -> str:
    """Relative to the working directory if it lies below it, for short paths in messages."""
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
