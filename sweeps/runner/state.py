"""Small files of a sweep's working folder ``results/work/<sweep>/<run>/``: state, progress, lock, log.

Nothing here is a result: the run record alone says that a cell is finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

RECORDS = Path("results/runs")
WORK = Path("results/work")

DONE, FAILED, INTERRUPTED, RUNNING, WAITING = "done", "failed", "interrupted", "running", "waiting"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new one, never a part."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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


class Lock:
    """An exclusive lock on a file, kept by this process and by every child that inherits its descriptor.

    A cell that outlives a killed runner therefore stays locked, and no second runner starts it again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; return whether it was free (always True with ``wait``)."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back, also for children that hold the descriptor still."""
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = None
