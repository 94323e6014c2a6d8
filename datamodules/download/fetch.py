"""A public dataset, from its address to a folder that its reader reads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from datamodules.download.sources import Source
from datamodules.download.transfer import Cut, Transfer
from datamodules.download.unpacking import unpack
from datamodules.errors import DataError
from datamodules.problems import number_of
from datamodules.readers import find_dataset, get_reader
from results.common.lock import Lock

WORKING = ".download"
"""Folder below the dataset's root, there while it is not complete."""


def fetch(source: Source, root: str | Path, accept: bool, console: Console, address: str = "") -> Path:
    """Download, check, unpack; what an earlier call left is gone on with, a dataset that is complete is left as it is.

    Args:
        source: which.
        root: folder for it alone, made if it is missing. An archive fetched by hand is taken from there.
        accept: the licence is accepted; else it is asked for at a terminal.
        console: shows licence and progress.
        address: another address of the same archive.

    Returns:
        The root.

    Raises:
        DataError: no licence accepted, no connection, another file than published, or a folder that holds other things.
    """
    root = Path(root).expanduser()
    working = root / WORKING
    if root.exists() and not root.is_dir():
        raise DataError(f"{source.name}: DATA_ROOT {root} is not a folder.")
    if not working.exists() and _categories(source, root):
        found = number_of(len(_categories(source, root)), "category")
        console.print(escape(f"{source.name}: {found} in {root} already, nothing is fetched."), soft_wrap=True)
        return root
    lock = None
    try:
        if not working.exists():
            _only_the_archive(source, root)
        if not (working / "accepted").exists():
            _agree(source, accept, console)
        working.mkdir(parents=True, exist_ok=True)
        (working / "accepted").write_text(f"{source.licence[0]}\n", encoding="utf-8")
        lock = Lock(working / "lock")
        if not lock.acquire():
            raise DataError(f"{source.name}: another process fetches it into {root} just now.")
        if not (working / "complete").exists():
            archive = _archive(source, root, working, address or source.address, console)
            _unpack(source, archive, working, console)
        for part in sorted((working / "complete").iterdir()):
            part.rename(root / part.name)
        shutil.rmtree(working)
    except OSError as error:
        raise DataError(f"{source.name}: {error.filename or root}: {error.strerror or error}.") from error
    finally:
        if lock is not None:
            lock.release()
    _, base, available, _ = find_dataset(source.name, root)
    told = f"{source.name}: {number_of(len(available), 'category')} in {base}."
    console.print(escape(f"{told} Count them: make check-data DATASET={source.name} DATA_ROOT={root}"), soft_wrap=True)
    return root


def _categories(source: Source, root: Path) -> list[str]:
    reader = get_reader(source.name)
    return reader.categories(reader.locate(root)) if root.is_dir() else []


def _only_the_archive(source: Source, root: Path) -> None:
    others = sorted(path.name for path in root.iterdir() if path.name != source.archive) if root.is_dir() else []
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise DataError(
            f"{source.name}: {root} holds other things ({shown}): name a folder for this dataset alone, for example "
            f"DATA_ROOT={root / source.name}."
        )


def _agree(source: Source, accept: bool, console: Console) -> None:
    """Shows the licence and asks; a DataError without a yes."""
    name, text = source.licence
    console.print(escape(f"{source.name} ({source.page})\nLicence: {name}\n{text}"), soft_wrap=True)
    if not accept:
        if not sys.stdin.isatty():
            raise DataError(f"{source.name}: to accept this licence give ACCEPT=1 (there is no terminal to ask at).")
        if console.input("Do you accept it? Type yes: ").strip().casefold() not in ("yes", "y"):
            raise DataError(f"{source.name}: nothing is fetched without the licence.")


def _archive(source: Source, root: Path, working: Path, address: str, console: Console) -> Path:
    """The checked archive in the working folder: the one that lies there or was fetched by hand, else the downloaded one."""
    import pooch  # late: only this command needs it
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")
    by_hand, place = root / source.archive, working / source.archive
    if by_hand.is_file():
        console.print(escape(f"Checking {by_hand}."), soft_wrap=True)
        found = pooch.file_hash(str(by_hand), "sha256")
        if found != source.sha256:
            raise DataError(
                f"{by_hand} is not the published archive: its sha256 is {found}, published is {source.sha256}. Delete it, and "
                f"fetch it again from {source.page}."
            )
        by_hand.rename(place)
    part = place.with_name(f"{place.name}.part")
    if not place.exists():
        console.print(escape(f"{'Going on with' if part.exists() else 'Fetching'} {address}"), soft_wrap=True)
    try:
        pooch.retrieve(address, f"sha256:{source.sha256}", place.name, working, downloader=Transfer(part, console))
    except DataError:
        raise
    except (RequestException, Cut) as error:
        raise DataError(
            f"{source.name}: {address} cannot be had ({_reason(error)}). What has come stays, and the same command goes on. "
            f"Or fetch {source.archive} by hand from {source.page}, put it into {root}, and give the same command."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{source.name}: what came from {address} is not the published archive (sha256 {source.sha256}) and was deleted. "
            f"Look at {source.page}; another address of the same file is given as ADDRESS=."
        ) from error
    return place


def _reason(error: Exception) -> str:
    """A few words for what a nest of exceptions says in many."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP status {status}"
    text = repr(error)
    for sign, words in (
        ("NameResolution", "its name is not found: no network?"),
        ("ProxyError", "the proxy does not let it through"),
        ("refused", "connection refused"),
        ("imeout", "no answer in time"),
        ("SSL", "its certificate is not trusted"),
        ("Invalid", "not an address"),
        ("MissingSchema", "not an address"),
    ):
        if sign in text:
            return words
    return str(error) if isinstance(error, Cut) else "the connection was cut"


def _unpack(source: Source, archive: Path, working: Path, console: Console) -> None:
    """The archive's files as `complete` in the working folder, once the reader finds its categories among them."""
    fresh = working / "unpacking"
    shutil.rmtree(fresh, ignore_errors=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("unpacking", total=None)
        tell: Callable[[int], None] = lambda size: progress.advance(task, size)  # noqa: E731
        unpack(archive, fresh, told=tell)
    content, inner = fresh, [path for path in fresh.iterdir() if not path.name.startswith(".")]
    if not _categories(source, fresh) and len(inner) == 1 and inner[0].is_dir():
        content = inner[0]  # an archive of one folder
    if not _categories(source, content):
        held = ", ".join(sorted(path.name for path in inner)[:5])
        shutil.rmtree(fresh)
        layout = get_reader(source.name).layout
        raise DataError(f"{source.name}: {archive} holds {held or 'nothing'}, but it should be laid out as {layout}.")
    content.rename(working / "complete")
