"""`python -m sweeps run|list|data|register|agents|pull`: ablations on this machine and with W&B's server."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from results.common import methods, trouble
from sweeps.runner import checked_sweep, cluster, command, expansion, listing, preflight, prepare
from sweeps.runner.display import Display
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.impossible import methods_that_cannot
from sweeps.runner.local import Job, Runner, check_writable
from sweeps.runner.state import DONE, FAILED, WORK
from sweeps.runner.taken_over import take_over


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code (0 good, 1 cells failed, 2 wrong input, 130 interrupted)."""
    return trouble.told(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        return options.function(options, console)
    except SweepError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    except KeyboardInterrupt:  # before or after the cells: the runner of the cells minds signals itself
        Console(stderr=True).print("Interrupted. The same command goes on from here.")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sweeps", description="Run the ablations in sweeps/.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run every cell of an ablation and print its table")
    run.set_defaults(function=_run)
    run.add_argument("ablation", help="name of a file in sweeps/, or a path to a sweep file")
    run.add_argument("--profile", help="folder in sweeps/profiles/ (default: $PROFILE or demo)")
    run.add_argument("--workers", type=_positive, help="cells at a time without GPUs (default: up to 4, one per core)")
    run.add_argument(
        "--gpus", help="GPU numbers like 0,1, one cell at a time on each, or none (default: all there are)"
    )
    run.add_argument("--seeds", type=_numbers, help="seeds like 0,1,2; every cell runs once with each")
    run.add_argument(
        "--only", action="append", default=[], metavar="KEY=VALUE", help="only these cells; may be repeated"
    )
    run.add_argument("--retry-failed", action="store_true", help="run the cells again that failed before")
    run.add_argument("--count", type=_positive, help="cells of a random search (default: run_cap of the file)")
    run.add_argument("--sampler-seed", type=int, default=0, help="seed of a random search")
    run.add_argument("--no-table", action="store_true", help="do not print the table at the end")

    show = commands.add_parser("list", help="all ablations with their cells and cost, or the cells of one")
    show.set_defaults(function=listing.show)
    show.add_argument("ablation", nargs="?", help="list the cells of this ablation")
    show.add_argument("--profile", help="folder in sweeps/profiles/ (default: $PROFILE or demo)")

    made = commands.add_parser("reference", help="train and publish what results/reference/plan.yaml lists")
    made.set_defaults(function=_reference)
    made.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="a sweep of the plan, or KEY=VALUE; may be repeated"
    )
    made.add_argument("--again", action="store_true", help="also cells whose record other code made")
    made.add_argument("--workers", type=_positive, help="cells at a time (default: one per core)")
    made.add_argument("--dry-run", action="store_true", help="only say what is missing and what it costs")

    again = commands.add_parser(
        "verify", help="run one small cell per method again and compare with its reference record"
    )
    again.set_defaults(function=_verify)
    again.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help="only these, like method=uniad")
    again.add_argument("--workers", type=_positive, help="cells at a time (default: one per core)")

    data = commands.add_parser(
        "data", help="look for the data of a configuration; make it if it is the embedded benchmark"
    )
    data.set_defaults(function=_data)
    data.add_argument("config", type=Path, help="a file like sweeps/profiles/demo/uniad.yaml")

    send = commands.add_parser("register", help="register an ablation with W&B and print how to start agents")
    send.set_defaults(function=cluster.register)
    send.add_argument("ablation", help="name of a file in sweeps/, or a path to a sweep file")
    send.add_argument("--profile", help="folder in sweeps/profiles/ (default: $PROFILE or demo)")
    send.add_argument("--seeds", type=_numbers, help="seeds like 0,1,2; every cell runs once with each")

    work = commands.add_parser("agents", help="run one W&B agent per GPU")
    work.set_defaults(function=cluster.agents)
    work.add_argument("sweep", help="entity/project/sweep, as printed by register")
    work.add_argument("--gpus", help="GPU numbers like 0,1, one agent on each, or none (default: all)")
    work.add_argument("--workers", type=_positive, help="agents without GPUs (default: 1)")

    fetch = commands.add_parser("pull", help="fetch the run records of a W&B sweep")
    fetch.set_defaults(function=cluster.pull)
    fetch.add_argument("sweep", help="entity/project/sweep")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers like 0,1,2")
    return [int(part) for part in parts]


def _data(options: argparse.Namespace, console: Console) -> int:
    variables = prepare.environment(None)
    sets = prepare.datasets([options.config], variables)
    prepare.data(sets, variables["PROFILE"], lambda text: console.print(text, highlight=False))
    return 0


def _reference(options: argparse.Namespace, console: Console) -> int:
    from sweeps.runner import reference  # late: it needs pandas

    return reference.make(options, console)


def _verify(options: argparse.Namespace, console: Console) -> int:
    from sweeps.runner import reference

    return reference.verify(options, console)


