"""Ask the training program's own parser about every cell before the first one runs, and what the cells lack here.

The question is asked in a process of its own (`python -m sweeps.runner.preflight`), because the parser needs torch and the
runner does not: JSON in, JSON out.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from results.common import methods
from results.common.did_you_mean import did_you_mean
from results.common.methods import COMPARE, METHOD
from sweeps.runner import command
from sweeps.runner.checked_sweep import CheckedSweep
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell, unique

PROGRAM = "lightning_modules"
# Parameters that decide which other keys exist.
_CHOOSES_KEYS = re.compile(rf"config|model|data|{METHOD}|{COMPARE}|.*\.class_path")
# Options that nothing but the parser looks at before the model is made: it checks every value that one of them is given in a
# command, not only the last.
_OWN = re.compile(r"model\.init_args(?!\.image_size$)")
_STANDS_FOR_FILES = ("config", METHOD, COMPARE)


class Check:
    """The check of a sweep's cells, running beside the other preparations from its construction on."""

    def __init__(self, sweep: CheckedSweep, cells: list[Cell], variables: Mapping[str, str]) -> None:
        self._sweep = sweep
        self._cells = cells
        self._variables = variables
        self._process: subprocess.Popen[str] | None = None
        # Another program than ours, as in tests, has no parser to ask.
        if PROGRAM not in command.resolve(sweep.command, variables):
            return
        with tempfile.TemporaryFile("w+") as question:  # a pipe would hold this process up until the other one reads
            json.dump(self._question(), question)
            question.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.runner.preflight"],
                stdin=question,
                stdout=subprocess.PIPE,
                text=True,
                env=dict(variables),
            )

    def finish(self) -> list[str | None]:
        """Wait for the answer; SweepError if the program would refuse a key or a value of a cell.

        Returns, per cell, why it cannot run on this machine (weights, a package or a file that is absent), or None.
        """
        if self._process is None:
            return [None] * len(self._cells)
        answer, _ = self._process.communicate()
        if self._process.returncode:
            raise SweepError(f"{self._sweep.path} could not be checked: {PROGRAM} does not start; see above.")
        problem, lacking = json.loads(answer.splitlines()[-1])
        if problem is not None:
            raise SweepError(self._explain(problem))
        return lacking

    def stop(self) -> None:
        """Give up a check that is no longer wanted."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _question(self) -> list[dict[str, Any]]:
        """Per group of cells with the same options: arguments without and with each single value, and the whole cells."""
        groups: dict[str, list[Cell]] = {}
        places: dict[str, list[int]] = {}
        for place, cell in enumerate(self._cells):
            groups.setdefault(json.dumps(_chosen(cell)), []).append(cell)
            places.setdefault(json.dumps(_chosen(cell)), []).append(place)
        return [
            {
                "base": self._arguments(_chosen(cells[0])),
                "values": [
                    [key, str(value), self._arguments(_chosen(Cell({**cells[0].parameters, key: value}), key))]
                    for key in cells[0].parameters
                    if key not in _STANDS_FOR_FILES
                    for value in unique([cell.parameters[key] for cell in cells])
                ],
                "whole": self._arguments(cells[0].parameters),
                "cells": [
                    [place, cell.parameters, self._arguments(cell.parameters)]
                    for place, cell in zip(places[group], cells, strict=True)
                ],
            }
            for group, cells in groups.items()
        ]

    def _arguments(self, parameters: Mapping[str, Any]) -> list[str]:
        """What the program gets as its arguments."""
        words = command.expand(self._sweep.command, parameters, "python", self._variables)
        return words[words.index(PROGRAM) + 1 :]

    def _explain(self, problem: dict[str, Any]) -> str:
        path = self._sweep.path
        configs = ", ".join(map(str, command.configs(self._sweep.command, self._variables))) or "its method's profile"
        if problem["what"] == "base":
            return f"{configs}, the profile of {path}, is refused by the program:\n{problem['message']}"
        if problem["what"] == "whole":
            return f"{path}: its values are refused together with {configs} by the program:\n{problem['message']}"
        key = problem["key"]
        if problem["what"] == "key":
            hint = did_you_mean(key, problem["known"])
            return f"{path}: parameter {key!r} is not an option of the program with {configs}. {hint}"
        return f"{path}: value {problem['value']} of parameter {key!r} is refused by the program:\n{problem['message']}"


def _chosen(cell: Cell, key: str | None = None) -> dict[str, Any]:
    """The parameters that decide which keys exist, and one more, in their order."""
    return {name: value for name, value in cell.parameters.items() if name == key or _CHOOSES_KEYS.fullmatch(name)}


def _answer(question: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first problem, or None; runs in a process of its own."""
    from sweeps.runner.program import Parser

    parser = Parser()
    for group in question:
        if problem := _first_problem(parser, group):
            return problem
    return None


