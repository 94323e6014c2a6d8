"""The one error that the user can act on, and the sentence "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SweepError(Exception):
    """Something the user can correct; the message says what was found, where, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name nearest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
