"""A shortcut inside jsonargparse: the same answer in less time."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

_NAMES = ("find_action_and_subcommand", "_find_action_and_subcommand")
"""What jsonargparse calls the function, from 4.47 on and before."""


def look_options_up() -> None:
    """Lets jsonargparse find an option by its name, which it asks for some seven thousand times per command line of ours.

    Its own function goes through all options of the parser each time. Here it goes through those of that name and the
    subcommands, so what it does with them stays its own.
    """
    places = [vars(module) for name, module in list(sys.modules.items()) if name.partition(".")[0] == "jsonargparse"]
    for name in _NAMES:
        defined = {id(place[name]): place[name] for place in places if name in place}
        for through_all in defined.values():
            quick = _by_name(through_all)
            for place in places:
                if place.get(name) is through_all:
                    place[name] = quick


def _by_name(through_all: Any) -> Any:
    known: WeakKeyDictionary[Any, tuple[list[Any] | None, dict[str, list[Any]]]] = WeakKeyDictionary()

    def find(parser: Any, dest: str, exclude: Any = None) -> Any:
        of, named = known.get(parser, (None, {}))
        if of != parser._actions:  # not looked at yet, or options were added since
            named = _named(parser._actions)
            known[parser] = list(parser._actions), named
        return through_all(SimpleNamespace(_actions=named.get(dest, named[""])), dest, exclude=exclude)

    find.through_all = through_all  # type: ignore[attr-defined]
    return find


def _named(actions: list[Any]) -> dict[str, list[Any]]:
    """For every name of an option the options of that name and the subcommands, in their order; the latter alone under ""."""
    subcommands = [action for action in actions if hasattr(action, "_name_parser_map")]
    found: dict[str, list[Any]] = {"": subcommands}
    for action in actions:
        for name in {action.dest, *(word[2:] for word in action.option_strings if word.startswith("--"))}:
            found.setdefault(name, []).append(action)
    if subcommands:
        found = {name: [a for a in actions if a in mine or a in subcommands] for name, mine in found.items()}
    return found
