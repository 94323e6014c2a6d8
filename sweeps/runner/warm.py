"""Starts of the training program that cost milliseconds instead of ten seconds of imports.

A warmed process imports the program once and forks a copy of itself for every start. The copy becomes the program: its own
arguments, environment, folder and output, its own process group, the `__main__` of `python -m lightning_modules`. It is a
child of whoever asked for it, not of the warmed process (Linux: the asker adopts it as a "child subreaper"), so waiting for
it, killing it and the kernel's signal at its parent's death are what they are for a program. For the same reason
multiprocessing's own fork server does not fit: its children's exit codes are lost with it, and it cannot be started again,
which a changed source file asks for.

Elsewhere than on Linux nothing is warmed, and cells start as programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.runner.process import die_with_parent

PROGRAM = "lightning_modules"
ROOMS = ("lightning_modules", "models", "datamodules", "results")
"""Folders whose source files the warmed process may have imported."""
AVAILABLE = sys.platform.startswith("linux")
_LIBRARIES = ("albumentations", "matplotlib.figure", "timm", "torch")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LARGEST = 1 << 20  # bytes of a request


@dataclass(frozen=True)
class _Warmed:
    """The warmed process, this side's end of the socket to it, and when the files that it imported were changed."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    sources: dict[Path, int]


class WarmStarts:
    """The asker's side: one warmed process, started at the first need and again after a source file has changed.

    Args:
        environment: Of the warmed process. Libraries that read their number of threads when they are imported read it here.
        root: The folder of the source files.
        output: Where the imports print to, as for `subprocess`; None is where this process does.
    """

    def __init__(self, environment: Mapping[str, str], root: Path = Path("."), output: int | None = None) -> None:
        self._environment = dict(environment)
        self._output = output
        self._root = root
        self._warmed: _Warmed | None = None

    @staticmethod
    def own(words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]] | None:
        """Arguments and variables of a command that is this interpreter's `-m lightning_modules`; None for any other.

        `env` in front of it, with `-u NAME` and `NAME=VALUE`, acts on the variables.
        """
        words, environment = list(words), dict(environment)
        if words[:1] == ["/usr/bin/env"]:
            words.pop(0)
            while words[1:] and (words[0] == "-u" or "=" in words[0]):
                word = words.pop(0)
                if word == "-u":
                    environment.pop(words.pop(0), None)
                else:
                    name, _, value = word.partition("=")
                    environment[name] = value
        if words[:3] != [sys.executable, "-m", PROGRAM]:
            return None
        return words[3:], environment

    def prepare(self) -> None:
        """Let the imports begin; a later `start` waits for their end."""
        self._prepared()

    def _prepared(self) -> _Warmed:
        """The warmed process of the source files as they are now; started if there is none."""
        sources, warmed = self._modified(), self._warmed
        if warmed is not None and warmed.process.poll() is None and warmed.sources == sources:
            return warmed
        self.close()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env=self._environment,
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                preexec_fn=die_with_parent(),
            )
        self._warmed = _Warmed(process, ours, sources)
        return self._warmed

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        inherit: Iterable[int] = (),
        folder: Path = Path("."),
    ) -> int:
        """Start `python -m lightning_modules ARGUMENTS`; returns its process id, for `os.waitpid`.

        Args:
            arguments: The program's.
            environment: All of its variables.
            output: Descriptor of its standard output and error.
            inherit: More descriptors that it holds until its end.
            folder: Its working folder.

        Raises:
            OSError: the warmed process ended, for example because a source file cannot be imported; what it printed is on
                this process's standard error.
        """
        warmed = self._prepared()
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder.resolve()),
            "asker": os.getpid(),
        }
        message = json.dumps(request).encode(errors="surrogateescape")
        answer = b""
        with contextlib.suppress(ConnectionError):
            socket.send_fds(warmed.socket, [message], [output, *inherit])
            answer = warmed.socket.recv(64)
        if not answer:
            raise ChildProcessError(f"The warmed {PROGRAM} ended with exit code {warmed.process.wait()}.")
        return int(answer)

    def close(self) -> None:
        """End the warmed process; programs that it started go on."""
        if self._warmed is not None:
            self._warmed.socket.close()
            self._warmed.process.kill()
            self._warmed.process.wait()
        self._warmed = None

    def _modified(self) -> dict[Path, int]:
        files = (file for room in ROOMS for file in (self._root / room).rglob("*.py"))
        return {file: file.stat().st_mtime_ns for file in files}


def _serve(requests: socket.socket) -> None:
    """The warmed process's side; returns in the copy that is to become the program, and never in the warmed process."""
    # timm would import W&B, whose import makes a temporary folder that must be each program's own.
    modules: dict[str, Any] = sys.modules
    modules["wandb"] = None
    for name in (*_LIBRARIES, f"{PROGRAM}.running.command_line"):
        importlib.import_module(name)
    package = importlib.import_module(PROGRAM)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and module.name != "__main__":
            importlib.import_module(f"{PROGRAM}.{module.name}")
    del modules["wandb"]
    gc.collect()
    gc.freeze()  # what was imported stays in pages that all copies share
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _LARGEST, 16)
        if not message:
            os._exit(0)
        request = json.loads(message.decode(errors="surrogateescape"))
        between = os.fork()
        if between == 0:
            if os.fork() != 0:
                os._exit(0)  # the asker adopts the copy now
            _become(request, descriptors, requests)
            return
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: Mapping, descriptors: Sequence[int], requests: socket.socket) -> None:
    """Everything of a process that differs between the warmed one and a program that the asker has started."""
    while os.getppid() != request["asker"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(request["asker"], 0)
            time.sleep(0.001)
            continue
        os._exit(128 + signal.SIGTERM)
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    requests.send(str(os.getpid()).encode())
    requests.close()
    output, *inherited = descriptors
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:1] = [os.getcwd(), *more]
    sys.argv = [f"{PROGRAM}/__main__.py", *request["arguments"]]
    _set_threads()


def _set_threads() -> None:
    """The threads of this copy, for what reads their number only when it is imported."""
    import cv2
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
        cv2.setNumThreads(int(threads))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
