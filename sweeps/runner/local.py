"""Run the cells of a sweep as separate processes on this machine, without a server.

A cell is finished when its run record exists. Everything else (state, log, checkpoints) lies in the working folder and
may be lost at any moment without harm: the next run of the same sweep goes on from what is there.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.markup import escape

from results.common.files import read_json, restore_replaced, write_json, write_text
from results.common.lock import Lock
from sweeps.runner.display import Display
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.process import CellProcess
from sweeps.runner.state import DONE, FAILED, INTERRUPTED, RECORDS, RUNNING, WAITING, WORK, last_lines
from sweeps.runner.warm import AVAILABLE, WarmStarts

_POLL = 0.2  # seconds between two looks at the running cells
_ELSEWHERE = 2.0  # seconds between two looks at cells that another runner works on
_LEAST_DISK = 32 << 20  # bytes; with less, a failure is taken for a full disk
STATE, PARAMETERS, IDENTITY = WRITTEN = ("state.json", "sweep_parameters.yaml", "identity.json")
"""What the runner writes of a cell into its folder."""
# Signals that come from outside: the cell did not fail by itself and is taken up again by the next run.
_OUTSIDE = {signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


@dataclass
class Job:
    """One cell with its command line and what is known about its run."""

    cell: Cell
    sweep: str
    run: str
    words: list[str]
    environment: dict[str, str]
    identity: dict[str, Any]
    results: Path = WORK.parent  # what --run.results among the words says, if it is there
    state: str = WAITING
    elsewhere: bool = False
    seconds: float | None = None
    exit_code: int | None = None
    log_lines: list[str] = field(default_factory=list)
    started: float = 0.0
    pid: int | None = None

    @property
    def work(self) -> Path:
        """Working folder: state, log, checkpoints."""
        return self.results / WORK.name / self.sweep / self.run

    @property
    def record(self) -> Path:
        """The run record's main file; it exists only if the record is complete."""
        return self.results / RECORDS.name / self.sweep / self.run / "record.json"

    @property
    def log(self) -> Path:
        """Everything that the cell printed, all attempts."""
        return self.work / "log.txt"

    def progress(self) -> dict[str, Any]:
        """What the program last wrote about its progress; {} before the first time."""
        return read_json(self.work / "progress.json")

    def result(self, metric: str) -> float | None:
        """The finished run's value of a metric, averaged over categories; None if the record does not have it."""
        try:
            with self.record.with_name("metrics.csv").open(newline="") as file:
                values = [
                    row["value"]
                    for row in csv.DictReader(file)
                    if (row["variant"], row["scope"], row["metric"]) == ("", "mean", metric) and row["value"]
                ]
            return sum(map(float, values)) / len(values) if values else None
        except (OSError, ValueError, KeyError):
            return None

    def finished(self) -> bool:
        """Whether the run record exists; SweepError if it is damaged."""
        if not self.record.exists():
            return False
        if not read_json(self.record):
            raise SweepError(f"{self.record} is damaged. Move {self.record.parent} away and start the sweep again.")
        return True

    def write_state(self) -> None:
        """Write the state for later runners and readers."""
        content = {
            "state": self.state,
            "parameters": self.cell.parameters,
            "host": socket.gethostname(),
            "runner": os.getpid(),
            "pid": self.pid,
            "started": self.started or None,
            "seconds": self.seconds,
            "exit_code": self.exit_code,
            "last_lines": self.log_lines,
        }
        write_json(self.work / STATE, content)


@dataclass(frozen=True)
class Running:
    """A job at work: its process, the lock that both hold, and the slot that it takes."""

    job: Job
    process: CellProcess
    lock: Lock
    slot: int


def _clear(job: Job) -> None:
    """Removes what a killed runner left half-written of a job's files, unless another runner is at the job."""
    if left := [part for name in WRITTEN for part in job.work.glob(f".{name}.*")]:
        lock = Lock(job.work / "lock")
        if lock.acquire():
            for part in left:
                part.unlink(missing_ok=True)
            lock.release()


