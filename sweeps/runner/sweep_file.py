"""Read a W&B sweep file and expand it into cells.

The grid is what W&B makes of the same file: names sorted, ``itertools.product`` over their values, equal values once.
Only dotted parameter names are accepted, because they reach the command line letter for letter under the W&B agent and
under the local runner.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from results.common.nearest import did_you_mean
from sweeps.runner.errors import SweepError

FOLDER = Path("sweeps")
SEED = "seed_everything"
ARGS = "${args}"

_TOP_LEVEL = {
    "name", "description", "project", "entity", "method", "metric", "parameters", "command", "program", "run_cap",
    "early_terminate",
}  # fmt: skip
_METHODS = ("grid", "random", "bayes")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max", "q"),
    "normal": ("mu", "sigma"),
}


_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")
_OTHER_NAMES = {  # what W&B calls otherwise, or draws by exponents
    "log_uniform": "log_uniform_values", "loguniform": "log_uniform_values", "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values", "q_log_uniform": "q_log_uniform_values", "log": "log_uniform_values",
    "log_normal": "log_uniform_values", "q_normal": "normal", "gaussian": "normal", "int": "int_uniform",
    "integer": "int_uniform", "randint": "int_uniform", "float": "uniform", "choice": "categorical", "grid": "categorical",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One combination of sweep parameters; ``parameters`` keeps W&B's order (names sorted)."""

    parameters: dict[str, Any]

    @property
    def seed(self) -> Any:
        """The run's seed, or None if the sweep file does not set one."""
        return self.parameters.get(SEED)

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters, for a person: one whose value is a mapping is taken apart into its keys."""
        apart: dict[str, Any] = {}
        for name, value in self.parameters.items():
            apart |= (
                {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            )
        return apart


@dataclass(frozen=True)
class SweepFile:
    """A sweep file that was read and checked; ``parameters`` maps dotted names to W&B's parameter entries."""

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
            if name != SEED and _distribution(entry) != "constant" and len(entry.get("values", (0, 1))) > 1
        )

    def cells(self, seeds: list[int] | None = None, count: int | None = None, sampler_seed: int = 0) -> list[Cell]:
        """Expand into cells.

        seeds: replaces the values of ``seed_everything``. count: how many cells of a random search (default: the
        file's ``run_cap``). sampler_seed: seeds the random search. Raises SweepError for method bayes, which needs
        the results of earlier runs and therefore W&B's server.
        """
        parameters = dict(self.parameters)
        if seeds:
            parameters[SEED] = {"values": list(seeds)}
        if self.method == "grid":
            return _grid(parameters, self.path)
        if self.method == "random":
            return _random(parameters, count or self.run_cap, sampler_seed, self.path)
        raise SweepError(
            f"{self.path}: method 'bayes' chooses each cell from the results of the earlier ones, which W&B's server "
            f"does. Run it with `make wandb-sweep ABLATION={self.name}` and agents, or write method: grid or random."
        )


def names() -> list[str]:
    """Names of the sweep files in ``sweeps/``, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(ablation: str) -> Path:
    """Path of the sweep file for an ablation's name or for a path to a sweep file; SweepError if there is none."""
    path = Path(ablation) if ablation.endswith((".yaml", ".yml")) else FOLDER / f"{ablation}.yaml"
    if not path.is_file():
        raise SweepError(f"No sweep file {path}. {did_you_mean(path.stem, names())}")
    return path


def load(ablation: str) -> SweepFile:
    """Read and check the sweep file of an ablation; SweepError names the file, the key and what is allowed."""
    path = find(ablation)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} must be a mapping with name, method, parameters and command.")
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
    return SweepFile(
        path=path,
        name=name,
        description=" ".join(str(content.get("description") or "").split()),
        method=method,
        metric=metric,
        parameters=_check_parameters(numbers(content.get("parameters")), path),
        command=_check_command(content.get("command"), name, path),
        run_cap=run_cap,
    )


