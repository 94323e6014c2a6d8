"""What a run does when it is asked to leave: it tells W&B that it was pre-empted and ends with code 143.

W&B then hands it out again, and it goes on from its checkpoint. Nothing heavy is imported here, so that the program can
listen from its first moment, before the imports of seconds.

A run on several devices is several processes: the first one, which starts the others, writes checkpoints and speaks to
W&B. It alone decides to leave; the others live as long as it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1
_FIRST = "UNIRECON_FIRST_PROCESS"
"""The variable that tells the other processes of a run the id of the first."""


class Preempted(BaseException):
    """SIGTERM came; nothing but the end of the program is wanted."""


class _Watch:
    """What became of SIGTERM: noted during the imports, raised afterwards."""

    process: int | None = None
    first = True
    noted = False
    raises = False
    at_once = False


def watch() -> None:
    """Note SIGTERM from now on; under a W&B agent, also take the agent's death for one (Linux).

    Without that, a killed agent's run would go on alone, beside the next agent's on the same GPU. Any other process is
    killed when the first one ends, however that happens: it may be waiting for it inside a library, where no signal is
    heard.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _Watch.process, _Watch.noted, _Watch.raises = os.getpid(), False, False
    _Watch.first = _FIRST not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    signal.signal(signal.SIGTERM, _on_sigterm)
    if not _Watch.first:
        _on_parents_death(signal.SIGKILL)
        if os.getppid() != int(os.environ[_FIRST]):
            sys.exit(EXIT_CODE)
        return
    os.environ[_FIRST] = str(os.getpid())
    if "WANDB_SWEEP_ID" in os.environ:
        _on_parents_death(signal.SIGTERM)


def is_first() -> bool:
    """False in a process that the first one of a run started for another device."""
    return _Watch.first


def _on_parents_death(number: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Watch.process:  # a data loader's worker, which must just end
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    if not _Watch.first:
        return
    _Watch.noted = True
    # While a trainer runs, its own handler is installed and calls this one; its loops stop in order after a batch.
    if _Watch.raises and (_Watch.at_once or signal.getsignal(signal.SIGTERM) is _on_sigterm):
        raise Preempted


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Leave the block at once when SIGTERM comes, though a trainer runs: an evaluation's loop would run on to its end."""
    _Watch.at_once = True
    try:
        yield
    finally:
        _Watch.at_once = False


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Leave the block at once when SIGTERM comes (or came since `watch`), tell W&B and exit with code 143."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not _on_sigterm:
        watch()
    try:
        _Watch.raises = True
        if _Watch.noted:
            raise Preempted
        yield
    except Preempted:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, lambda number, frame: None)  # asked a second time, it is leaving already
        from lightning_modules.running import tracking

        tracking.report_preemption()
        # The first process must not be killed for another one's failure while it talks to W&B.
        sys.exit(EXIT_CODE if _Watch.first else 0)
    finally:
        _Watch.raises = False
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
