"""The one "did you mean" of all messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 40
"""More names than these are not listed."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known name that is meant in all likelihood, or two that are equally near; [] if none is near."""
    names = sorted(set(known))
    same = [other for other in names if other.casefold() == name.casefold()]
    return same or get_close_matches(name, names, 2, 0.8) or get_close_matches(name, names, 1, 0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentences for the end of a message: the nearest known name, or two, and all of them unless they are many."""
    names = sorted(set(known))
    near = nearest(name, names)
    sentences = [f"Did you mean {' or '.join(map(repr, near))}?"] if near else []
    if len(names) <= LISTED:
        sentences.append(f"Known: {', '.join(names) or 'none'}.")
    return " ".join(sentences) or f"None of {len(names)} known names is near."
