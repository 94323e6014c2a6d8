"""The parser of the command line: refuses in plain words, with the nearest name that exists."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.running.earlier import translated
from lightning_modules.running.internals import keep_class_parsers, parser_options
from lightning_modules.running.quick_parser import look_options_up
from results.common.did_you_mean import did_you_mean

_NOISE = ("Given value", "- Expected a <class 'NoneType'>", "Subtypes:", "Errors:", "Does not validate against any of")


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: translated(_load_yaml(text)), (yaml.YAMLError,))
keep_class_parsers()
look_options_up()


class PlainParser(LightningArgumentParser):
    """Ends with one short message, without the usage of two hundred options and without the search through types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "python -m lightning_modules", "allow_abbrev": False, **kwargs})

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """A configuration as text. It was checked when it was read, and is not again."""
        return super().dump(*args, **{"skip_validation": True, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises SystemExit with what was found, where, and the nearest name that would be accepted."""
        lines = essence(message).splitlines()
        parser = getattr(ex, "subcommand_parser", None) or self
        text = "\n".join([*lines, *_hints(message, list(parser_options(parser)))])
        raise SystemExit(f"error: {text}\n`{parser.prog.replace(' [options]', '')} --help` lists all options.") from ex


def essence(message: str) -> str:
    """The parser's message without the lines that tell how it looked at the value."""
    return "\n".join(line for line in message.strip().splitlines() if not line.strip().startswith(_NOISE))


def _hints(message: str, options: list[str]) -> Iterator[str]:
    """Sentences on the unknown names in a message of the parser."""
    for name in re.findall(r"[Uu]nrecognized arguments: --([^\s=]+)", message):
        yield did_you_mean(name, options)
    where = ""
    for line in message.splitlines():
        if found := re.search(r"given class_path '([\w.]+)'", line):
            where = found[1]
        elif found := re.search(r"Option '([\w.]+)' is not accepted", line):
            yield did_you_mean(found[1], class_options(where) if where else options)


def class_options(path: str) -> list[str]:
    """Names of a class's constructor arguments, also of those it hands on; those of dataclasses with dots."""
    module, _, name = path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name))
    return list(parser.get_defaults().keys(branches=True))
