"""Reads a W&B sweep file and checks its parameters, for the runner and for the tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from results.common.did_you_mean import did_you_mean

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")
_OTHER_NAMES = {  # what W&B calls otherwise, or draws by exponents
    "log_uniform": "log_uniform_values", "loguniform": "log_uniform_values", "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values", "q_log_uniform": "q_log_uniform_values", "log": "log_uniform_values",
    "log_normal": "log_uniform_values", "q_normal": "normal", "gaussian": "normal", "int": "int_uniform",
    "integer": "int_uniform", "randint": "int_uniform", "float": "uniform", "choice": "categorical", "grid": "categorical",
}  # fmt: skip
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


def read(path: Path) -> dict[str, Any]:
    """The file's content; ValueError if it is not YAML, or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping with name, method, parameters and command.")
    return content


def numbers(value: Any) -> Any:
    """The value with numbers as W&B's server reads them: `1e-4`, in which Python's YAML sees a text, is one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return [numbers(part) for part in value]
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    return value


def _parts(value: Any) -> Iterator[Any]:
    """The value, or what lists and mappings of it hold."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)
    else:
        yield value


def distribution(entry: Mapping[str, Any]) -> str:
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


def axis(entry: Mapping[str, Any]) -> list[Any] | None:
    """The values of a parameter's entry in the file's order; None if it is drawn from what has no end of values."""
    kind, ends = distribution(entry), (entry.get("min"), entry.get("max"))
    if kind == "constant":
        return [entry["value"]]
    if kind == "categorical":
        return entry.get("values")
    if kind == "int_uniform" and all(isinstance(end, int) for end in ends):
        return list(range(ends[0], ends[1] + 1))
    return None


def check_parameters(parameters: Any, path: Path) -> dict[str, dict[str, Any]]:
    """The parameters, if W&B and the command line understand them; ValueError names the key and what is allowed."""
    parameters = numbers(parameters)
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{path}: parameters must be a mapping of dotted command line keys to values.")
    for name, entry in parameters.items():
        where = f"{path}: parameter {name!r}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: a name has letters, digits, '_', '.' and '-' and starts without hyphens.")
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {entry!r}; write {{value: {entry}}} or {{values: [...]}}.")
        if "parameters" in entry:
            raise ValueError(f"{where} is nested; write each key with its dots, as on the command line ({name}.key).")
        kind = distribution(entry)
        if not isinstance(kind, str) or kind not in _DISTRIBUTIONS:
            written = get_close_matches(str(kind).lower().replace("-", "_"), [*_OTHER_NAMES, *_DISTRIBUTIONS], 1, 0.8)
            known = _OTHER_NAMES.get(written[0]) if written else None
            hint = f"Did you mean {known!r}?" if known else did_you_mean(str(kind), _DISTRIBUTIONS)
            raise ValueError(f"{where}: distribution {kind!r} is unknown. {hint}")
        allowed = ("distribution", *_DISTRIBUTIONS[kind])
        for key in entry:
            if key not in allowed:
                raise ValueError(
                    f"{where}: unknown key {key!r} of a {kind} parameter. {did_you_mean(str(key), [*allowed, 'values'])}"
                )
        missing = [key for key in _DISTRIBUTIONS[kind] if key not in entry and key != "probabilities"]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing for a {kind} parameter; found {entry!r}.")
        if kind == "categorical" and (not isinstance(entry["values"], list) or not entry["values"]):
            raise ValueError(f"{where}: values must be a list with at least one value; found {entry['values']!r}.")
        for key in ("min", "max", "mu", "sigma", "q"):
            if key in entry and (isinstance(entry[key], bool) or not isinstance(entry[key], (int, float))):
                raise ValueError(f"{where}: {key} is {entry[key]!r}, which is not a number.")
        if "log_" in kind and entry["min"] <= 0:
            raise ValueError(f"{where}: min {entry['min']} of a {kind} parameter must be above 0; uniform takes any.")
        if "max" in entry and not entry["min"] < entry["max"]:
            raise ValueError(f"{where}: min {entry['min']} is not below max {entry['max']}.")
        for key, value in entry.items():
            if any(isinstance(one, float) and not math.isfinite(one) for one in _parts(value)):
                raise ValueError(f"{where}: {key} is {value!r}; numbers must be finite.")
        if any(part is None for part in _parts([*entry.get("values", ()), entry.get("value", 0)])):
            raise ValueError(
                f'{where}: null would reach the command line as the word None; write the string "null" in quotes, '
                'and a mapping that holds one as a whole: "{a: null}".'
            )
    return parameters
