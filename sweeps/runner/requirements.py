"""Which methods of the sweep ``methods`` cannot run here, and why: weights, files, packages or image sizes are missing.

Each method is built once, in a process of its own (``python -m sweeps.runner.requirements``), so that its constructor says
what is missing in the words in which the program itself would: JSON in, JSON out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results.common import methods
from sweeps.runner import command
from sweeps.runner.checked_sweep import CheckedSweep
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.preflight import PROGRAM

_MARK = "REQUIREMENTS "


def impossible(cells: Sequence[Cell], variables: Mapping[str, str]) -> dict[str, str]:
    """method -> why the experiment is not for it, from what is written; SweepError if what is written is wrong."""
    reasons = {}
    for name, compare in dict.fromkeys(key for cell in cells if (key := methods.of(cell.parameters))):
        try:
            methods.profile(name, variables["PROFILE"])
            methods.shared(name, compare, variables["PROFILE"])
        except methods.CannotError as error:
            reasons[name] = str(error)
        except ValueError as error:
            raise SweepError(str(error)) from error
    return reasons


def absent(
    sweep: CheckedSweep, cells: Mapping[str, Cell], weights: Mapping[str, str | None], variables: Mapping[str, str]
) -> dict[str, str]:
    """method -> what it needs and this machine does not have.

    Args:
        sweep: The sweep.
        cells: One cell of each method that is to run.
        weights: The WEIGHTS of these cells, as the runner decided them.
        variables: The sweep's environment.
    """
    if not cells or PROGRAM not in command.resolve(sweep.command, variables):
        return {}
    question = {}
    for name, cell in cells.items():
        words = command.expand(sweep.command, cell.parameters, "python", variables)
        question[name] = {"arguments": words[words.index(PROGRAM) + 1 :], "weights": weights[name]}
    outcome = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        env=dict(variables),
    )
    answers = [line for line in outcome.stdout.splitlines() if line.startswith(_MARK)]
    if outcome.returncode or not answers:
        raise SweepError(f"{sweep.path}: the methods could not be tried; see above.")
    return json.loads(answers[-1].removeprefix(_MARK))


def _answer(question: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """method -> the first line of what its constructor refuses; runs in a process of its own."""
    import os
    import warnings

    from sweeps.runner.program import Parser, Refusal

    parser = Parser()
    warnings.filterwarnings("ignore")
    given, reasons = os.environ.get("WEIGHTS"), {}
    for name, entry in question.items():
        os.environ.pop("WEIGHTS", None)
        if entry["weights"] or given:
            os.environ["WEIGHTS"] = entry["weights"] or given
        try:
            reason = parser.missing(entry["arguments"])
        except Refusal:  # a mistake in a file: the check before the first cell names it
            continue
        if reason:
            reasons[name] = reason
    return reasons


def missing_folder(data: Mapping[str, Any]) -> str:
    """What a data section needs beside the data sets, as a sentence; empty if it is there."""
    folder = (data.get("anomalies") or {}).get("folder")
    if folder and not Path(folder).is_dir():
        return f"it needs the folder of pictures {folder} (data.init_args.anomalies.folder), which is not there"
    return ""


if __name__ == "__main__":
    print(_MARK + json.dumps(_answer(json.load(sys.stdin))))
