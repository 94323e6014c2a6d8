"""Findings about a dataset on disk, collected while it is read and while it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from results.common.shown import printable

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Problem:
    """One finding: `kind` is a fixed phrase to group by, `message` a sentence for people, `files` the evidence."""

    severity: str
    kind: str
    category: str
    message: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity}: {self.category}: {self.kind}: {self.message}"


def number_of(count: int, noun: str) -> str:
    """A count with its noun in the singular or plural: 1 image, 2 images, 2 categories."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def describe(problems: Sequence[Problem], limit: int = 20) -> str:
    """The problems as indented lines with up to `limit` of them, and how many were left out."""
    lines = []
    for problem in problems[:limit]:
        lines.append(printable(f"  {problem}"))
        lines += [f"      {printable(file)}" for file in problem.files[:5]]
        if len(problem.files) > 5:
            lines.append(f"      ... and {len(problem.files) - 5} more files")
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more problems")
    return "\n".join(lines)
