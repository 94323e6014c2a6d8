"""Show a running sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.runner.expansion import SEED
from sweeps.runner.state import DONE, FAILED, INTERRUPTED, RUNNING, WAITING

if TYPE_CHECKING:
    from sweeps.runner.local import Job

_HEARTBEAT = 60.0  # seconds between two plain lines about running cells


def short(name: str) -> str:
    """The last part of a dotted key, which is enough to recognise it."""
    return "seed" if name == SEED else name.rsplit(".", 1)[-1]


def duration(seconds: float | None) -> str:
    """Seconds as `41 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Display:
    """Prints what happens to the jobs of a sweep.

    Args:
        console: Where to.
        title: Of the sweep.
        varying: Names of the settings worth showing.
        metric: Name of the metric to show.
        slots: Jobs at a time.
    """

    def __init__(self, console: Console, title: str, varying: tuple[str, ...], metric: str, slots: int) -> None:
        self._console = console
        self._title = title
        self._varying = varying
        self._metric = metric
        self._slots = slots
        self._jobs: list[Job] = []
        self._live: Live | None = None
        self._heartbeat = time.monotonic()

    @contextlib.contextmanager
    def live(self, jobs: list[Job]) -> Iterator[None]:
        """Show the jobs until the block ends."""
        self._jobs = jobs
        kept = sum(job.state == DONE for job in jobs)
        failed = sum(job.state == FAILED for job in jobs)
        self.say(
            f"[bold]{self._title}[/]: {len(jobs)} cells, {self._slots} at a time"
            + (f", {kept} finished before" if kept else "")
            + (f", {failed} failed before (RETRY_FAILED=1 runs them again)" if failed else "")
        )
        if not self._console.is_terminal or not any(job.state == WAITING for job in jobs):
            yield
            return
        with Live(self._render(), console=self._console, refresh_per_second=4, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def refresh(self) -> None:
        """Bring the display up to date."""
        if self._live is not None:
            self._live.update(self._render())
        elif time.monotonic() - self._heartbeat > _HEARTBEAT:
            self._heartbeat = time.monotonic()
            for job in self._jobs:
                if job.state == RUNNING:
                    progress = job.progress()
                    parts = (_epoch_text(progress), self._metric_so_far(progress), duration(time.time() - job.started))
                    self._line(f"{self._count(job)} running ", self.label(job), "  ".join(filter(None, parts)))
            self.say(f"{self._summary()}, time left {self._left()}")

    def say(self, text: str) -> None:
        """Print a line with rich's markup; lines are not wrapped outside a terminal."""
        self._console.print(text, soft_wrap=True, highlight=False)

    def started(self, job: Job) -> None:
        """Tell that a job started."""
        if self._live is None:
            self._line(f"{self._count(job)} start   ", self.label(job))

    def ended(self, job: Job, note: str = "") -> None:
        """Tell how a job ended."""
        colour = {DONE: "green", FAILED: "red", INTERRUPTED: "yellow"}[job.state]
        value = job.result(self._metric) if self._metric else None
        metric = "" if value is None else f"{self._metric} {value:.4g}"
        took = f" in {duration(job.seconds)}" if job.seconds is not None else ""
        notes = "  ".join(text for text in (metric, note) if text)
        self._line(f"{self._count(job)} [{colour}]{job.state}[/]{took:12}", self.label(job), notes)

    def _line(self, *parts: str) -> None:
        """Prints the parts of a line; on a terminal too narrow for it, each below the other."""
        line = "  ".join(filter(None, parts))
        if self._console.is_terminal and Text.from_markup(line).cell_len > self._console.width:
            line = "\n      ".join(part.strip() for part in parts if part)
        self.say(line)

    def label(self, job: Job) -> str:
        """The job's varying settings in short."""
        settings = job.cell.settings
        text = "  ".join(f"{short(name)}={settings[name]}" for name in self._varying if name in settings)
        return escape(text or job.run)

    def _metric_so_far(self, progress: dict[str, Any]) -> str:
        """The sweep's metric if the program scores it during training, else its loss."""
        metrics = progress.get("metrics") or {}
        for wanted in filter(None, (self._metric, "loss")):
            for name, value in metrics.items():
                if name.rsplit("/", 1)[-1] == wanted and isinstance(value, (int, float)):
                    return escape(f"{name} {value:.4g}")
        return ""

    def _count(self, job: Job) -> str:
        width = len(str(len(self._jobs)))
        return escape(f"[{self._jobs.index(job) + 1:{width}}/{len(self._jobs)}]")

    def _summary(self) -> str:
        states = [job.state for job in self._jobs]
        parts = [f"{states.count(DONE)} of {len(states)} done"]
        parts += [f"{states.count(state)} {state}" for state in (FAILED, INTERRUPTED) if state in states]
        elsewhere = sum(job.elsewhere for job in self._jobs if job.state == WAITING)
        return ", ".join(parts + ([f"{elsewhere} run by another runner"] if elsewhere else []))

    def _left(self) -> str:
        """Estimated time to the end, from the finished jobs and the progress of the running ones."""
        taken = [job.seconds for job in self._jobs if job.state == DONE and job.seconds]
        running = [(time.time() - job.started, _fraction(job.progress())) for job in self._jobs if job.state == RUNNING]
        taken += [elapsed / fraction for elapsed, fraction in running if fraction > 0.2]
        if not taken:
            return "unknown yet"
        mean = sum(taken) / len(taken)
        waiting = sum(job.state == WAITING for job in self._jobs)
        seconds = waiting * mean + sum(max(0.0, mean - elapsed) for elapsed, _ in running)
        return f"about {duration(seconds / self._slots)}"

    def _render(self) -> Group:
        wide = self._wide()
        needed = Measurement.get(self._console, self._console.options.update(max_width=1000), wide).maximum
        return wide if needed <= self._console.width else self._narrow()

    def _narrow(self) -> Group:
        """For a terminal that has no room for columns: the settings of each running job, and below them how far it is."""
        lines: list[RenderableType] = [
            Text.from_markup(f"[bold]{self._title}[/]  {self._summary()}, time left {self._left()}", overflow="fold")
        ]
        for job in self._jobs:
            if job.state == RUNNING:
                progress = job.progress()
                row = Table.grid(padding=(0, 1))
                parts = (_epoch_text(progress), self._metric_so_far(progress), duration(time.time() - job.started))
                row.add_row(
                    "     ", ProgressBar(total=1.0, completed=_fraction(progress), width=16), *filter(None, parts)
                )
                lines += [Text.from_markup(f"{self._count(job)} {self.label(job)}", overflow="fold"), row]
        return Group(*lines)

    def _wide(self) -> Group:
        """A line per running job, a column per setting."""
        table = Table(box=None, pad_edge=False)
        for title in ("", *map(short, self._varying), "progress", "", "metric", "time"):
            table.add_column(title, no_wrap=True)
        for job in self._jobs:
            if job.state != RUNNING:
                continue
            progress = job.progress()
            table.add_row(
                self._count(job),
                *(escape(str(job.cell.settings.get(name, ""))) for name in self._varying),
                ProgressBar(total=1.0, completed=_fraction(progress), width=24),
                _epoch_text(progress),
                self._metric_so_far(progress),
                duration(time.time() - job.started),
            )
        finished = sum(job.state not in (RUNNING, WAITING) for job in self._jobs)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"[bold]{self._title}[/]",
            ProgressBar(total=len(self._jobs), completed=finished, width=30),
            self._summary(),
            f"time left {self._left()}",
        )
        return Group(head, table)


def _fraction(progress: dict[str, Any]) -> float:
    epoch, epochs = progress.get("epoch"), progress.get("epochs")
    if not isinstance(epoch, (int, float)) or not isinstance(epochs, (int, float)) or epochs <= 0:
        return 0.0
    return min(1.0, max(0.0, epoch / epochs))


def _epoch_text(progress: dict[str, Any]) -> str:
    if "epoch" not in progress:
        return "starting"
    if progress["epoch"] == progress.get("epochs"):
        return "scoring"
    return f"epoch {progress['epoch']}/{progress.get('epochs', '?')}"
