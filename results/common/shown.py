"""Names and texts from data as they may be shown: nothing in them steers a terminal, an editor or a page."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_HIDDEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
)  # controls, direction marks, bytes that are not UTF-8, line separators


def printable(text: str) -> str:
    """The text with every control character and every byte that is not UTF-8 spelled out, like `\\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        spelled(character) if unicodedata.category(character) in _HIDDEN and character not in _KEPT else character
        for character in text
    )


def spelled(character: str) -> str:
    """A character as Python writes it in a text: `\\x1b`, `\\u6728`."""
    return ascii(character)[1:-1]