class Runner:
    """Works through jobs with one process per slot; a slot is a GPU, or a share of the CPU's cores.

    gpus: GPU numbers, one slot each; [] for `workers` slots without a choice of GPU. data_roots: folders whose loss
    stops the sweep. `run()` returns when every job is done, failed or interrupted.
    """

    def __init__(
        self,
        jobs: list[Job],
        display: Display,
        workers: int,
        gpus: list[str],
        retry_failed: bool = False,
        data_roots: list[Path] | None = None,
    ) -> None:
        self._jobs = jobs
        self._display = display
        self._gpus = gpus
        self._free = list(range(len(gpus) or workers))[::-1]
        self._retry_failed = retry_failed
        self._data_roots = data_roots or []
        self._interrupts = 0
        self._stop_reason = ""
        self._looked_elsewhere = 0.0
        self._running: list[Running] = []
        own = [job for job in jobs if AVAILABLE and WarmStarts.own(job.words, job.environment)]
        self._warm = WarmStarts(own[0].environment, output=subprocess.DEVNULL) if own else None

    @property
    def interrupted(self) -> bool:
        """Whether a signal or a fault of the machine stopped the sweep before its end."""
        return bool(self._interrupts or self._stop_reason)

    def run(self) -> None:
        """Run all jobs. The first Ctrl-C lets the cells stop in order, the second kills them."""
        for folder in {job.record.parents[1] for job in self._jobs}:
            restore_replaced(folder)
        for job in self._jobs:
            self._look_up(job)
        if self._warm is not None and self._waiting():
            self._warm.prepare()
        try:
            with self._signals(), self._display.live(self._jobs):
                while self._running or (self._waiting() and not self.interrupted):
                    try:
                        self._step()
                    except OSError as error:
                        self._halt(_explain(error))
                    self._display.refresh()
                    time.sleep(_POLL)
        finally:
            for running in self._running:
                running.process.kill()
            if self._warm is not None:
                self._warm.close()

    def _step(self) -> None:
        for running in tuple(self._running):
            if (code := running.process.poll()) is not None:
                self._end(running, code)
        while self._free and not self.interrupted:
            if not self._start_next():
                break

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs if job.state == WAITING]

    def _look_up(self, job: Job) -> None:
        """Take over what earlier or other runners found out about a job."""
        _clear(job)
        if job.finished():
            job.state = DONE
            return
        known = read_json(job.work / STATE)
        if known.get("state") == FAILED and not self._retry_failed:
            job.state = FAILED
            job.exit_code = known.get("exit_code")
            job.seconds = known.get("seconds")
            job.log_lines = known.get("last_lines") or []

    def _start_next(self) -> bool:
        """Start the first waiting job that nobody else works on; False if there is none."""
        look_elsewhere = time.monotonic() - self._looked_elsewhere >= _ELSEWHERE
        for job in self._waiting():
            if job.elsewhere and not look_elsewhere:
                continue
            if look_elsewhere:
                self._looked_elsewhere = time.monotonic()
            lock = Lock(job.work / "lock")
            job.elsewhere = not lock.acquire()
            if job.elsewhere:
                continue
            # Another runner may have ended it between the first look and the lock.
            self._look_up(job)
            if job.state != WAITING:
                lock.release()
                self._display.ended(job, "by another runner")
                continue
            try:
                self._start(job, lock)
            except BaseException:
                lock.release()
                raise
            job.write_state()
            return True
        return False

    def _start(self, job: Job, lock: Lock) -> None:
        slot = self._free[-1]
        environment = dict(job.environment)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot]
        parameters = {"wandb_version": 1, **{key: {"value": value} for key, value in job.cell.parameters.items()}}
        path = job.work / PARAMETERS
        write_text(path, yaml.safe_dump(parameters, sort_keys=False))
        write_json(job.work / IDENTITY, job.identity)
        environment["WANDB_SWEEP_PARAM_PATH"] = str(path.resolve())
        (job.work / "progress.json").unlink(missing_ok=True)
        job.started = time.time()
        process = CellProcess(job.words, environment, job.log, lock.descriptor, self._warm)
        self._free.pop()
        self._running.append(Running(job, process, lock, slot))
        job.pid, job.state = process.pid, RUNNING
        self._display.started(job)

    def _end(self, running: Running, code: int) -> None:
        job = running.job
        job.seconds = time.time() - job.started
        job.exit_code = code
        job.log_lines = last_lines(job.log)
        from_outside = (code < 0 and -code in _OUTSIDE) or code == 128 + signal.SIGTERM
        if job.finished():
            job.state = DONE
        elif self.interrupted or from_outside:
            job.state = INTERRUPTED
        elif reason := self._machine_fault(job.log_lines):
            job.state = INTERRUPTED
            self._halt(reason)
        else:
            job.state = FAILED
            if code == 0:
                job.log_lines.append(f"The program ended without an error, but wrote no {job.record}.")
        self._running.remove(running)
        self._free.append(running.slot)
        try:
            job.write_state()
        finally:
            running.lock.release()
            self._display.ended(job, "killed from outside, out of memory?" if code == -signal.SIGKILL else "")

    def _machine_fault(self, log_lines: list[str]) -> str:
        """Why every other cell would fail as well, or an empty string; log_lines: the end of a failed cell's log."""
        for root in self._data_roots:
            if not root.is_dir():
                return f"The data folder {root} is no longer there. Bring it back and start the sweep again."
        # A large file may not fit where much is free still: then only the cell knows.
        text = "\n".join(log_lines)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in text:
                return _explain(OSError(number, "", _path_in(text)))
        if shutil.disk_usage(WORK).free < _LEAST_DISK:
            return _explain(OSError(errno.ENOSPC, "", str(WORK)))
        return ""

    def _halt(self, reason: str) -> None:
        """Start nothing more and let running cells stop, because of a fault that concerns all."""
        if self._stop_reason:
            return
        self._stop_reason = reason
        self._display.say(f"[bold red]{escape(reason)}[/] Finished cells are kept; nothing is lost.")
        for running in self._running:
            running.process.terminate()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._display.say("Stopping: running cells save their state and go on next time. Ctrl-C again kills them.")
            for running in self._running:
                running.process.terminate()
        else:
            self._display.say("Killing the cells.")
            for running in self._running:
                running.process.kill()


def check_writable(folder: Path) -> None:
    """SweepError if nothing can be written below a folder (read-only, full, not ours)."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LEAST_DISK:
            raise OSError(errno.ENOSPC, "", str(folder))
        try:
            probe.write_text("x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise SweepError(_explain(error)) from error


def _explain(error: OSError) -> str:
    path = Path(error.filename or WORK.parent)
    where = path.parent if path.name.startswith(".") else path  # temporary files need not be named
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({where}). Free some space and start the same sweep again."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{where} cannot be written ({os.strerror(error.errno)}). Run records and logs are written there."
    return f"{where}: {error.strerror or error}."


def _path_in(text: str) -> str:
    """The file that Python's message about a failed write names, or the folder of all results."""
    named = re.findall(r"\[Errno \d+\] [^:\n]+: '([^'\n]+)'", text)
    return named[-1] if named else str(WORK.parent)
