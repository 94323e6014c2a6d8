"""The source code that a program reaches by imports, as one hash: what names of cells and the age of records go by."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from results.common.deciding import shows_only


def code_hash(modules: Iterable[str], root: Path) -> str:
    """Hash of the source files below root that the named modules reach by imports.

    Comments, docstrings, layout and the words of errors do not count, and neither do the files of other methods and those
    that only show (`results.common.deciding.SHOWING`): a sweep that took days is not started again for them.
    """
    digest = hashlib.sha256()
    for path in sorted(reached_files(modules, root)):
        digest.update(f"{path.relative_to(root)}\0{_normalised(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def reached_packages(modules: Iterable[str], root: Path, packages: Collection[str]) -> list[str]:
    """Which of some packages the source files that the modules reach import, sorted."""
    found = {name.partition(".")[0] for path in reached_files(modules, root) for name in _read(path, root).imports}
    return sorted(found & set(packages))


def reached_files(modules: Iterable[str], root: Path) -> set[Path]:
    """Source files below root that the modules import, directly or not; parents' `__init__.py` included.

    Files that only show (`results.common.deciding.SHOWING`) are not among them. A package that looks its modules up
    by name counts as a whole, except a program's own (one with `__main__`): which of its classes a run uses is named in
    the run's configuration, and that is where the search starts.
    """
    modules = list(modules)
    programs = {module.split(".")[0] for module in modules if module.endswith(".__main__")}
    found: set[Path] = set()
    looked_up: set[str] = set()
    waiting = [file for module in modules for file in _module_files(module, root)]
    while waiting:
        path = waiting.pop()
        if path in found or shows_only(path.relative_to(root)):
            continue
        found.add(path)
        source = _read(path, root)
        for module in source.imports - looked_up:
            waiting += _module_files(module, root)
        looked_up |= source.imports
        if source.looks_modules_up and path.relative_to(root).parts[0] not in programs:
            waiting += [other for other in path.parent.glob("*.py") if other.name != "__main__.py"]
    return found


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


def unchanged_since(commit: object, files: Iterable[str | Path]) -> bool:
    """Whether a commit has all these files, relative to the current folder, as they are now; False without git."""
    paths = sorted({str(file) for file in files})
    if not str(commit).isalnum():
        return False
    try:
        known = subprocess.run(["git", "ls-tree", "-r", "--name-only", str(commit), "--", *paths], capture_output=True)
        same = subprocess.run(["git", "diff", "--quiet", str(commit), "--", *paths], stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return len(known.stdout.splitlines()) == len(paths) and same.returncode == 0


class _Source(NamedTuple):
    """What a source file reaches."""

    imports: frozenset[str]
    """Dotted names that it imports, wherever in it; relative ones are resolved."""
    looks_modules_up: bool
    """Whether it imports modules whose names it does not write down."""


def _read(path: Path, root: Path) -> _Source:
    return _source(path, path.stat().st_mtime_ns, path.relative_to(root).parent.parts)


@cache
def _source(path: Path, _modified: int, package: tuple[str, ...]) -> _Source:
    imports: set[str] = set()
    names: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            imports.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    by_name = {"import_module", "iter_modules", "walk_packages", "__import__"}
    return _Source(frozenset(imports), not names.isdisjoint(by_name))


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except SyntaxError as error:
        raise ValueError(f"{path} line {error.lineno} is no valid Python: {error.msg}") from error


@cache
def _normalised(path: Path, _modified: int) -> str:
    """The code of a file without comments, docstrings, layout and the words of its errors."""
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
    return ast.unparse(tree)
