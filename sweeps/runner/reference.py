"""`make reference` and `make verify`: train what the plan lists into reference records, and run its small cells again.

Cells are trained as `make sweep` trains them, into `results/runs`, so that whatever is finished there is used; then each
record is copied, without paths of the machine, to `results/reference`. What is there already is skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from results.aggregator import reference
from results.aggregator.records import RecordError, StoredRecord, read_record
from results.aggregator.spec import spec_for_sweep
from results.aggregator.sweep_cells import cell_key
from results.aggregator.verify import compare
from results.common.code import unchanged_since
from results.common.did_you_mean import did_you_mean
from results.common.files import read_json
from sweeps.runner import checked_sweep, expansion, identity, prepare
from sweeps.runner.display import Display, duration
from sweeps.runner.errors import SweepError
from sweeps.runner.local import Job, Runner, check_writable
from sweeps.runner.state import DONE, RECORDS, WORK

AGAIN = WORK / "verify"
"""Where `make verify` trains."""
LARGEST = 30_000_000
"""Bytes that the reference records may take together."""
_PICTURES = ("default", "all", "none")


@dataclass(frozen=True)
class Entry:
    """One line of the plan.

    Args:
        sweep: Name of the sweep.
        seeds: Every cell is trained once with each.
        dataset, root, categories: Data other than the profile's.
        setting: `unified` or `per_category`, in sweeps that can be either.
        compare: Which experiment of the sweep `methods`; `recipe` if empty.
        only: Conditions like `method=uniad,padim` that choose among the sweep's cells.
        minutes: Of one worker per cell, for the estimate before any record tells it.
        pictures: Which cells keep heat maps: of the `default` row, `all` or `none`; always of the first seed only.
    """

    sweep: str
    seeds: tuple[int, ...] = (0,)
    dataset: str = ""
    root: str = ""
    categories: tuple[str, ...] = ()
    setting: str = ""
    compare: str = ""
    only: tuple[str, ...] = ()
    minutes: float | None = None
    pictures: str = "default"

    @property
    def title(self) -> str:
        """The sweep, and the data if it is not the profile's; setting and experiment if they are chosen."""
        place = self.root or self.dataset
        named = f"{self.sweep} on {place}" if place else self.sweep
        return ", ".join(filter(None, (named, self.setting, self.compare)))


@dataclass
class Planned:
    """An entry with its jobs, the code that makes them, and the reference record of each, if there is one."""

    entry: Entry
    sweep: checked_sweep.CheckedSweep
    variables: Mapping[str, str]
    jobs: list[Job]
    roots: dict[str, list[str]]
    there: dict[str, StoredRecord]
    sets: list[identity.Dataset]

    def missing(self, again: bool) -> list[Job]:
        """The jobs without a record; with `again` also those whose record other code made."""
        return [
            job for job in self.jobs if job.run not in self.there or (again and reference.is_older(self.there[job.run]))
        ]


