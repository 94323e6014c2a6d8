"""Before any test imports a numerical library, and what makes every test's command line cheaper."""

import gc
import inspect
import os
import sys

# Two test processes with two threads each on two cores would spend their time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# What `make` or whoever starts the tests has set for runs of their own steers no test.
STEERING = (
    "METHOD",
    "PROFILE",
    "DATASET",
    "DATA_ROOT",
    "CATEGORIES",
    "BACKBONE",
    "WEIGHTS",
    "ALPHA",
    "RULE",
    "FOLDS",
    "COMPARE",
    "SETTING",
    "WANDB",
    "WANDB_SWEEP_ID",
)
for name in STEERING:
    os.environ.pop(name, None)


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """`inspect.stack`. jsonargparse asks it at every command line for its caller, and gets, of the many frames below pytest,
    the three nearest without their source."""
    frame = sys._getframe(1)
    if not frame.f_globals.get("__name__", "").startswith("jsonargparse."):
        return inspect.getouterframes(frame, context)
    frames = [frame, frame.f_back, frame.f_back.f_back]
    return [inspect.FrameInfo(f, f.f_code.co_filename, f.f_lineno, f.f_code.co_name, None, None) for f in frames]


inspect.stack = _stack


def pytest_collection_finish() -> None:
    """The half million objects of the imports stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()