def _lacking(question: list[dict[str, Any]]) -> list[str | None]:
    """Per cell, in their order, why it cannot run on this machine, or None; runs in a process of its own."""
    from sweeps.runner.program import Parser, Refusal, needs

    parser = Parser()
    found: dict[int, str | None] = {}
    for group in question:
        options: tuple[str, ...] = ()
        known: dict[str, str | None] = {}  # cells with the same needs are looked up once
        for place, parameters, arguments in group["cells"]:
            if not options or _part(parameters, options) not in known:
                try:
                    options, reason = needs(parser.parse(arguments))
                except Refusal:  # values that are refused together: the cell says so itself
                    found[place] = None
                    continue
                if reason is None and (methods.of(parameters) or ("", ""))[1] == "matched":
                    # Not the backbone and the image size that the profile was made for.
                    reason = parser.unbuildable([*arguments, "--model.init_args.backbone.weights=random"]) or None
                known[_part(parameters, options)] = reason
            found[place] = known[_part(parameters, options)]
    return [found[place] for place in sorted(found)]


def _part(parameters: Mapping[str, Any], options: tuple[str, ...]) -> str:
    """The parameters that are one of some options, or above or below one."""
    return json.dumps({name: value for name, value in parameters.items() if _among(name, options)})


def _among(name: str, options: tuple[str, ...]) -> bool:
    """Whether a parameter is one of some options, one below them or one above them."""
    return any(f"{name}.".startswith(f"{option}.") or f"{option}.".startswith(f"{name}.") for option in options)


def _accepted(parser: Any, group: dict[str, Any]) -> bool:
    """Whether the program takes cells that together have every value; then no value has to be asked for by itself.

    The method's own options are all in the first cell's command; its own values come last there, so they count.
    """
    from sweeps.runner.program import Refusal

    together = _together(group)
    left = {(key, value) for key, value, _ in group["values"]}
    cells = [({(key, str(value)) for key, value in given.items()}, words) for _, given, words in group["cells"]]
    while left:
        own, words = max(cells, key=lambda cell: len(cell[0] & left))
        more = sorted(together & left - own)
        last = sorted(together & own) if more else []
        try:
            parser.parse([*words, *(f"--{key}={value}" for key, value in more + last)])
        except Refusal:
            return False
        left -= own | together
    return bool(group["values"])


def _together(group: dict[str, Any]) -> set[tuple[str, str]]:
    """The values that one command may have one after another, each in the place of the one before.

    Of mappings with other keys, and of nested ones, a later one would leave parts of an earlier one.
    """
    found: dict[str, list[Any]] = {}
    for _, given, _ in group["cells"]:
        for key, value in given.items():
            found.setdefault(key, []).append(value if isinstance(value, Mapping) else {key: value})
    return {
        (key, value)
        for key, value, _ in group["values"]
        if _OWN.match(key)
        and len({tuple(parts) for parts in found[key]}) == 1
        and not any(
            "image_size" in parts or any(isinstance(p, Mapping) for p in parts.values()) for parts in found[key]
        )
    }


def _first_problem(parser: Any, group: dict[str, Any]) -> dict[str, Any] | None:
    from sweeps.runner.program import Refusal

    if _accepted(parser, group):
        return None
    found: dict[str, Any] = {"what": "base"}
    try:
        known = list(_known(parser.parse(group["base"])))
        for key, value, arguments in group["values"]:
            if not any(key == name or (key.startswith(f"{name}.") and empty) for name, empty in known):
                return {"what": "key", "key": key, "known": [name for name, _ in known]}
            found = {"what": "value", "key": key, "value": value}
            parser.parse(arguments)
        found = {"what": "whole"}
        parser.parse(group["whole"])
    except Refusal as refusal:
        return {**found, "message": str(refusal)}
    return None


def _known(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted keys of a nested configuration, and whether the key has no value that would show the keys below it."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        yield name, value is None or (isinstance(value, Mapping) and not value)
        if isinstance(value, Mapping):
            yield from _known(value, f"{name}.")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is answered by the asker
    asked = json.load(sys.stdin)
    refused = _answer(asked)
    print(json.dumps([refused, [] if refused else _lacking(asked)]))
