"""The first line of trouble: what a user can cause ends in one sentence; `--debug` brings the traceback back."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

DEBUG = "UNIRECON_DEBUG"
"""The variable that does what `--debug` does."""
_ROOMS = ("lightning_modules", "datamodules", "models", "results", "sweeps")


def debugging(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether tracebacks are wanted."""
    wanted = "--debug" in arguments or os.environ.get(DEBUG, "") not in ("", "0")
    return [argument for argument in arguments if argument != "--debug"], wanted


def sentence(error: Exception) -> str:
    """What the error says, with the place in the code if it is not one that we word ourselves."""
    text = str(error).strip() or "no reason given"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    own = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "MisconfigurationException"
    if own or type(error).__module__.split(".")[0] in _ROOMS:
        return f"error: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"error: {type(error).__name__}: {text}{place}\n`--debug` or {DEBUG}=1 shows the whole traceback."


def told(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None, code: int = 2) -> int:
    """Runs a command line; its exit code, or `code` after an error, whose `sentence` goes to standard error.

    Args:
        command: Gets the arguments without `--debug` and returns its exit code.
        arguments: None takes those of the process.
        code: After an error.
    """
    arguments, debug = debugging(sys.argv[1:] if arguments is None else arguments)
    try:
        return command(arguments) or 0
    except Exception as error:
        if debug:
            raise
        print(sentence(error).encode(errors="backslashreplace").decode(), file=sys.stderr)
        return code
