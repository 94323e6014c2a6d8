"""Datasets on disk -> one sample table -> batches. Knows no model.

`UnifiedDataModule` and `DatasetConfig` are what training needs; they are imported late, so that checking and generating
data starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DataError": "errors",
    "DatasetConfig": "reading",
    "SampleTable": "sample_table",
    "UnifiedDataModule": "unified",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
