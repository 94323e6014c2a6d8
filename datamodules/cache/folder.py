"""The folder of all cache entries: what is there, how much room it takes, who uses it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from results.common.files import read_json
from results.common.lock import Lock


class CacheTooLargeError(RuntimeError):
    """The entry does not fit into the budget or onto the disk."""


@dataclass(frozen=True)
class Entry:
    """An entry, or what an interrupted build left of one.

    Args:
        folder: Its folder.
        title: What it holds, in words.
        nbytes: Bytes on disk.
        used: When it was last opened, in seconds since the epoch.
        complete: False for an interrupted build.
        version: Of its layout; 0 for an interrupted build.
        data: Of what data, and how many images, in words; empty if the entry does not say.
    """

    folder: Path
    title: str
    nbytes: int
    used: float
    complete: bool
    version: int
    data: str = ""

    @property
    def key(self) -> str:
        return self.folder.name.removesuffix(".partial")


def entries(root: Path) -> list[Entry]:
    """All entries below `root`, the least recently used first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not folder.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just removed or renamed it
            meta = folder / "meta.json"
            complete = meta.is_file() and folder.suffix != ".partial"
            about = ({"title": "damaged"} | read_json(meta)) if complete else {"title": "interrupted build"}
            files = [file.stat() for file in folder.iterdir()]
            used = meta.stat().st_mtime if complete else max((f.st_mtime for f in files), default=0.0)
            size, version = sum(f.st_size for f in files), int(about.get("version", 0))
            rows = about.get("rows")
            data = about.get("data") or (f"{rows} images" if rows else "")
            found.append(Entry(folder, about.get("title", "?"), size, used, complete, version, data))
    return sorted(found, key=lambda entry: entry.used)


def remove(entry: Entry) -> bool:
    """Deletes an entry unless a process is just opening or building it; whether it did."""
    try:
        with locked(entry.folder.parent, entry.key, None):
            shutil.rmtree(entry.folder, ignore_errors=True)
    except BlockingIOError:
        return False
    return True


def make_room(root: Path, needed: int, budget: int) -> None:
    """Deletes the least recently used entries until `needed` bytes fit into the budget."""
    if needed > budget:
        raise CacheTooLargeError(f"needs {needed / 2**30:.2f} GiB, the budget is {budget / 2**30:.2f} GiB")
    present = entries(root)
    total = sum(entry.nbytes for entry in present)
    for entry in present:
        if total + needed <= budget:
            break
        if remove(entry):
            total -= entry.nbytes
    free = shutil.disk_usage(root).free
    if needed > 0.9 * free:
        raise CacheTooLargeError(f"needs {needed / 2**30:.2f} GiB, the disk of {root} has {free / 2**30:.2f} GiB free")


@contextlib.contextmanager
def locked(root: Path, key: str, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Holds the entry's lock; without `waiting`, BlockingIOError if another process holds it."""
    lock = Lock(root / f"{key}.lock")
    if not lock.acquire():
        if waiting is None:
            raise BlockingIOError(f"{root / key} is in use")
        waiting()
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()


def age(seconds_since_epoch: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = time.time() - seconds_since_epoch
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