def select(cells: list[Cell], only: list[str], path: Path) -> list[Cell]:
    """Keep the cells that fulfil every ``key=value`` in ``only``.

    A key is a parameter's full name or its last parts (``query`` for ``model.init_args.query``); the value is read as
    YAML. Several values of one key, or one key named twice, mean "any of them". SweepError if the key or value does not
    occur in the sweep.
    """
    wanted: dict[str, list[Any]] = {}
    known = sorted({name for cell in cells for name in cell.parameters})
    for condition in only:
        key, equals, text = condition.partition("=")
        if not equals:
            raise SweepError(f"--only {condition!r} must have the form key=value, for example query=none.")
        matches = [name for name in known if name == key] or [name for name in known if name.endswith(f".{key}")]
        if len(matches) != 1:
            found = f"fits several parameters: {', '.join(matches)}" if matches else "is no parameter of this sweep"
            hint = did_you_mean(key, [*known, *(name.rsplit(".", 1)[-1] for name in known)])
            raise SweepError(f"--only {condition!r}: {key!r} {found} ({path}). {hint}")
        wanted.setdefault(matches[0], []).append(numbers(yaml.safe_load(text)))
    for name, values in wanted.items():
        occurring = unique([cell.parameters[name] for cell in cells])
        for value in values:
            if not any(same(value, other) for other in occurring):
                raise SweepError(f"--only {name}={value}: {path} has the values {', '.join(map(str, occurring))}.")
    return [
        cell
        for cell in cells
        if all(any(same(cell.parameters[name], value) for value in values) for name, values in wanted.items())
    ]


def varying(cells: list[Cell]) -> tuple[str, ...]:
    """Names of the settings in which the cells differ, the seed included."""
    names = dict.fromkeys(name for cell in cells for name in cell.settings)
    return tuple(name for name in names if len(unique([cell.settings.get(name) for cell in cells])) > 1)


def same(one: Any, other: Any) -> bool:
    """Whether W&B takes two values for one: 1 and 1.0 are, True and 1 are not."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def unique(values: list[Any]) -> list[Any]:
    """The values without repetitions; of equal ones W&B keeps the first one's place and the last one's spelling."""
    result: list[Any] = []
    for value in values:
        places = [place for place, other in enumerate(result) if same(value, other)]
        if places:
            result[places[0]] = value
        else:
            result.append(value)
    return result


def numbers(value: Any) -> Any:
    """The value with numbers as W&B's server reads them: ``1e-4``, in which Python's YAML sees a text, is one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return [numbers(part) for part in value]
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    return value


def _distribution(entry: dict[str, Any]) -> str:
    """The distribution that W&B would infer for a parameter's entry."""
    if "distribution" in entry:
        return entry["distribution"]
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    if "mu" in entry:
        return "normal"
    if "q" in entry:
        return "q_uniform"
    return "int_uniform" if all(isinstance(entry.get(key), int) for key in ("min", "max")) else "uniform"


