"""The training program's parser, without training: the only file here that imports the program, and only when run."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from lightning_modules.running import requirements
from lightning_modules.running.command_line import UniReconCLI
from lightning_modules.running.filling import with_environment
from lightning_modules.running.parser import essence


class Refusal(Exception):
    """The program would refuse the arguments; the message is the program's."""


class _Built(Exception):
    """The parser is built; nothing of the program beyond it is wanted."""


class Parser(UniReconCLI):
    """Parses many argument lists with the program's parser; no class is instantiated."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore")
        with contextlib.suppress(_Built):
            super().__init__([])

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.parser = parser
        raise _Built

    def parse(self, arguments: list[str]) -> Mapping[str, Any]:
        """The complete configuration of the subcommand as nested mappings; Refusal with the program's message."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                self.config = self.parser.parse_args(with_environment(arguments, os.environ))
                self.subcommand = self.config["subcommand"]
                parsed = self.config[self.subcommand]
                configuration = parsed.as_dict()
                # One model per category lists the data's categories here, and the data may not be there yet.
                parsed.data.init_args.setting = "unified"
                self.before_instantiate_classes()
        except SystemExit as error:
            message = error.code if isinstance(error.code, str) else printed.getvalue().rpartition("error: ")[2]
            raise Refusal(essence(message)) from error
        return configuration

    def unbuildable(self, arguments: list[str]) -> str:
        """Why the model of these arguments cannot be built here, in the program's words; empty if it can."""
        try:
            self.parse(arguments)
            parsed = self.config[self.subcommand]
            self.instantiate(Namespace(model=parsed.model))
        except Refusal:
            raise
        except (ValueError, ImportError, OSError, RuntimeError, SystemExit) as error:
            reasons = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.startswith("  - ")]
            reasons = [reason for reason in reasons if not reason.startswith("Expected a <class 'NoneType'>")]
            return (reasons or str(error).splitlines() or [type(error).__name__])[0]
        return ""


def needs(configuration: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Of a run's complete configuration: the options that decide what it needs, and what is absent of that here, or None."""
    options = requirements.options(requirements.method_of(configuration))
    return options, requirements.lacking(configuration, insisted=bool(os.environ.get("WEIGHTS")))
