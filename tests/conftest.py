"""Before any test imports a numerical library."""

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
