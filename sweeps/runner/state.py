"""Small files of a sweep's working folder `results/work/<sweep>/<run>/`: state, progress, lock, log.

Nothing here is a result: the run record alone says that a cell is finished.
"""

from __future__ import annotations

from pathlib import Path

RECORDS = Path("results/runs")
WORK = Path("results/work")

DONE, FAILED, INTERRUPTED, RUNNING, WAITING = "done", "failed", "interrupted", "running", "waiting"


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last lines of a log's last attempt that are not empty, without the overwritten parts of progress bars."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    attempt = max((index for index, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    return [line for line in lines[attempt + 1 :] if line.strip()][-count:]
