"""The training program as a process, started in milliseconds: for tests of what a process does, not of how it starts."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sweeps.runner.warm import WarmStarts

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A started program; what it prints lies in a file."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, limit: float = 600) -> str:
        """Everything it printed until its end; a failure after `limit` seconds."""
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, 9)
                pytest.fail(f"no end within {limit} s:\n{self._output.read_text()}")
            time.sleep(0.02)
        return self._output.read_text()


class Programs:
    """Starts of the training program with the variables of this process and one thread."""

    def __init__(self) -> None:
        self._starts = WarmStarts({**os.environ, "OMP_NUM_THREADS": "1"}, ROOT)

    def start(self, arguments: Sequence[str], **variables: str) -> Program:
        descriptor, path = tempfile.mkstemp()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        try:
            pid = self._starts.start(arguments, environment, descriptor, folder=ROOT)
        finally:
            os.close(descriptor)
        return Program(pid, Path(path))

    def run(self, arguments: Sequence[str], code: int = 0, **variables: str) -> str:
        """Runs it to its end, which must have the exit code; what it printed."""
        program = self.start(arguments, **variables)
        output = program.wait()
        assert program.returncode == code, output[-6000:]
        return output

    def close(self) -> None:
        self._starts.close()
