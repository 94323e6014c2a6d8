"""Archives from elsewhere -> files of a new folder and of nowhere else."""

from __future__ import annotations

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from datamodules.errors import DataError

RATIO = 20
"""Images hardly shrink: an archive whose files are together this many times as large is refused, above `SMALL`."""
SMALL = 2**30
MOST = 500_000
"""Files of one archive."""
_CHUNK = 2**20
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, NotImplementedError)
_Entry = tuple[str, bool, Callable[[], Any]]
"""Name, whether it is a folder, and how to open it."""


def unpack(archive: Path, into: Path, limit: int | None = None, told: Callable[[int], None] | None = None) -> int:
    """Write the files of an archive into a folder that is made for them.

    Names that lead out of the folder, links, devices, names that come twice, encrypted files, and archives whose files are
    far larger than itself are refused; rights and owners in the archive are not taken over.

    Args:
        archive: .tar, compressed or not, or .zip, by content.
        into: folder that does not exist.
        limit: bytes that the files may have in all; None for `RATIO` times the archive's size, at least `SMALL`.
        told: called with the bytes of each piece that was written.

    Returns:
        How many files were written.

    Raises:
        DataError: the archive is damaged or holds what is refused. What was written until then stays in `into`.
    """
    allowed = max(SMALL, RATIO * archive.stat().st_size) if limit is None else limit
    into.mkdir(parents=True)
    written = count = 0
    try:
        for name, folder, opened in _entries(archive):
            path = into / _inside(archive, name)
            if folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            count += 1
            if count > MOST:
                raise DataError(f"{archive.name} holds more than {MOST:,} files: it is not unpacked.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, path.open("xb") as target:
                while piece := source.read(_CHUNK):
                    written += len(piece)
                    if written > allowed:
                        raise DataError(
                            f"{archive.name} has {archive.stat().st_size:,} bytes, and its files more than {allowed:,}: a data "
                            "set does not shrink so much, it is not unpacked."
                        )
                    target.write(piece)
                    if told is not None:
                        told(len(piece))
    except FileExistsError as error:
        raise DataError(f"{archive.name} holds {error.filename} twice: it is not unpacked.") from error
    except (*_DAMAGED, RuntimeError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: it is damaged or of an unusual kind ({error}).") from error
    except OSError as error:
        raise DataError(f"{archive.name} cannot be unpacked into {into}: {error.strerror or error}.") from error
    return count


def _entries(archive: Path) -> Iterator[_Entry]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, info.filename)
                if info.flag_bits & 1:
                    raise DataError(f"{archive.name}: {info.filename} is encrypted: it is not unpacked.")
                yield info.filename, info.is_dir(), partial(file.open, info)
        return
    with tarfile.open(archive) as file:
        for member in file:
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise _refused(archive, member.name)
            yield member.name, member.isdir(), partial(file.extractfile, member)


def _refused(archive: Path, name: str) -> DataError:
    return DataError(f"{archive.name}: {name} is a link, a device or another special file: it is not unpacked.")


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The name as a path below a folder."""
    path, there = PurePosixPath(name), PureWindowsPath(name)
    if path.is_absolute() or there.drive or there.root or ".." in there.parts or "\0" in name:
        raise DataError(f"{archive.name}: {name!r} leads out of its folder: it is not unpacked.")
    return path
