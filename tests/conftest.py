"""Before any test imports a numerical library, and what makes every test's command line cheaper."""

import gc
import inspect
import os

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

# jsonargparse asks at every command line for its caller, which reads a line of source for each of the many frames below
# pytest; none of those lines is looked at.
inspect.stack.__defaults__ = (0,)  # `context`, in lines


def pytest_collection_finish() -> None:
    """The half million objects of the imports stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()