def _check_parameters(parameters: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(parameters, dict) or not parameters:
        raise SweepError(f"{path}: parameters must be a mapping of dotted command line keys to values.")
    for name, entry in parameters.items():
        where = f"{path}: parameter {name!r}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SweepError(f"{where}: a name has letters, digits, '_', '.' and '-' and starts without hyphens.")
        if not isinstance(entry, dict):
            raise SweepError(f"{where} is {entry!r}; write {{value: {entry}}} or {{values: [...]}}.")
        if "parameters" in entry:
            raise SweepError(f"{where} is nested; write each key with its dots, as on the command line ({name}.key).")
        kind = _distribution(entry)
        if kind not in _DISTRIBUTIONS:
            name = _OTHER_NAMES.get(str(kind).lower().replace("-", "_"))
            hint = f"Did you mean {name!r}?" if name else did_you_mean(str(kind), _DISTRIBUTIONS)
            raise SweepError(f"{where}: distribution {kind!r} is unknown. {hint}")
        allowed = ("distribution", *_DISTRIBUTIONS[kind])
        for key in entry:
            if key not in allowed:
                raise SweepError(
                    f"{where}: unknown key {key!r} of a {kind} parameter. {did_you_mean(str(key), [*allowed, 'values'])}"
                )
        missing = [key for key in _DISTRIBUTIONS[kind] if key not in entry and key != "probabilities"]
        if missing:
            raise SweepError(f"{where}: {', '.join(missing)} missing for a {kind} parameter; found {entry!r}.")
        if kind == "categorical" and (not isinstance(entry["values"], list) or not entry["values"]):
            raise SweepError(f"{where}: values must be a list with at least one value; found {entry['values']!r}.")
        for key in ("min", "max", "mu", "sigma", "q"):
            if key in entry and (isinstance(entry[key], bool) or not isinstance(entry[key], (int, float))):
                raise SweepError(f"{where}: {key} is {entry[key]!r}, which is no number.")
        if "log_" in kind and entry["min"] <= 0:
            raise SweepError(f"{where}: min {entry['min']} of a {kind} parameter must be above 0; uniform takes any.")
        if "max" in entry and not entry["min"] < entry["max"]:
            raise SweepError(f"{where}: min {entry['min']} is not below max {entry['max']}.")
        if any(value is None for value in (*entry.get("values", ()), entry.get("value", 0))):
            raise SweepError(
                f'{where}: null would reach the command line as the word None; write the string "null" in quotes.'
            )
    return parameters


def _check_command(command: Any, name: str, path: Path) -> tuple[str, ...]:
    if not isinstance(command, list) or ARGS not in command:
        raise SweepError(f"{path}: command must be a list of words with {ARGS} among them; found {command!r}.")
    words = tuple(str(word) for word in command)
    for word in words:
        if word.startswith("--run.sweep=") and word != f"--run.sweep={name}":
            raise SweepError(f"{path}: command has {word!r}, but the sweep's name is {name!r}.")
    return words


def _grid(parameters: dict[str, dict[str, Any]], path: Path) -> list[Cell]:
    axes = []
    for name in sorted(parameters):
        entry = parameters[name]
        kind = _distribution(entry)
        if kind == "constant":
            values = [entry["value"]]
        elif kind == "categorical":
            values = unique(entry["values"])
        elif kind == "int_uniform":
            values = list(range(entry["min"], entry["max"] + 1))
        else:
            raise SweepError(
                f"{path}: parameter {name!r} is {kind}, which has no end of values; a grid needs value, values or "
                f"whole numbers min and max. Write method: random to draw from it."
            )
        axes.append(values)
    return [Cell(dict(zip(sorted(parameters), values, strict=True))) for values in itertools.product(*axes)]


def _random(parameters: dict[str, dict[str, Any]], count: int | None, sampler_seed: int, path: Path) -> list[Cell]:
    if count is None:
        raise SweepError(f"{path}: method random needs an end: write run_cap in the file or give --count.")
    return draw(parameters, count, sampler_seed)


def draw(parameters: dict[str, dict[str, Any]], count: int, sampler_seed: int) -> list[Cell]:
    """Draw ``count`` points, each with every seed; repeatable, and equal points once."""
    # The seeds of the runs are no part of the search: each drawn point runs with every seed.
    seeds = parameters.get(SEED, {})
    seed_values = unique(seeds.get("values", [seeds["value"]] if "value" in seeds else []))
    cells = []
    for index in range(count):
        # A generator per point, so that the first cells stay the same when the count grows.
        generator = random.Random(_number(f"{sampler_seed}/{index}"))
        drawn = {name: _draw(parameters[name], generator) for name in sorted(parameters) if name != SEED}
        for values in [{SEED: value} for value in seed_values] or [{}]:
            cells.append(Cell(dict(sorted({**drawn, **values}.items()))))
    return list({json.dumps(cell.parameters, sort_keys=True): cell for cell in cells}.values())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _draw(entry: dict[str, Any], generator: random.Random) -> Any:
    kind = _distribution(entry)
    if kind == "constant":
        return entry["value"]
    if kind == "categorical":
        return generator.choices(entry["values"], weights=entry.get("probabilities"))[0]
    if kind == "int_uniform":
        return generator.randint(entry["min"], entry["max"])
    if kind == "normal":
        return generator.gauss(entry["mu"], entry["sigma"])
    low, high = entry["min"], entry["max"]
    if kind in ("log_uniform_values", "q_log_uniform_values"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return value if "q" not in entry else round(round(value / entry["q"]) * entry["q"], 12)
