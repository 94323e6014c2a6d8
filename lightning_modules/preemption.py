"""What a run does when it is asked to leave: it tells W&B that it was pre-empted and ends with code 143.

W&B then hands it out again, and it goes on from its checkpoint. Nothing heavy is imported here, so that the program can
listen from its first moment, before the imports of seconds.
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


class Preempted(BaseException):
    """SIGTERM came; nothing but the end of the program is wanted."""


class _Watch:
    """What became of SIGTERM: noted during the imports, raised afterwards."""

    process: int | None = None
    noted = False
    raises = False


def watch() -> None:
    """Note SIGTERM from now on; under a W&B agent, also take the agent's death for one (Linux).

    Without that, a killed agent's run would go on alone, beside the next agent's on the same GPU.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _Watch.process, _Watch.noted, _Watch.raises = os.getpid(), False, False
    signal.signal(signal.SIGTERM, _on_sigterm)
    if "WANDB_SWEEP_ID" in os.environ and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Watch.process:  # a data loader's worker, which must just end
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    _Watch.noted = True
    # While a trainer runs, its own handler is installed and calls this one; its loops stop in order after a batch.
    if _Watch.raises and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        raise Preempted


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Leave the block at once when SIGTERM comes (or came since :func:`watch`), tell W&B and exit with code 143."""
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
        from lightning_modules import tracking

        tracking.report_preemption()
        sys.exit(EXIT_CODE)
    finally:
        _Watch.raises = False
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
