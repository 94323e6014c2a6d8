"""The project's methods by name, and objects from the words of a configuration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

import lightning_modules
from lightning_modules.base import ReconstructionModule

T = TypeVar("T")


def import_methods() -> dict[str, type[ReconstructionModule]]:
    """All methods by name: every subclass of `ReconstructionModule` found in this package's files."""
    found = {}
    for info in pkgutil.iter_modules(lightning_modules.__path__):
        if info.ispkg or info.name == "__main__":
            continue
        module = importlib.import_module(f"lightning_modules.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, ReconstructionModule) and "method" in vars(value):
                found[value.method] = value
    return found


def class_at(path: str) -> type[Any]:
    """The class at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(kind: type[T], section: Mapping[str, Any]) -> T:
    """The object of a configuration's `class_path` and `init_args`, which must be a `kind`.

    Raises:
        ValueError: an argument that the class does not have or refuses; in one sentence.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made")
    try:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
        return instantiate(parser.parse_object({"made": dict(section)})).made
    except (TypeError, ValueError, ArgumentError) as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{section.get('class_path')} cannot be made: {lines[-1] if lines else error}") from error
