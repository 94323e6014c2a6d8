"""Turn a sweep file's `command` into the words of a command line, as the W&B agent does."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results.common.did_you_mean import did_you_mean
from sweeps.runner.errors import SweepError

_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_MACROS = (
    "env", "interpreter", "args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags", "args_json",
)  # fmt: skip


def expand(
    command: tuple[str, ...], parameters: Mapping[str, Any], interpreter: str, environment: Mapping[str, str]
) -> list[str]:
    """Words of one cell's command line.

    Values are written with Python's `str` and `${envvar:NAME}` becomes the variable's value, or its name if it is
    not set: both as W&B's agent does it. Raises SweepError for a macro that W&B would drop silently.
    """
    words: list[str] = []
    for word in resolve(command, environment):
        if word.startswith("${") and word.endswith("}"):
            words += _macro(word[2:-1], parameters, interpreter)
        else:
            words.append(word)
    return words


def resolve(command: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
    """The command with every `${envvar:NAME}` filled in."""
    return [_VARIABLE.sub(lambda match: environment.get(match[1], match[1]), word) for word in command]


METHOD = "method"
"""The parameter whose value names a method's profile."""


def configs(
    command: tuple[str, ...],
    environment: Mapping[str, str] = os.environ,
    parameters: Mapping[str, Any] | None = None,
) -> list[Path]:
    """The files that the command names with `--config FILE` or `--config=FILE`, in their order.

    parameters: of a cell. Its `method` names one more, the method's profile.
    """
    words = resolve(command, environment)
    method = (parameters or {}).get(METHOD)
    own = [] if method is None else [Path("sweeps/profiles", environment.get("PROFILE") or "demo", f"{method}.yaml")]
    return [
        *own,
        *(Path(after) for word, after in itertools.pairwise(words) if word == "--config"),
        *(Path(word.partition("=")[2]) for word in words if word.startswith("--config=")),
    ]


def _macro(name: str, parameters: Mapping[str, Any], interpreter: str) -> list[str]:
    if name == "env":
        return ["/usr/bin/env"]
    if name == "interpreter":
        return [interpreter]
    if name == "args":
        return [f"--{key}={value}" for key, value in parameters.items()]
    if name == "args_no_hyphens":
        return [f"{key}={value}" for key, value in parameters.items()]
    if name == "args_no_equals":
        return [word for key, value in parameters.items() for word in (f"--{key}", str(value))]
    if name == "args_no_boolean_flags":
        return [
            f"--{key}" if value is True else f"--{key}={value}"
            for key, value in parameters.items()
            if value is not False
        ]
    if name == "args_json":
        return [json.dumps(dict(parameters))]
    raise SweepError(f"The command has the macro ${{{name}}}. {did_you_mean(name, _MACROS)}")
