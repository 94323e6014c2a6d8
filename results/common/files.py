"""Files that are whole or not there, whatever happens while they are written: the process killed, the power lost."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into, which takes its place at the end; its folder is made if it is missing.

    The content is on disk before the name is, so that a lost power leaves the old file or the new one, never an empty
    one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


REPLACED = ".old"
"""Ending of a folder that is being replaced, see `restore_replaced`."""


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step; what JSON does not know is written as text."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if it is missing, damaged or not a mapping."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def restore_replaced(folder: Path) -> None:
    """Bring back each record of a folder whose replacing was cut off between its two renames.

    A record `NAME` is replaced by renaming it to `.NAME.<who>.old` (`REPLACED`) and the new one to `NAME`. A
    process killed in between leaves no `NAME`; the old one takes its place again.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        left = [entry.name for entry in entries if entry.name.startswith(".") and entry.name.endswith(REPLACED)]
    for name in left:
        run = read_json(folder / name / "record.json").get("run")
        target = folder / str(run)
        if name.startswith(f".{run}.") and target.parent == folder and not target.exists():
            with contextlib.suppress(OSError):  # not ours to write, or another process was faster
                os.rename(folder / name, target)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk, where the system can (not on Windows, not on some network file systems)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
