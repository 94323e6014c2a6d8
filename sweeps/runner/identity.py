"""The name of a cell: a hash of everything that determines its result and is known before it runs.

These are the sweep's parameters with the seed, the words of the command, its configuration files, the source code that the
program reaches, the contents of the data, and the overrides DATASET, CATEGORIES, BACKBONE and WEIGHTS. What changes no
number (:mod:`results.common.deciding`), places on the machine among it, is left out, so that the same cell has the same
name elsewhere.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from results.common import methods
from results.common.contents import content_hashes, data_hash
from results.common.deciding import FREE, deciding, shows_only
from results.common.nearest import did_you_mean
from sweeps.runner import command
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.sweep_file import ARGS, SweepFile

OVERRIDES = ("DATASET", "DATA_ROOT", "CATEGORIES", "BACKBONE", "WEIGHTS")


@dataclass(frozen=True)
class Dataset:
    """One data set of a run as the profile and the environment name it; ``categories`` None means all."""

    name: str
    root: Path
    categories: tuple[str, ...] | None


class Identifier:
    """Computes the ids of a sweep's cells; reads configuration, code and data once."""

    def __init__(self, sweep: SweepFile, environment: Mapping[str, str], datasets: list[Dataset]) -> None:
        self._sweep = sweep
        self._methods: dict[tuple[str, str], dict[str, Any]] = {}
        self._shared = {
            "command": _words_that_matter(sweep, environment),
            "configs": [deciding(read_config(path)) for path in command.configs(sweep.command, environment)],
            "code": code_hash(code_roots(sweep, environment), Path(".")),
            "data": [
                [data.name, sorted(data.categories or ()), data_hash(data.root, data.categories)] for data in datasets
            ],
        }
        self._environment = environment

    def describe(self, cell: Cell, weights: str | None) -> dict[str, Any]:
        """Everything that determines the cell's result, ready for JSON; weights: the cell's WEIGHTS, if any."""
        overrides = {
            key: self._environment[key] for key in ("DATASET", "CATEGORIES", "BACKBONE") if self._environment.get(key)
        }
        if weights:
            file = Path(weights).expanduser()
            overrides["WEIGHTS"] = content_hashes([file], file.parent)[0] if file.is_file() else weights
        own = self._of_method(key) if (key := methods.of(cell.parameters)) else {}
        return {**self._shared, **own, "parameters": cell.parameters, "environment": overrides}

    def _of_method(self, key: tuple[str, str]) -> dict[str, Any]:
        """What a cell of the sweep ``methods`` is besides its command: profile, shared options, and the code they reach."""
        if key not in self._methods:
            profile = self._environment["PROFILE"]
            content = read_config(methods.profile(key[0], profile))
            roots = [*code_roots(self._sweep, self._environment), *_class_paths(content)]
            options = {k: v for k, v in methods.shared(*key, profile).items() if k != "data.init_args.datasets"}
            self._methods[key] = {
                "configs": [deciding(content), options],
                "code": code_hash(roots, Path(".")),
            }
        return self._methods[key]

    def name(self, cell: Cell, weights: str | None) -> str:
        """The cell's id: 12 hexadecimal digits."""
        text = json.dumps(self.describe(cell, weights), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_config(path: Path) -> dict[str, Any]:
    """A configuration file's content; SweepError if it is missing or no mapping."""
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


def code_hash(modules: Iterable[str], root: Path) -> str:
    """Hash of the source files below root that the named modules reach by imports.

    Comments, docstrings, layout and the words of errors do not count, and neither do the files of other methods and those
    that only show (:data:`results.common.deciding.SHOWING`): a sweep that took days is not started again for them.
    """
    digest = hashlib.sha256()
    for path in sorted(reached_files(modules, root)):
        digest.update(f"{path.relative_to(root)}\0{_normalised(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def reached_files(modules: Iterable[str], root: Path) -> set[Path]:
    """Source files below root that the modules import, directly or not; parents' ``__init__.py`` included.

    Files that only show (:data:`results.common.deciding.SHOWING`) are not among them. A package that looks its modules up
    by name counts as a whole, except a program's own (one with ``__main__``): which of its classes a run uses is named in
    the run's configuration, and that is where the search starts.
    """
    modules = list(modules)
    programs = {module.split(".")[0] for module in modules if module.endswith(".__main__")}
    found: set[Path] = set()
    waiting = [file for module in modules for file in _module_files(module, root)]
    while waiting:
        path = waiting.pop()
        if path in found or shows_only(path.relative_to(root)):
            continue
        found.add(path)
        for module in _imports(path, root):
            waiting += _module_files(module, root)
        if path.relative_to(root).parts[0] not in programs and _looks_modules_up(path):
            waiting += [other for other in path.parent.glob("*.py") if other.name != "__main__.py"]
    return found


def _looks_modules_up(path: Path) -> bool:
    """Whether a source file imports modules whose names it does not write down."""
    names = {"import_module", "iter_modules", "walk_packages", "__import__"}
    return any(
        (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names)
        for node in ast.walk(_tree(path, path.stat().st_mtime_ns))
    )


def _module_files(dotted: str, root: Path) -> list[Path]:
    """Files of the longest part of a dotted name that is a module, with its parents; [] if it is not below root."""
    parts = dotted.split(".")
    files = []
    for length in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:length])
        file = base / "__init__.py" if (base / "__init__.py").is_file() else base.with_suffix(".py")
        if not file.is_file():
            break
        files.append(file)
    return files


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a source file imports, wherever in it; relative ones are resolved."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(_tree(path, path.stat().st_mtime_ns)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def _tree(path: Path, _modified: int) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except SyntaxError as error:
        raise SweepError(f"{path} line {error.lineno} is no valid Python: {error.msg}") from error


@cache
def _normalised(path: Path, modified: int) -> str:
    """The code of a file without comments, docstrings, layout and the words of its errors."""
    tree = ast.parse(ast.unparse(_tree(path, modified)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
    return ast.unparse(tree)


def _words_that_matter(sweep: SweepFile, environment: Mapping[str, str]) -> list[str]:
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


def code_roots(sweep: SweepFile, environment: Mapping[str, str]) -> list[str]:
    """Modules where the search for code starts: the program and the classes that configurations and parameters name."""
    words = command.resolve(sweep.command, environment)
    roots = [f"{after}.__main__" for word, after in itertools.pairwise(words) if word == "-m"]
    roots += [word[:-3].replace("/", ".") for word in words if word.endswith(".py")]
    for path in command.configs(sweep.command, environment):
        roots += _class_paths(read_config(path))
    for entry in sweep.parameters.values():
        roots += [value for value in [entry.get("value"), *entry.get("values", ())] if isinstance(value, str)]
    return roots


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