def read_plan(path: Path) -> list[Entry]:
    """The plan's entries; SweepError names what cannot be understood."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, list):
        raise SweepError(f"{path} must be a list of entries like {{sweep: uniad_components, seeds: [0]}}.")
    entries = []
    known = tuple(Entry.__dataclass_fields__)
    for number, item in enumerate(content, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict) or "sweep" not in item:
            raise SweepError(f"{where} is {item!r}; it needs a sweep.")
        for key in item:
            if key not in known:
                raise SweepError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), known)}")
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in item.items()}
        entry = Entry(**given)
        if entry.pictures not in _PICTURES:
            raise SweepError(f"{where}: pictures is {entry.pictures!r}; allowed are {', '.join(_PICTURES)}.")
        if not entry.seeds or not all(isinstance(seed, int) for seed in entry.seeds):
            raise SweepError(f"{where}: seeds is {entry.seeds!r}; it is a list of whole numbers.")
        if not isinstance(entry.only, tuple) or not all("=" in str(condition) for condition in entry.only):
            raise SweepError(f"{where}: only is {entry.only!r}; it is a list of conditions like method=uniad.")
        entries.append(entry)
    return entries


def plan(entry: Entry, threads: int, say: Callable[[str], None], results: Path | None = None) -> Planned:
    """The entry's jobs; its data is made if it is the embedded benchmark.

    results: a folder of their own for the runs, beside which nothing counts as finished.
    """
    sweep = checked_sweep.load(entry.sweep)
    base = {key: value for key, value in os.environ.items() if key not in (*identity.OVERRIDES, *prepare.CHOICES)}
    variables = prepare.environment("demo", base)
    for key, value in (
        ("DATASET", entry.dataset),
        ("DATA_ROOT", entry.root),
        ("CATEGORIES", ",".join(entry.categories)),
        ("SETTING", entry.setting),
        ("COMPARE", entry.compare),
    ):
        if value:
            variables[key] = value
    sweep = prepare.chosen(sweep, variables)
    cells = expansion.select(sweep.cells(list(entry.seeds)), list(entry.only), sweep.path)
    variables = prepare.with_shared_data(sweep, cells, variables)
    sets = prepare.datasets(prepare.command.configs(sweep.command, variables), variables)
    prepare.data(sets, "demo", say)
    jobs = prepare.jobs(sweep, cells, variables, sets, prepare.Weights(sweep, variables, say, sets), threads)
    roots = {job.run: sorted(set(identity.code_roots(sweep, variables, job.cell.parameters))) for job in jobs}
    lay = _places(sets)
    there = {}
    for stored in reference.read_reference(reference.FOLDER, sweep.name):
        record = stored.record
        if record.profile == "demo" and reference.places(stored) == lay:
            there[(stored.cell, record.seed)] = stored
    found = {}
    for job in jobs:
        if known := there.get((cell_key(job.cell.parameters), job.cell.parameters.get(expansion.SEED, 0))):
            found[job.run] = known
    if results is not None:
        for job in jobs:
            job.results = results
            job.words.append(f"--run.results={results}")
    return Planned(entry, sweep, variables, jobs, roots, found, sets)


def _places(sets: list[identity.Dataset]) -> list[str]:
    """Names of the data sets, categories and folders relative to the project, as records tell them."""
    ours = Path(__file__).resolve().parents[2]
    found = []
    for data in sets:
        root = data.root.resolve()
        place = root.relative_to(ours) if root.is_relative_to(ours) else os.path.relpath(root)
        found.append(f"{data.name} {','.join(data.categories or ())} {place}")
    return found


def make(options: argparse.Namespace, console: Console) -> int:
    """Train what is missing of the plan and publish it; return the exit code."""

    def say(text: str) -> None:
        console.print(text, highlight=False)

    sweeps = [word for word in options.only if "=" not in word]
    conditions = [word for word in options.only if "=" in word]
    entries = read_plan(reference.FOLDER / reference.PLAN)
    known = list(dict.fromkeys(entry.sweep for entry in entries))
    for name in sweeps:
        if name not in known:
            raise SweepError(f"{reference.FOLDER / reference.PLAN} has no sweep {name!r}. {did_you_mean(name, known)}")
    check_writable(WORK)
    workers = options.workers or prepare.cores()
    threads = max(1, prepare.cores() // workers)
    todo: list[tuple[Planned, list[Job]]] = []
    seconds, unknown = 0.0, 0
    for entry in entries:
        if sweeps and entry.sweep not in sweeps:
            continue
        planned = plan(entry, threads, say)
        missing = planned.missing(options.again)
        if conditions:
            cells = expansion.select([job.cell for job in planned.jobs], conditions, checked_sweep.find(entry.sweep))
            missing = [job for job in missing if job.cell in cells]
        train = [job for job in missing if not job.finished()]
        each = _seconds(planned)
        seconds += (each or 0) * len(train)
        unknown += len(train) * (each is None)
        cost = f"about {duration(each * len(train))} of one worker" if each is not None else "cost unknown"
        more = f", {len(train)} to train, {cost}" if train else ""
        published = f", {len(missing) - len(train)} only to be copied" if len(missing) > len(train) else ""
        here = len(planned.jobs) - len(missing)
        say(f"{escape(entry.title)}: {len(planned.jobs)} cells, {here} there or not asked for{more}{published}")
        if missing:
            todo.append((planned, missing))
    beyond = f" and {unknown} cells of unknown cost" if unknown else ""
    say(f"Budget: about {duration(seconds / workers)} with {workers} workers{beyond}.")
    if options.dry_run:
        return 0
    complete = True
    for planned, missing in todo:
        code = _train(planned, missing, workers, console)
        complete &= _publish(planned, missing, say)
        if code:
            say("The same command goes on from here.")
            return code
    size = sum(file.stat().st_size for file in reference.FOLDER.rglob("*") if file.is_file())
    say(f"{reference.FOLDER}: {size / 1e6:.1f} MB of at most {LARGEST / 1e6:.0f}.")
    return 0 if complete and size <= LARGEST else 1


def _seconds(planned: Planned) -> float | None:
    """Seconds of one cell, from the sweep's records, else from the plan."""
    own = [read_json(path).get("provenance", {}) for path in (RECORDS / planned.entry.sweep).glob("*/record.json")]
    own += [stored.record.provenance for stored in planned.there.values()]
    known = [value for item in own if isinstance(value := item.get("wall_seconds"), (int, float))]
    if known:
        return statistics.fmean(known)
    return None if planned.entry.minutes is None else planned.entry.minutes * 60


