"""Before any test imports a numerical library."""

import os

# Two test processes with two threads each on two cores would spend their time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
