"""One file over HTTP, as pooch's downloader: a cut connection, or a new start of the program, goes on where it was."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datamodules.errors import DataError

TIMEOUTS = (10, 60)
"""Seconds for a connection, and between two pieces."""
_CHUNK = 2**16
"""Bytes that are written together; of a cut connection what is less than that is lost."""


class Cut(OSError):
    """A connection ended before the file did."""


class Transfer:
    """Downloads into a file that stays when it is cut off.

    Args:
        part: that file.
        console: shows progress.
        attempts: how often a connection may fail without a single new byte.
        pause: seconds between two attempts, times their number.
    """

    def __init__(self, part: Path, console: Console, attempts: int = 4, pause: float = 1.0) -> None:
        self.part, self.console, self.attempts, self.pause = part, console, attempts, pause

    def __call__(self, address: str, output_file: str, pooch: Any = None, check_only: bool = False) -> bool | None:
        """As pooch calls it: the whole file is at `output_file` afterwards.

        Raises:
            requests.RequestException, Cut: it could not be had; what came stays in `part`.
            DataError: the disk is too full.
        """
        from requests import ConnectionError, HTTPError, Timeout  # late: half a second
        from requests.exceptions import ChunkedEncodingError

        failed, self._answered = 0, False
        columns = (
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            while True:
                before = self._size()
                try:
                    self._take(address, progress)
                    break
                except (ConnectionError, Timeout, ChunkedEncodingError, Cut, HTTPError) as error:
                    status = getattr(getattr(error, "response", None), "status_code", None)
                    if not self._answered or (status is not None and status < 500 and status != 429):
                        raise
                    failed = 1 if self._size() > before else failed + 1
                    if failed >= self.attempts:
                        raise
                    time.sleep(self.pause * failed)
        os.replace(self.part, output_file)
        return None

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _take(self, address: str, progress: Progress) -> None:
        """One connection."""
        import requests

        have = self._size()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with requests.get(address, headers=headers, stream=True, timeout=TIMEOUTS) as response:
            self._answered = True
            found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status_code == 416:  # nothing is left, or the file there is another one
                if found and found[2] == str(have):
                    return
                self.part.unlink()
                raise Cut("the file at the address is another one now")
            response.raise_for_status()
            goes_on = response.status_code == 206
            if goes_on and (found is None or found[1] != str(have)):
                self.part.unlink()
                raise Cut("the server answered with another part than was asked for")
            have = have if goes_on else 0
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if total is not None:
                self._room(total, have)
            task = progress.add_task(self.part.stem, total=total, completed=have)
            with self.part.open("ab" if goes_on else "wb") as file:
                for piece in response.iter_content(_CHUNK):
                    file.write(piece)
                    progress.advance(task, len(piece))
            progress.remove_task(task)
        if total is not None and self._size() != total:
            raise Cut(f"{self._size():,} of {total:,} bytes came")

    def _room(self, total: int, have: int) -> None:
        free, needed = shutil.disk_usage(self.part.parent).free, total - have + total
        if free < needed:
            raise DataError(
                f"{self.part.parent}: {needed / 1e9:.1f} GB are needed for the archive and its files, {free / 1e9:.1f} GB are "
                "free: name a larger place as DATA_ROOT."
            )
