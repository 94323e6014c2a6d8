"""A W&B sweep file as the runner sees it, checked.

Only dotted parameter names are accepted, because they reach the command line letter for letter under the W&B agent and
under the local runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.common.did_you_mean import did_you_mean
from results.common.sweep_file import check_parameters, distribution, read
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import SEED, Cell, draw, grid

FOLDER = Path("sweeps")
ARGS = "${args}"

_TOP_LEVEL = {
    "name", "description", "project", "entity", "method", "metric", "parameters", "command", "program", "run_cap",
    "early_terminate",
}  # fmt: skip
_METHODS = ("grid", "random", "bayes")


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep file that was read and checked; `parameters` maps dotted names to W&B's parameter entries."""

    path: Path
    name: str
    description: str
    method: str
    metric: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    command: tuple[str, ...]
    run_cap: int | None

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the parameters that take more than one value, the seed excepted."""
        return tuple(
            name
            for name, entry in sorted(self.parameters.items())
            if name != SEED and distribution(entry) != "constant" and len(entry.get("values", (0, 1))) > 1
        )

    def cells(self, seeds: list[int] | None = None, count: int | None = None, sampler_seed: int = 0) -> list[Cell]:
        """Expand into cells.

        Args:
            seeds: Replaces the values of `seed_everything`.
            count: How many cells of a random search; by default the file's `run_cap`.
            sampler_seed: Seeds the random search.

        Raises:
            SweepError: method bayes, which needs the results of earlier runs and therefore W&B's server.
        """
        parameters = dict(self.parameters)
        if seeds:
            parameters[SEED] = {"values": list(seeds)}
        if self.method == "grid":
            return grid(parameters, self.path)
        if self.method == "random":
            count = count or self.run_cap
            if count is None:
                raise SweepError(f"{self.path}: method random needs an end: write run_cap in the file or give --count.")
            return draw(parameters, count, sampler_seed)
        raise SweepError(
            f"{self.path}: method 'bayes' chooses each cell from the results of the earlier ones, which W&B's server "
            f"does. Run it with `make wandb-sweep ABLATION={self.name}` and agents, or write method: grid or random."
        )


def names() -> list[str]:
    """Names of the sweep files in `sweeps/`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(ablation: str) -> Path:
    """Path of the sweep file for an ablation's name or for a path to a sweep file; SweepError if there is none."""
    path = Path(ablation) if ablation.endswith((".yaml", ".yml")) else FOLDER / f"{ablation}.yaml"
    if not path.is_file():
        raise SweepError(f"No sweep file {path}. {did_you_mean(path.stem, names())}")
    return path


def load(ablation: str) -> CheckedSweep:
    """Read and check the sweep file of an ablation; SweepError names the file, the key and what is allowed."""
    path = find(ablation)
    try:
        content = read(path)
        parameters = check_parameters(content.get("parameters"), path)
    except ValueError as error:
        raise SweepError(str(error)) from error
    for key in content:
        if key not in _TOP_LEVEL:
            raise SweepError(f"{path}: unknown key {key!r}. {did_you_mean(str(key), _TOP_LEVEL)}")
    name = content.get("name")
    if name != path.stem:
        raise SweepError(
            f"{path}: name is {name!r}, but must be the file's name {path.stem!r}: results are found by it."
        )
    method = content.get("method")
    if method not in _METHODS:
        raise SweepError(f"{path}: method is {method!r}. {did_you_mean(str(method), _METHODS)}")
    metric = content.get("metric") or {}
    if metric and (not isinstance(metric, dict) or metric.get("goal") not in ("minimize", "maximize")):
        raise SweepError(f"{path}: metric needs a name and a goal, minimize or maximize; found {metric!r}.")
    if method == "bayes" and not metric:
        raise SweepError(f"{path}: method bayes needs a metric with name and goal.")
    run_cap = content.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise SweepError(f"{path}: run_cap is {run_cap!r}, but must be a whole number of at least 1.")
    return CheckedSweep(
        path=path,
        name=name,
        description=" ".join(str(content.get("description") or "").split()),
        method=method,
        metric=metric,
        parameters=parameters,
        command=_check_command(content.get("command"), name, path),
        run_cap=run_cap,
    )


def _check_command(command: Any, name: str, path: Path) -> tuple[str, ...]:
    if not isinstance(command, list) or ARGS not in command:
        raise SweepError(f"{path}: command must be a list of words with {ARGS} among them; found {command!r}.")
    words = tuple(str(word) for word in command)
    for word in words:
        if word.startswith("--run.sweep=") and word != f"--run.sweep={name}":
            raise SweepError(f"{path}: command has {word!r}, but the sweep's name is {name!r}.")
    return words
