"""The same sweep files with W&B's server: register a sweep, run one agent per GPU, fetch the records.

Everything is done by the unmodified `wandb` program; this file only spares the user its traps.
"""

from __future__ import annotations

import argparse
import contextlib
import netrc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import yaml
from rich.console import Console
from rich.markup import escape

from results.common import methods, untrusted
from results.common.files import write_text
from results.common.shown import printable
from sweeps.runner import checked_sweep, command, preflight, prepare
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import SEED, Cell, draw
from sweeps.runner.impossible import methods_that_cannot
from sweeps.runner.local import check_writable
from sweeps.runner.process import die_with_parent
from sweeps.runner.state import RECORDS, WORK

ARTIFACT = "run-record"
_WITHOUT, _BROKEN = "without a record", "broken"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=,+-]*")  # of a sweep or run, as records have them
_SWEEP = re.compile(r"[^/\s]+/[^/\s]+/[^/\s]+")


def _need_key(variables: Mapping[str, str] = os.environ) -> None:
    """SweepError at once if W&B's client would find no key; it would say so after its imports, or with a trace."""
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(variables.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = [variables["NETRC"]] if variables.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return
    raise SweepError(f"W&B has no API key for {host} here: set WANDB_API_KEY, or type `wandb login` once.")


def register(options: argparse.Namespace, console: Console) -> int:
    """Check a sweep, register it with W&B under the chosen profile and print how to start agents."""
    _need_key()
    variables = prepare.environment(options.profile) | {"WANDB_MODE": "online"}
    sweep = prepare.chosen(checked_sweep.load(options.ablation), variables)
    if variables.get("METHOD"):
        raise SweepError("METHOD does not choose cells of a registered sweep: agents take them all. Leave it out.")
    check_writable(WORK)
    sweep = _of_methods_that_can(sweep, variables, console)
    parameters = dict(sweep.parameters)
    if options.seeds:
        parameters[SEED] = {"values": options.seeds}
    check = preflight.Check(sweep, _examples(sweep, options.seeds), variables)
    check.finish()
    content = yaml.safe_load(sweep.path.read_text())
    content["parameters"] = parameters
    # The agents' machines need not know the profile: it is written into the registered command.
    content["command"] = command.resolve(sweep.command, {"PROFILE": variables["PROFILE"]} | _left_alone(sweep.command))
    path = WORK / sweep.name / "registered.yaml"
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    outcome = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", str(path)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(outcome.stdout, end="")
    found = re.search(r"wandb agent (\S+)", outcome.stdout)
    if outcome.returncode or not found:
        raise SweepError("W&B did not register the sweep; its message is above. `wandb login` sets the API key.")
    console.print(
        f"On each machine, in a clone of this repository: make agents SWEEP={found[1]}\n"
        f"On SLURM: SWEEP={found[1]} sbatch sweeps/slurm.sh",
        highlight=False,
        soft_wrap=True,  # a command in one piece can be copied
    )
    return 0


def _of_methods_that_can(
    sweep: checked_sweep.CheckedSweep, variables: Mapping[str, str], console: Console
) -> checked_sweep.CheckedSweep:
    """The sweep `methods` without those that have no place in the chosen experiment; any other as it is."""
    impossible = methods_that_cannot(sweep.cells() if methods.COMPARE in sweep.parameters else [], variables)
    for name, reason in impossible.items():
        console.print(f"left out {name}: {escape(reason)}", highlight=False)
    if not impossible:
        return sweep
    kept = [name for name in sweep.parameters[methods.METHOD]["values"] if name not in impossible]
    return replace(sweep, parameters={**sweep.parameters, methods.METHOD: {"values": kept}})


def _left_alone(words: tuple[str, ...]) -> dict[str, str]:
    """Variables other than PROFILE, which each agent fills in for itself."""
    names = {name for word in words for name in re.findall(r"\$\{envvar:([A-Z0-9_]*)\}", word)}
    return {name: f"${{envvar:{name}}}" for name in names - {"PROFILE"}}


def _examples(sweep: checked_sweep.CheckedSweep, seeds: list[int] | None) -> list[Cell]:
    """Cells whose keys and values stand for all; a search on the server is represented by one draw."""
    if sweep.method == "grid":
        return sweep.cells(seeds)
    entries = {name: entry for name, entry in sweep.parameters.items() if name != SEED or not seeds}
    return draw(entries, 8, 0)


def agents(options: argparse.Namespace, console: Console) -> int:
    """Run one W&B agent per GPU (or `--workers` agents on the CPU) until the sweep has no more cells.

    Ctrl-C or SIGTERM reach the agents, which pass them on: a cell then reports itself as pre-empted and is handed out
    again. Returns the largest exit code.
    """
    if not _SWEEP.fullmatch(options.sweep):
        raise SweepError(f"SWEEP={options.sweep} must be entity/project/sweep, as `make wandb-sweep` prints it.")
    _need_key()
    gpus = prepare.gpus(options.gpus)
    places: list[str | None] = list(gpus) or [None] * (options.workers or 1)
    running = [_start_agent(options.sweep, gpu, len(places)) for gpu in places]
    console.print(f"{len(running)} agents for {options.sweep}", highlight=False)

    def forward(number: int, frame: FrameType | None) -> None:
        # An agent needs several signals in a row only when its cell does not end: wait, terminate, kill.
        for agent in running:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while any(agent.poll() is None for agent in running):
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    killed = [agent for agent in running if agent.returncode < 0]
    if killed:
        console.print(
            f"{len(killed)} of {len(running)} agents were killed from outside; W&B hands their cells out again. "
            f"Go on with: make agents SWEEP={options.sweep}",
            highlight=False,
        )
    return max(abs(agent.returncode) for agent in running)


def _start_agent(sweep: str, gpu: str | None, count: int) -> subprocess.Popen[bytes]:
    variables = prepare.threads({**os.environ, "WANDB_MODE": "online"}, max(1, prepare.cores() // count))
    variables |= {
        # By default three failed cells in a minute end an agent, with exit code 0.
        "WANDB_AGENT_DISABLE_FLAPPING": "true",
        "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000",
        # ${interpreter} is the word python: let it be this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    return subprocess.Popen(
        [sys.executable, "-m", "wandb", "agent", "--forward-signals", sweep],
        env=variables,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
    )


def pull(options: argparse.Namespace, console: Console) -> int:
    """Fetch the run records of a W&B sweep into `results/runs/`; those that are there already are left alone."""
    if not _SWEEP.fullmatch(options.sweep):
        raise SweepError(f"SWEEP={options.sweep} must be entity/project/sweep, as `make wandb-sweep` prints it.")
    _need_key()
    import wandb

    check_writable(RECORDS)
    try:
        runs = list(wandb.Api().sweep(options.sweep).runs)
    except (ValueError, wandb.errors.CommError) as error:
        raise SweepError(f"W&B has no sweep {options.sweep} that you can read: {error}") from error
    outcomes, broken = [], []
    for run in runs:
        try:
            outcomes.append(_fetch(run))
        except Exception as error:  # whatever one run holds, the others arrive
            outcomes.append(_BROKEN)
            broken.append(f"{run.name}: {error}" if isinstance(error, SweepError) else f"{run.name}: {error!r}")
    counts = [
        f"{outcomes.count(what)} {what}" for what in ("new", "here already", _WITHOUT, _BROKEN)[: 4 if broken else 3]
    ]
    console.print(escape(f"{options.sweep}: runs: {len(runs)}, {', '.join(counts)}"), highlight=False)
    for text in broken:
        console.print(f"[bold red]broken:[/] {escape(printable(text))}", highlight=False)
    missing = [f"{run.name} ({run.state})" for run, what in zip(runs, outcomes, strict=True) if what == _WITHOUT]
    if missing:
        console.print(
            f"Without a record: {escape(printable(', '.join(missing)))}. W&B hands out a failed or crashed cell of a "
            "grid again once its run is deleted on the sweep's page and the sweep resumed.",
            highlight=False,
        )
    return int(bool(missing or broken))


def _fetch(run: Any) -> str:
    """Fetch one run's newest record; the run's folder appears complete or not at all."""
    records = [artifact for artifact in run.logged_artifacts() if artifact.type == ARTIFACT]
    if not records:
        return _WITHOUT
    part = RECORDS / f".pull-{uuid.uuid4().hex}"
    try:
        records[-1].download(root=str(part))
        place = _place(part, run.name)
        if place.exists():
            return "here already"
        place.parent.mkdir(parents=True, exist_ok=True)
        part.rename(place)
        return "new"
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _place(folder: Path, name: str) -> Path:
    """Where a fetched record belongs: the sweep and run that it names itself; SweepError if it does not."""
    try:
        record: Mapping[str, Any] = untrusted.read_mapping(folder, "record.json")
        untrusted.check_files(folder, untrusted.checksums(record))
    except untrusted.UntrustedError as error:
        raise SweepError(f"The record of W&B run {name} is damaged: {error}.") from None
    parts = [record.get("sweep"), record.get("run")]
    fit = [part for part in parts if isinstance(part, str) and _NAME.fullmatch(part)]
    if len(fit) < len(parts):
        raise SweepError(f"The record of W&B run {name} names the sweep and run {parts!r}; it cannot be filed.")
    return RECORDS.joinpath(*fit)
