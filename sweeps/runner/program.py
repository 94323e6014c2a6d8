"""The training program's parser, without training: the only file here that imports the program, and only when run."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from lightning_modules.running import command_line as cli
from lightning_modules.running.parser import essence
from sweeps.runner.requirements import missing_folder


class Refusal(Exception):
    """The program would refuse the arguments; the message is the program's."""


class _Built(Exception):
    """The parser is built; nothing of the program beyond it is wanted."""


class Parser(cli.UniReconCLI):
    """Parses many argument lists with the program's parser; no class is instantiated."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore")
        with contextlib.suppress(_Built):
            super().__init__(["fit"])

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.parser = parser
        raise _Built

    def parse(self, arguments: list[str]) -> Mapping[str, Any]:
        """The complete configuration of the subcommand as nested mappings; Refusal with the program's message."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                self.config = self.parser.parse_args(cli.with_environment(arguments, os.environ))
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

    def missing(self, arguments: list[str]) -> str:
        """Why the model of these arguments cannot be built here, in the program's words; empty if it can."""
        try:
            configuration = self.parse(arguments)
            if reason := missing_folder(configuration["data"]["init_args"]):
                return reason
            parsed = self.config[self.subcommand]
            self._parser(self.subcommand).instantiate_classes(Namespace(model=parsed.model))
        except Refusal:
            raise
        except (ValueError, ImportError, OSError, RuntimeError, SystemExit) as error:
            reasons = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.startswith("  - ")]
            return (reasons or str(error).splitlines() or [type(error).__name__])[0]
        return ""
