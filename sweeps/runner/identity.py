"""The name of a cell: a hash of everything that determines its result and is known before it runs.

These are the sweep's parameters with the seed, the words of the command, its configuration files, the source code that the
program reaches, the versions of the packages that methods take their networks from, the contents of the data, and the overrides
DATASET, CATEGORIES, BACKBONE and WEIGHTS. What changes no
number (`results.common.deciding`), places on the machine among it, is left out, so that the same cell has the same
name elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from results.common import methods
from results.common.code import code_hash, reached_files, reached_packages
from results.common.contents import content_hashes, data_hash
from results.common.deciding import FREE, LIBRARIES, deciding
from results.common.did_you_mean import did_you_mean
from sweeps.runner import command
from sweeps.runner.checked_sweep import ARGS, CheckedSweep
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell

OVERRIDES = ("DATASET", "DATA_ROOT", "CATEGORIES", "BACKBONE", "WEIGHTS")


@dataclass(frozen=True)
class Dataset:
    """One data set of a run as the profile and the environment name it; `categories` None means all."""

    name: str
    root: Path
    categories: tuple[str, ...] | None


class Identifier:
    """Computes the ids of a sweep's cells; reads configuration, code and data once."""

    def __init__(self, sweep: CheckedSweep, environment: Mapping[str, str], datasets: list[Dataset]) -> None:
        self._sweep = sweep
        self._environment = environment
        self._of_methods: dict[Any, dict[str, Any]] = {}
        self._shared = {
            "command": _words_that_matter(sweep, environment),
            **self._of_method(None),
            "data": [
                [data.name, sorted(data.categories or ()), data_hash(data.root, data.categories)] for data in datasets
            ],
        }

    def _of_method(self, method: str | None) -> dict[str, Any]:
        """Configurations and code, of the sweep's command alone or of a cell with this `method`."""
        if method not in self._of_methods:
            parameters = {} if method is None else {command.METHOD: method}
            files = command.configs(self._sweep.command, self._environment, parameters)
            try:
                roots = code_roots(self._sweep, self._environment, parameters)
                code, libraries = code_hash(roots, Path(".")), reached_packages(roots, Path("."), LIBRARIES)
            except ValueError as error:
                raise SweepError(str(error)) from error
            found: dict[str, Any] = {"configs": [deciding(read_config(path)) for path in files], "code": code}
            if libraries:
                found["libraries"] = {name: _version(name) for name in libraries}
            self._of_methods[method] = found
        return self._of_methods[method]

    def describe(self, cell: Cell, weights: str | None) -> dict[str, Any]:
        """Everything that determines the cell's result, ready for JSON; weights: the cell's WEIGHTS, if any."""
        overrides = {
            key: self._environment[key] for key in ("DATASET", "CATEGORIES", "BACKBONE") if self._environment.get(key)
        }
        if weights:
            file = Path(weights).expanduser()
            overrides["WEIGHTS"] = content_hashes([file], file.parent)[0] if file.is_file() else weights
        own = self._of_method(cell.parameters.get(command.METHOD))
        shared = {}
        if key := methods.of(cell.parameters):
            options = methods.shared(*key, self._environment["PROFILE"])
            shared = {"shared": {k: v for k, v in options.items() if k != "data.init_args.datasets"}}
        return {**self._shared, **own, **shared, "parameters": cell.parameters, "environment": overrides}

    def name(self, cell: Cell, weights: str | None) -> str:
        """The cell's id: 12 hexadecimal digits."""
        text = json.dumps(self.describe(cell, weights), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_config(path: Path) -> dict[str, Any]:
    """A configuration file's content; SweepError if it is missing or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        siblings = sorted(str(other) for other in path.parent.parent.glob(f"*/{path.name}"))
        known = [other.stem for other in path.parent.glob("*.yaml")]
        found = f"There is {', '.join(siblings)}." if siblings else did_you_mean(path.stem, known)
        raise SweepError(f"No configuration {path}. {found} PROFILE chooses the folder in sweeps/profiles/.") from None
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} must be a mapping of the command line's keys to values.")
    return content


def lookup(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key of a nested mapping, or None."""
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _words_that_matter(sweep: CheckedSweep, environment: Mapping[str, str]) -> list[str]:
    """The command's words without the interpreter, the configuration files (their contents count) and run names."""
    words = command.resolve(sweep.command, environment)
    files = {str(path) for path in command.configs(sweep.command, environment)}
    return [
        word
        for word in words
        if word not in files
        and not (word.startswith("--") and FREE.match(word[2:].partition("=")[0]))
        and word not in ("${env}", "${interpreter}", "-u", ARGS)
        and not word.startswith(("SLURM_", "PROFILE="))
    ]


def deciding_files(
    sweep: CheckedSweep, environment: Mapping[str, str], parameters: Mapping[str, Any] | None = None
) -> list[Path]:
    """Source files, configurations and the sweep file that decide a cell's result, as paths below the current folder."""
    source = reached_files(code_roots(sweep, environment, parameters), Path("."))
    return [*sorted(source), *command.configs(sweep.command, environment, parameters or {}), sweep.path]


def code_roots(
    sweep: CheckedSweep, environment: Mapping[str, str], parameters: Mapping[str, Any] | None = None
) -> list[str]:
    """Modules where the search for code starts: the program and the classes that configurations and parameters name.

    parameters: of a cell, for the profile that its `method` names.
    """
    words = command.resolve(sweep.command, environment)
    roots = [f"{after}.__main__" for word, after in itertools.pairwise(words) if word == "-m"]
    roots += [word[:-3].replace("/", ".") for word in words if word.endswith(".py")]
    for path in command.configs(sweep.command, environment, parameters):
        roots += _class_paths(read_config(path))
    for entry in sweep.parameters.values():
        roots += [value for value in [entry.get("value"), *entry.get("values", ())] if isinstance(value, str)]
    return roots


def _version(package: str) -> str:
    """Of an installed package; empty without it, in which case the cell is left out."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "class_path" and isinstance(inner, str):
                yield inner
            else:
                yield from _class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)
