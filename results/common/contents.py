"""The contents of files as hashes: the one identity of data, for records, cache entries and the names of cells.

A file is read once. Its hash is remembered with its size, times and inode in a small file per data set below
`results/work/contents`, and holds as long as these stay; the change time (ctime) is among them, so that a file replaced
or edited with its time kept is read again. What is remembered can be deleted at any moment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import xxhash

from results.common.files import write_text

MEMORY = Path("results/work/contents")
KEPT = 64
"""Data sets whose hashes are remembered, the last used."""
RECENT = 2_000_000_000
"""Nanoseconds: a file changed so lately could change again without another time, so its hash is not remembered."""
CLUTTER = ("thumbs.db", "desktop.ini")
PACKED = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z", ".rar")
"""Endings of what data sets are downloaded as, which no reader opens."""
_BLOCK = 1 << 20
_THREADS = 8


def content_hashes(paths: Iterable[str | Path], root: str | Path) -> list[str]:
    """The hash (xxh3, 128 bits) of each file's bytes.

    Args:
        paths: The files.
        root: The folder of their data set, by which their hashes are remembered.

    Raises:
        OSError: a file cannot be read.
    """
    files = [os.fspath(path) for path in paths]
    place = os.path.abspath(root)
    memory = MEMORY / f"{xxhash.xxh3_64_hexdigest(os.fsencode(place))}.hashes"
    states, hashes = _read(memory)
    below = f"{os.fspath(root).rstrip(os.sep)}{os.sep}"
    names = [
        path[len(below) :] if path.startswith(below) else os.path.abspath(path).removeprefix(f"{place}{os.sep}")
        for path in files
    ]
    new = {
        name: path
        for name, path in zip(names, files, strict=True)
        if name not in states or states[name] != _state(os.stat(path))
    }
    if new:
        now = time.time_ns()
        found = list(new.items())
        with ThreadPoolExecutor(_THREADS) as pool:
            for part in pool.map(_hash_all, (found[first::_THREADS] for first in range(_THREADS))):
                for name, state, content in part:
                    states[name], hashes[name] = state, content
        settled = [name for name, state in states.items() if now - int(state.rpartition(" ")[2]) > RECENT]
        _write(memory, [field for name in settled for field in (name, states[name], hashes[name])])
    return [hashes[name] for name in names]


def file_hash(path: str | Path) -> str:
    """The hash of one file's bytes, read anew."""
    with open(path, "rb", buffering=0) as file:
        return _digest(file)


def files_below(root: str | Path) -> Iterator[str]:
    """Every file of data below a folder, sorted within each folder; links are followed, but never around in a circle.

    Hidden files, those of file managers (`CLUTTER`) and archives (`PACKED`) do not count as data.
    """
    yield from _walk(os.fspath(root), ())


def data_hash(root: str | Path, categories: Sequence[str] | None = None) -> str:
    """Hash of the data below a folder: relative paths and contents, masks and lists included.

    Args:
        root: The data set's folder. Where it lies does not matter.
        categories: If each is a folder in `root`, the files of others do not count.
    """
    root = os.fspath(root)
    if categories and all(os.path.isdir(os.path.join(root, category)) for category in categories):
        beside = [entry.path for entry in sorted(_entries(root), key=lambda e: e.name) if entry.is_file()]
        folders = [os.path.join(root, name) for name in (*sorted(categories), "split_csv")]
        files = [*beside, *(file for folder in folders for file in files_below(folder))]
    else:
        files = list(files_below(root))
    digest = xxhash.xxh3_128()
    for file, content in zip(files, content_hashes(files, root), strict=True):
        digest.update(os.fsencode(f"{os.path.relpath(file, root)}\0{content}\n"))
    return digest.hexdigest()


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        place = os.stat(folder)
    except OSError:
        return
    if (place.st_dev, place.st_ino) in above:
        return
    entries = sorted(_entries(folder), key=lambda entry: entry.name)
    yield from (entry.path for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, (place.st_dev, place.st_ino)))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [
            entry
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.casefold() not in CLUTTER
            and not entry.name.casefold().endswith(PACKED)
            and (not entry.is_symlink() or os.path.exists(entry.path))  # not to nothing or itself
        ]
    return []


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _hash_all(files: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(name, *_hash(path)) for name, path in files]


def _hash(path: str) -> tuple[str, str]:
    with open(path, "rb", buffering=0) as file:
        return _state(os.fstat(file.fileno())), _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _read(memory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What is remembered of a data set, name -> state and name -> hash; empty if that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        check, _, text = memory.read_bytes().partition(b"\n")
        if check.decode() == xxhash.xxh3_128_hexdigest(text):
            os.utime(memory)
            fields = text.decode("utf-8", "surrogateescape").split("\0")
            names = fields[0::3]
            return dict(zip(names, fields[1::3], strict=True)), dict(zip(names, fields[2::3], strict=True))
    return {}, {}


def _write(memory: Path, fields: Sequence[str]) -> None:
    """Remember names, states and hashes in turn; a folder that cannot be written does not stop the run."""
    text = "\0".join(fields)
    check = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))
    with contextlib.suppress(OSError):
        write_text(memory, f"{check}\n{text}")
        for old in sorted(MEMORY.glob("[!.]*"), key=lambda file: -file.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)
