"""A cell as a process: own process group, log file, death with the runner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweeps.runner.warm import WarmStarts

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
GRACE = 5.0  # seconds that a cell's helpers may outlive it


def die_with_parent() -> Callable[[], None]:
    """What a child does before it becomes its program: own process group, and on Linux SIGTERM when the parent dies."""
    parent = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    return prepare


class CellProcess:
    """Starts a command in its own process group with its output appended to a log.

    A terminal's Ctrl-C does not reach it, so the runner decides how it stops. On Linux the kernel sends it SIGTERM when
    the runner dies, however that happens. Must be made in the main thread: the kernel's signal follows the thread.
    """

    def __init__(
        self,
        words: list[str],
        environment: dict[str, str],
        log: Path,
        inherit: int | None = None,
        warm: WarmStarts | None = None,
    ) -> None:
        self._program: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        self._ended: float | None = None
        held = () if inherit is None else (inherit,)
        with log.open("ab") as output:
            output.write(f"$ {' '.join(words)}\n".encode())
            output.flush()
            if warm is not None and (own := warm.own(words, environment)) is not None:
                # Without the warmed process (a source file has an error) the program says itself what is wrong, in its log.
                with contextlib.suppress(ChildProcessError):
                    self.pid = warm.start(*own, output.fileno(), held)
                    return
            self._program = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent(),
                pass_fds=held,
            )
        self.pid = self._program.pid

    def poll(self) -> int | None:
        """Exit code once the process and its group are gone, else None; helpers that stay are killed after a grace."""
        if self._poll() is None:
            return None
        if self._ended is None:
            self._ended = time.monotonic()
        if self._group_lives():
            if time.monotonic() - self._ended < GRACE:
                return None
            self.kill()
        return self._code

    def _poll(self) -> int | None:
        if self._code is None and self._program is not None:
            self._code = self._program.poll()
        elif self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        """Ask the cell to stop. Only its first process is told, because it must stop its own helpers in order."""
        if self._poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the cell and all its helpers at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _group_lives(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # helpers that were adopted and have ended
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
