"""The error of this package, and the "did you mean" that its messages end with."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(ValueError):
    """Something on disk or in the data options is not as it must be; the message says what, where and what to do."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence naming the options, led by the nearest one if one is near (else just the list)."""
    known = sorted(options)
    near = get_close_matches(name, known, n=1, cutoff=0.5) or [
        option for option in known if option.casefold() == name.casefold()
    ]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."
