"""Which methods have no place in an experiment of the sweep `methods`, from what is written in its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from results.common import methods
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell


def methods_that_cannot(cells: Sequence[Cell], variables: Mapping[str, str]) -> dict[str, str]:
    """method -> why the experiment is not for it; SweepError if what is written is wrong. Nothing for other sweeps."""
    reasons = {}
    for name, compare in dict.fromkeys(key for cell in cells if (key := methods.of(cell.parameters))):
        try:
            methods.profile(name, variables["PROFILE"])
            methods.shared(name, compare, variables["PROFILE"])
        except methods.CannotError as error:
            reasons[name] = str(error)
        except ValueError as error:
            raise SweepError(str(error)) from error
    return reasons
