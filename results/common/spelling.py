"""The one "did you mean" of all messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 40
"""More names than these are not listed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentences for the end of a message: the nearest known name, or two, and all of them unless they are many."""
    names = sorted(set(known))
    near = [other for other in names if other.casefold() == name.casefold()]
    near = near or get_close_matches(name, names, 2, 0.8) or get_close_matches(name, names, 1, 0.5)
    sentences = [f"Did you mean {' or '.join(map(repr, near))}?"] if near else []
    if len(names) <= LISTED:
        sentences.append(f"Known: {', '.join(names) or 'none'}.")
    return " ".join(sentences) or f"None of {len(names)} known names is near."
