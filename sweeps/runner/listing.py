"""List the ablations, or the cells of one, with what is known about their cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from results.common.files import read_json
from sweeps.runner import checked_sweep, expansion, prepare
from sweeps.runner.display import duration, short
from sweeps.runner.errors import SweepError
from sweeps.runner.state import DONE, RECORDS, WORK


def show(options: argparse.Namespace, console: Console) -> int:
    """Print the list; return the exit code."""
    profile = prepare.environment(options.profile)["PROFILE"]
    if options.ablation:
        console.print(_cells(checked_sweep.load(options.ablation)))
        return 0
    table = Table(title=f"Ablations (cost with PROFILE={profile}, from the runs so far on this machine)")
    for title in ("ablation", "cells", "cost of all", "what it shows"):
        table.add_column(title, overflow="fold")
    for name in checked_sweep.names():
        try:
            sweep = checked_sweep.load(name)
            count = str(len(sweep.cells()))
            table.add_row(name, count, _cost(sweep.name, profile, int(count)), escape(sweep.description))
        except SweepError as error:
            table.add_row(name, "?", "?", f"[red]{escape(str(error))}[/]")
    console.print(table)
    return 0


def _cost(sweep: str, profile: str, count: int) -> str:
    seconds = [
        record.get("provenance", {}).get("wall_seconds")
        for record in (read_json(path) for path in Path(RECORDS, sweep).glob("*/record.json"))
        if record.get("profile") == profile
    ]
    known = [value for value in seconds if isinstance(value, (int, float))]
    return f"{duration(count * sum(known) / len(known))} of one worker" if known else "no run yet"


def _cells(sweep: checked_sweep.CheckedSweep) -> Table:
    table = Table(title=sweep.name)
    names, cells = sweep.varying, sweep.cells()
    varying = [name for name in expansion.varying(cells) if name != expansion.SEED]
    for title in (*map(short, varying), "runs"):
        table.add_column(title)
    states: dict[str, list[str]] = {}
    for path in sorted(Path(WORK, sweep.name).glob("*/state.json")):
        content = read_json(path)
        key = str([content.get("parameters", {}).get(name) for name in names])
        run = path.parent.name
        # The record alone decides; a runner that was killed left the state before.
        state = DONE if Path(RECORDS, sweep.name, run, "record.json").exists() else content.get("state")
        states.setdefault(key, []).append(f"{run} {state}")
    for cell in cells:
        key = str([cell.parameters[name] for name in names])
        table.add_row(*(str(cell.settings.get(name, "")) for name in varying), "\n".join(states.get(key, [])))
    return table
