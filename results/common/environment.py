"""What DATASET, DATA_ROOT and CATEGORIES say: the one reading of them, for every command.

make hands its variables over through the environment, letter for letter, so that ``$``, quotes and blanks in a folder's
name arrive as they were typed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

DATA = ("DATASET", "DATA_ROOT", "CATEGORIES")


def names(text: str | None) -> tuple[str, ...]:
    """The names of a list separated by commas, without the blanks around them and without empty ones."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def folders(text: str | None, count: int = 1) -> tuple[str, ...]:
    """The folders of a list separated by commas, ``~`` written out.

    Args:
        text: The list. If one folder is wanted, it is one folder, whatever commas are in its name.
        count: How many are wanted.
    """
    text = (text or "").strip()
    parts = ((text,) if text else ()) if count == 1 else names(text)
    return tuple(os.path.expanduser(part) for part in parts)


def data(variables: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names, folders and categories of the data sets; a number of folders that does not fit is the caller's to refuse."""
    found = names(variables.get("DATASET"))
    return found, folders(variables.get("DATA_ROOT"), len(found)), names(variables.get("CATEGORIES"))