def _run(options: argparse.Namespace, console: Console) -> int:
    def say(text: str) -> None:
        console.print(text, highlight=False)

    variables = prepare.environment(options.profile)
    sweep = prepare.chosen(checked_sweep.load(options.ablation), variables)
    only = prepare.only(sweep, options.only, variables)
    every_cell = sweep.cells(options.seeds, options.count, options.sampler_seed)
    variables = prepare.with_shared_data(sweep, every_cell, variables)
    cells = expansion.select(every_cell, only, sweep.path)
    impossible = methods_that_cannot(every_cell, variables)
    _tell_impossible(cells, impossible, say)
    every_cell, cells = _of_others(every_cell, impossible), _of_others(cells, impossible)
    if not cells:
        return 0
    check_writable(WORK)
    # The check takes seconds; on a sweep's first run it goes on beside the other preparations.
    check = preflight.Check(sweep, cells, variables) if not (WORK / sweep.name).exists() else None
    try:
        sets = prepare.datasets(command.configs(sweep.command, variables), variables)
        prepare.data(sets, variables["PROFILE"], say)
        gpus = prepare.gpus(options.gpus)
        workers = len(gpus) or options.workers or min(4, prepare.cores())
        threads = max(1, prepare.cores() // workers)
        weights = prepare.Weights(sweep, variables, say, sets)
        all_jobs = prepare.jobs(sweep, every_cell, variables, sets, weights, threads)
        if not variables.get("ARGS"):  # agents got none, or others
            taken = take_over(all_jobs, sweep, variables, sets)
            if taken:
                say(f"{len(taken)} cells have a record that W&B's agents made; they are not run again.")
        jobs = [job for job in all_jobs if job.cell in cells]
        left_out: dict[int, str] = {}
        if not all(job.finished() for job in jobs):
            check = check or preflight.Check(sweep, cells, variables)
            left_out = _left_out(jobs, cells, check.finish())
    finally:
        if check is not None:
            check.stop()
    varying = expansion.varying(cells) or expansion.varying(every_cell)
    display = Display(
        console,
        f"{sweep.name} ({variables['PROFILE']})",
        varying,
        sweep.metric.get("name", ""),
        min(workers, len(jobs)),
    )
    if left_out:
        _tell_left_out(jobs, left_out, display)
        jobs = [job for place, job in enumerate(jobs) if place not in left_out]
    runner = Runner(
        jobs, display, workers, gpus, retry_failed=options.retry_failed, data_roots=[data.root for data in sets]
    )
    runner.run()
    complete = _report(jobs, display)
    if runner.interrupted:
        display.say("The same command goes on from here.")
        return 130
    finished = [job.run for job in all_jobs if job.finished()]
    table = 0
    if finished and not options.no_table:
        words = [sys.executable, "-m", "results", "sweep", sweep.name, "--profile", variables["PROFILE"]]
        # Records that other code, data or settings made of the same cells stay in results/, but not in this table.
        words += [word for run in finished for word in ("--runs", f"{sweep.name}/{run}")]
        table = subprocess.run(words, env=variables).returncode
    return table if complete else 1


def _of_others(cells: list[Cell], impossible: dict[str, str]) -> list[Cell]:
    return [cell for cell in cells if not impossible or cell.parameters[methods.METHOD] not in impossible]


def _tell_impossible(cells: list[Cell], impossible: dict[str, str], say: Callable[[str], None]) -> None:
    """A line for each method that was asked for and has no place in the experiment."""
    wanted = [cell.parameters[methods.METHOD] for cell in cells if methods.of(cell.parameters)]
    for name in dict.fromkeys(wanted):
        if name in impossible:
            say(f"[bold yellow]left out[/] {name}: {escape(impossible[name])}")


def _left_out(jobs: list[Job], cells: list[Cell], reasons: list[str | None]) -> dict[int, str]:
    """Place of each job that cannot run on this machine -> why; what has its record already is not among them."""
    return {
        place: reason
        for place, job in enumerate(jobs)
        if not job.finished() and (reason := reasons[cells.index(job.cell)])
    }


def _tell_left_out(jobs: list[Job], left_out: dict[int, str], display: Display) -> None:
    """Name the cells that are left out, below the reason that they share."""
    for reason in dict.fromkeys(left_out.values()):
        places = [place for place, why in left_out.items() if why == reason]
        display.say(f"[bold yellow]left out[/], {len(places)} of {len(jobs)} cells: {escape(reason)}")
        for place in places:
            display.say(f"  [dim]|[/] {display.label(jobs[place])}")


def _report(jobs: list[Job], display: Display) -> bool:
    """Tell what is missing and why; return whether every cell is done."""
    missing = [job for job in jobs if job.state != DONE]
    for job in missing:
        if job.state == FAILED:
            display.say(f"\n[bold red]failed[/] {display.label(job)}  (exit code {job.exit_code}, log {job.log})")
            for line in job.log_lines:
                display.say(f"  [dim]|[/] {escape(line)}")
    if any(job.state == FAILED for job in missing):
        display.say("\nOnce the cause is fixed, run the same sweep with RETRY_FAILED=1.")
    if missing:
        display.say(f"[bold]{len(missing)} of {len(jobs)} cells have no result.[/]")
    return not missing


if __name__ == "__main__":
    sys.exit(main())
