"""One file per dataset. A new dataset is a new file here with a `DatasetReader` decorated by `@register`."""

from datamodules.readers.base import (
    Counts,
    DatasetReader,
    Listing,
    find_dataset,
    get_reader,
    has_own_root,
    list_dataset,
    load_readers,
    raise_on_errors,
    register,
)

__all__ = [
    "Counts",
    "DatasetReader",
    "Listing",
    "find_dataset",
    "get_reader",
    "has_own_root",
    "list_dataset",
    "load_readers",
    "raise_on_errors",
    "register",
]
