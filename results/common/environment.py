"""What a user names in the environment: DATASET, DATA_ROOT, CATEGORIES, BACKBONE, WEIGHTS, ALPHA, RULE.

Lists are separated by commas; white space around a part and empty parts are dropped. Nothing else is interpreted: the
shell has taken its own quotes away before, so that a quote or a dollar sign in a value is part of a name.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NamedDataset:
    """A dataset as the user names it.

    Attributes:
        name: its reader.
        root: its folder, with `~` expanded; "" for the one that comes with the project.
        categories: the subset to use, None for all.
        label: its name in tables if its reader is used more than once: its folder's. Else None.
    """

    name: str
    root: str
    categories: tuple[str, ...] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Named:
    """All that the environment names; empty where it names nothing."""

    datasets: tuple[NamedDataset, ...] = ()
    backbone: str = ""
    weights: str = ""
    alpha: float | None = None
    rule: str = ""


VARIABLES = ("PROFILE", "DATASET", "DATA_ROOT", "CATEGORIES", "BACKBONE", "WEIGHTS", "ALPHA", "RULE")
"""Variables that steer a run; PROFILE is that of the methods in a sweep over methods."""


def shell_line(words: Iterable[str], variables: Mapping[str, str]) -> str:
    """A command as a shell takes it, with the variables before it that steer a run: copied, it runs the same again."""
    given = [f"{name}={shlex.quote(variables[name])}" for name in VARIABLES if variables.get(name)]
    return " ".join([*given, *map(shlex.quote, words)])


def parts(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """The parts of a comma list, `"a, b,"` -> `("a", "b")`; a list is taken as it is, None as an empty one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value or ())


def parse(variables: Mapping[str, str], has_own_root: Callable[[str], bool]) -> Named:
    """Read the variables.

    `DATASET` and `DATA_ROOT` are lists of equal length. A dataset that comes with the project needs no root: its
    place in `DATA_ROOT` may be empty or left out. `CATEGORIES` needs exactly one dataset, since it would not say
    whose they are.

    Args:
        variables: the environment.
        has_own_root: whether the reader of this name knows where its data lies; asked only if a root is missing.

    Raises:
        ValueError: the variables contradict each other.
    """
    names, categories = parts(variables.get("DATASET")), parts(variables.get("CATEGORIES"))
    roots = _roots(names, variables.get("DATA_ROOT") or "", has_own_root)
    if categories and len(names) != 1:
        raise ValueError(f"CATEGORIES={','.join(categories)} needs exactly one DATASET; found {len(names)}.")
    labels = [
        Path(root).name if root and names.count(name) > 1 else None for name, root in zip(names, roots, strict=True)
    ]
    return Named(
        tuple(
            NamedDataset(name, root, categories or None, label)
            for name, root, label in zip(names, roots, labels, strict=True)
        ),
        (variables.get("BACKBONE") or "").strip(),
        (variables.get("WEIGHTS") or "").strip(),
        _rate((variables.get("ALPHA") or "").strip()),
        (variables.get("RULE") or "").strip(),
    )


def _rate(text: str) -> float | None:
    """A rate of false alarms; None for nothing."""
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 < value < 1:
        raise ValueError(
            f"ALPHA={text} is no rate of false alarms: give a number above 0 and below 1, for example 0.01."
        )
    return value


def _roots(names: tuple[str, ...], text: str, has_own_root: Callable[[str], bool]) -> list[str]:
    """One root for each dataset."""
    given = [os.path.expanduser(root) for root in parts(text)]
    if len(given) == len(names):
        return given
    places = [os.path.expanduser(part.strip()) for part in text.split(",")]
    if len(places) == len(names) and all(root or has_own_root(name) for name, root in zip(names, places, strict=True)):
        return places
    needy = [not has_own_root(name) for name in names]
    if len(given) == sum(needy) and names:
        left = iter(given)
        return [next(left) if needs else "" for needs in needy]
    raise ValueError(
        f"DATASET names {len(names)} dataset(s) ({', '.join(names) or 'none'}) but DATA_ROOT {len(given)} folder(s) "
        f"({', '.join(given) or 'none'}): give one folder per dataset, for example DATASET=mvtec_ad DATA_ROOT=/data/mvtec."
    )