def _train(planned: Planned, jobs: list[Job], workers: int, console: Console) -> int:
    """Run the jobs as a sweep's; 0, or 130 if a signal or the machine stopped them."""
    varying = expansion.varying([job.cell for job in jobs])
    metric = checked_sweep.load(planned.entry.sweep).metric.get("name", "")
    display = Display(console, planned.entry.title, varying, metric, min(workers, len(jobs)))
    runner = Runner(jobs, display, workers, [], retry_failed=True, data_roots=[data.root for data in planned.sets])
    runner.run()
    for job in jobs:
        if job.state not in (DONE,) and job.log_lines:
            display.say(f"{display.label(job)} has no record: {escape(job.log_lines[-1])}")
    return 130 if runner.interrupted else 0


def _publish(planned: Planned, jobs: list[Job], say: Callable[[str], None]) -> bool:
    """Copy the finished jobs' records; whether all were."""
    spec = spec_for_sweep(planned.entry.sweep)
    complete = True
    for job in jobs:
        if not job.finished():
            complete = False
            continue
        stored = read_record(job.record.parent)
        first = stored.record.seed == planned.entry.seeds[0]
        wanted = {"all": True, "none": False, "default": reference.is_default(stored, spec)}[planned.entry.pictures]
        code = {"hash": job.identity["code"], "roots": planned.roots[job.run], "data": _places(planned.sets)}
        files = identity.deciding_files(planned.sweep, planned.variables, job.cell.parameters)
        committed = unchanged_since(stored.record.provenance.get("git_commit"), files)
        try:
            reference.publish(stored, code, first and wanted, committed=committed)
        except RecordError as error:
            say(f"[bold]left out:[/] {escape(str(error))}")
            complete = False
    return complete


def verify(options: argparse.Namespace, console: Console) -> int:
    """Run the small cells anew and compare; 0 if all agree with their reference records, 1 if not, 2 if none is there."""

    def say(text: str) -> None:
        console.print(text, highlight=False)

    entries = [entry for entry in read_plan(reference.FOLDER / reference.PLAN) if entry.sweep == reference.SMALL]
    if not entries:
        raise SweepError(f"{reference.FOLDER / reference.PLAN} has no entry of the sweep {reference.SMALL}.")
    check_writable(WORK)
    shutil.rmtree(AGAIN, ignore_errors=True)
    workers = options.workers or prepare.cores()
    differing, checked = 0, 0
    for entry in entries:
        planned = plan(entry, max(1, prepare.cores() // workers), say, AGAIN)
        cells = expansion.select([job.cell for job in planned.jobs], options.only, checked_sweep.find(entry.sweep))
        jobs = [job for job in planned.jobs if job.cell in cells]
        for job in [job for job in jobs if job.run not in planned.there]:
            say(f"{_label(job.cell.parameters)}: no reference record; `make reference ONLY={reference.SMALL}` makes it")
        jobs = [job for job in jobs if job.run in planned.there]
        if not jobs:
            continue
        if _train(planned, jobs, workers, console):
            return 130
        for job in jobs:
            name = _label(job.cell.parameters)
            if not job.finished():
                say(f"[bold red]{name}[/]: failed, log {job.log}")
                differing += 1
                continue
            outcome = compare(planned.there[job.run], read_record(job.record.parent))
            checked += 1
            differing += not outcome.agrees
            older = " (older code)" if reference.is_older(planned.there[job.run]) else ""
            say(f"{name}{older}: {escape(outcome.sentence)}")
    if not checked and not differing:
        raise SweepError("Nothing to compare: no small cell has a reference record.")
    say(f"{checked - differing} of {checked} agree." if checked >= differing else f"{differing} failed.")
    return int(bool(differing))


def _label(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get(prepare.command.METHOD) or ", ".join(f"{k}={v}" for k, v in parameters.items()))
