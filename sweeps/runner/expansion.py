"""From a sweep file's parameters to its cells: the grid, random draws, and the choice among them.

The grid is what W&B makes of the same file: names sorted, `itertools.product` over their values, equal values once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from results.common.did_you_mean import did_you_mean
from results.common.sweep_file import axis, distribution, numbers
from sweeps.runner.errors import SweepError

SEED = "seed_everything"


@dataclass(frozen=True)
class Cell:
    """One combination of sweep parameters; `parameters` keeps W&B's order (names sorted)."""

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


def grid(parameters: dict[str, dict[str, Any]], path: Path) -> list[Cell]:
    """Every combination, as W&B makes them; SweepError for a parameter without end of values."""
    axes = []
    for name in sorted(parameters):
        values = axis(parameters[name])
        if values is None:
            raise SweepError(
                f"{path}: parameter {name!r} is {distribution(parameters[name])}, whose values cannot be listed; a grid "
                f"needs value, values or whole numbers min and max. Write method: random to draw from it."
            )
        axes.append(unique(values))
    return [Cell(dict(zip(sorted(parameters), values, strict=True))) for values in itertools.product(*axes)]


def draw(parameters: dict[str, dict[str, Any]], count: int, sampler_seed: int) -> list[Cell]:
    """Draw `count` points, each with every seed; repeatable, and equal points once."""
    # The seeds of the runs do not belong to the search: each drawn point runs with every seed.
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
    kind = distribution(entry)
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


def select(cells: list[Cell], only: list[str], path: Path) -> list[Cell]:
    """Keep the cells that fulfil every `key=value` in `only`.

    A key is a parameter's full name or its last parts (`query` for `model.init_args.query`); the value is read as
    YAML. Several values of one key, separated by commas, or one key named twice, mean "any of them". SweepError if the key
    or value does not occur in the sweep.
    """
    wanted: dict[str, list[Any]] = {}
    known = sorted({name for cell in cells for name in cell.parameters})
    for condition in only:
        key, equals, text = condition.partition("=")
        if not equals:
            raise SweepError(f"--only {condition!r} must have the form key=value, for example query=none.")
        matches = [name for name in known if name == key] or [name for name in known if name.endswith(f".{key}")]
        if len(matches) != 1:
            found = f"fits several parameters: {', '.join(matches)}" if matches else "is not a parameter of this sweep"
            hint = did_you_mean(key, [*known, *(name.rsplit(".", 1)[-1] for name in known)])
            raise SweepError(f"--only {condition!r}: {key!r} {found} ({path}). {hint}")
        value = numbers(yaml.safe_load(text))
        occurs = any(same(value, cell.parameters[matches[0]]) for cell in cells)
        several = isinstance(value, str) and "," in value and not occurs
        wanted.setdefault(matches[0], []).extend(
            [numbers(yaml.safe_load(part)) for part in value.split(",") if part.strip()] if several else [value]
        )
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
