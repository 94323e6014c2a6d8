"""The one lock between processes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import filelock

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_POLL = 0.1  # seconds between two attempts


class Lock:
    """An exclusive lock on a file, kept by this process and by every child that inherits its `descriptor`.

    A cell that outlives a killed runner therefore stays locked. The file is never truncated, and a link in its place is
    refused (OSError). Where the file system has no locks, a marker file with this process's number takes the lock's place
    (filelock's soft form); children do not share that one.

    Args:
        path: The lock's file; its folder is made if it is missing. It stays when the lock is released.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._soft: filelock.SoftFileLock | None = None
        self.descriptor: int | None = None

    def acquire(self, wait: bool | float = False) -> bool:
        """Take the lock; return whether it could be had now, within `wait` seconds, or at any time (True)."""
        until = time.monotonic() + (float("inf") if wait is True else float(wait))
        while not self._try():
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        return True

    def _try(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open()
        try:
            held = filelock.lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            return self._try_soft()
        if held:
            self.descriptor = descriptor
        else:
            os.close(descriptor)
        return held

    def _open(self) -> int:
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        except PermissionError:  # another user's lock can be held without writing into it
            return os.open(self._path, os.O_RDONLY | flags)

    def _try_soft(self) -> bool:
        soft = filelock.SoftFileLock(f"{self._path}.soft", thread_local=False)
        try:
            soft.acquire(timeout=0)
        except filelock.Timeout:
            return False
        self._soft = soft
        return True

    def holder(self) -> str:
        """The number of the process that signed the lock, or `?`."""
        try:
            with open(self._path, "rb") as file:
                return file.read(20).decode().strip() or "?"
        except (OSError, UnicodeDecodeError):
            return "?"

    def sign(self) -> None:
        """Write this process's number into the file of a held lock, for `holder`."""
        if self.descriptor is not None and (self.holder() == "?" or self.holder().isdecimal()):
            os.lseek(self.descriptor, 0, os.SEEK_SET)
            os.write(self.descriptor, f"{os.getpid():<19}\n".encode())

    def release(self) -> None:
        """Give the lock back, also for children that hold the descriptor still."""
        if self.descriptor is not None:
            filelock.unlock_descriptor(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None
        if self._soft is not None:
            self._soft.release()
            self._soft = None

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
