"""The sweep `methods`: a cell is a method, which is a profile, with what all methods share laid over it.

`--method=NAME` stands for the configuration `sweeps/profiles/$PROFILE/NAME.yaml`, and `--compare=recipe|matched|longer`
beside it for the options that `sweeps/comparisons/$PROFILE.yaml` lays over it. Both are read here alike for the program, the
local runner and W&B's agent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from results.common.did_you_mean import did_you_mean

METHOD, COMPARE, SETTING = "method", "compare", "data.init_args.setting"
"""Parameters of the sweep `methods`: which profile, which experiment, one model for all or one each."""
SWEEP = "methods"
"""Its name."""
COMPARES = ("recipe", "matched", "longer")
"""Its experiments: each method as its profile has it, all on one backbone, each with more training than its profile has."""
PROFILES, SHARED = Path("sweeps/profiles"), Path("sweeps/comparisons")
_KEYS = {"": ("shared", "matched", "longer"), "matched": ("shared", "own", "cannot"), "longer": ("own", "cannot")}


class CannotError(ValueError):
    """A method cannot take part in the experiment; the message says why."""


def profile(method: str, name: str) -> Path:
    """The file of a method's profile `name` (demo, paper); ValueError with the nearest method if there is none."""
    path = PROFILES / name / f"{method}.yaml"
    if not path.is_file():
        raise CannotError(f"There is no profile {path}. {did_you_mean(method, methods(name))}")
    return path


def methods(name: str) -> list[str]:
    """All methods that have a profile `name`."""
    return sorted(path.stem for path in (PROFILES / name).glob("*.yaml"))


def of(parameters: Mapping[str, Any]) -> tuple[str, str] | None:
    """(method, experiment) of a cell's parameters; None if its sweep is another than `methods`."""
    return (parameters[METHOD], parameters[COMPARE]) if METHOD in parameters and COMPARE in parameters else None


def shared(method: str, compare: str, name: str) -> dict[str, Any]:
    """The options that a method gets in an experiment, whatever its profile says, by dotted key.

    Raises:
        CannotError: the method cannot have the matched backbone, or no longer training.
        ValueError: no such experiment, or the file is not as it should be.
    """
    if compare not in COMPARES:
        raise ValueError(f"compare is {compare!r}; allowed: {', '.join(COMPARES)}.")
    content = _read(name)
    options = dict(content["shared"])
    if compare == "recipe":
        return options
    if compare not in content:
        raise ValueError(
            f"{SHARED / name}.yaml has no {compare}: profile {name} trains as long as it says. Use PROFILE=demo."
        )
    experiment = content[compare]
    if method in (experiment.get("cannot") or {}):
        raise CannotError(f"not for {compare}: {experiment['cannot'][method]}")
    own = (experiment.get("own") or {}).get(method)
    if compare == "longer" and not own:
        raise CannotError(f"not for longer: {SHARED / name}.yaml says under longer, own nothing of {method}")
    return options | experiment.get("shared", {}) | (own or {})


def datasets(name: str) -> list[dict[str, Any]]:
    """The data sets that all methods get where the environment names none."""
    return _read(name)["shared"]["data.init_args.datasets"]


def expand(arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Arguments with `--method` as a `--config`, and apart those that all methods share.

    The latter belong before what the environment names and after the configuration. Without `--method` nothing changes.

    Args:
        arguments: The program's, the subcommand first.
        variables: The environment; PROFILE (default demo) chooses the folder, BACKBONE is only for `matched`.

    Raises:
        ValueError: no such method or experiment, or one without the other.
    """
    given: dict[str, str] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in (f"--{METHOD}", f"--{COMPARE}"):
            given[key[2:]] = value
        else:
            rest.append(argument)
    if METHOD not in given:
        if given:
            raise ValueError(f"--{COMPARE}={given[COMPARE]} needs --{METHOD}=NAME, the profile that it is laid over.")
        return list(arguments), []
    name, compare = variables.get("PROFILE") or "demo", given.get(COMPARE)
    if compare in ("recipe", "longer") and (variables.get("BACKBONE") or "").strip():
        raise ValueError(
            f"BACKBONE={variables['BACKBONE']} would take each method's own backbone away, which COMPARE={compare} is about. "
            "Use COMPARE=matched."
        )
    path = profile(given[METHOD], name)
    options = shared(given[METHOD], compare, name) if compare else {}
    words = [
        f"--{key}={value if isinstance(value, (str, int, float)) else json.dumps(value)}"
        for key, value in options.items()
    ]
    return [*rest[:1], f"--config={path}", *rest[1:]], words


def _read(name: str) -> dict[str, Any]:
    path = SHARED / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [other.stem for other in SHARED.glob("*.yaml")]
        raise ValueError(
            f"There is no {path}, so no comparison of profile {name}. {did_you_mean(name, known)}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    for part in (content, (content or {}).get("matched")):
        if not isinstance(part, dict) or "shared" not in part:
            raise ValueError(f"{path} must be a mapping with `shared`, and `matched` with another `shared` in it.")
    for where, keys in _KEYS.items():
        part = content.get(where, {}) if where else content
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {where} is {part!r}; it is a mapping with {' and '.join(keys)}.")
        for key in part:
            if key not in keys:
                raise ValueError(f"{path}: unknown key {key!r}. {did_you_mean(str(key), keys)}")
    return content
