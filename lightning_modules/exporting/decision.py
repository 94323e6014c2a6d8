"""The thresholds of a run, for a file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def decision(record: Path, category: str) -> dict[str, Any]:
    """Thresholds by category."""
    return {"thresholds": {}}
