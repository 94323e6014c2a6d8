"""The datasets that a run names -> one table of their images and the rules by which each is read; nothing is decoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.images import MAX_MEGAPIXELS, REMARKABLE, infer_bit_depth, odd_mode, read_image
from datamodules.problems import WARNING, describe, number_of
from datamodules.readers import DatasetReader, list_dataset, raise_on_errors
from datamodules.sample_table import SampleTable, concatenate, file_hashes, fingerprint
from results.common.environment import parts


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of the run.

    Args:
        name: reader: mvtec_ad, mvtec_ad_2, mvtec_loco, btad, mpdd, visa, real_iad, real_iad_sv, real_iad_variety, folder,
            photos or synthetic.
        root: its folder; "" for photos, which come with the project.
        categories: the subset to use, None for all; also a text "bottle,cable".
        label: its name in tables, default `name`; needed when one reader is used twice.
    """

    name: str
    root: str = ""
    categories: tuple[str, ...] | str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", parts(self.categories) or None)
        object.__setattr__(self, "root", str(self.root or ""))


@dataclass(frozen=True)
class Reading:
    """Datasets as found on disk.

    Attributes:
        table: SampleTable of all splits.
        roots: dataset -> its folder.
        fingerprints: dataset -> sha256 of its data; `fingerprint`: of all of it.
        hashes: image or mask -> hash of its contents, those that the fingerprints are of.
        bit_depths: dataset -> significant bits of its 16-bit images, if it has any.
        thresholds: dataset -> value above which a mask pixel is defective.
        readers: dataset -> its reader.
    """

    table: SampleTable
    roots: dict[str, Path]
    fingerprints: dict[str, str]
    fingerprint: str
    hashes: dict[str, str]
    bit_depths: dict[str, int]
    thresholds: dict[str, int]
    readers: dict[str, DatasetReader]

    @property
    def rules(self) -> dict[str, Any]:
        """How a file becomes pixels, as arguments of `ImageSource`."""
        return {"bit_depths": self.bit_depths, "thresholds": self.thresholds}


def first_categories(configs: Sequence[DatasetConfig], count: int) -> list[DatasetConfig]:
    """The datasets with their first `count` categories in all, as named, or in the dataset's own order where none is.

    Raises:
        DataError: there are fewer.
    """
    left, kept = count, []
    for config in configs:
        names = config.categories
        if names is None:
            table = list_dataset(config.name, config.root, None, config.label).table
            names = tuple(dict.fromkeys(table["category"].tolist()))
        if left:
            kept.append(replace(config, categories=tuple(names[:left])))
        left -= min(left, len(names))
    if left:
        raise DataError(
            f"category_count is {count}, but only {number_of(count - left, 'category')} are named or found: lower it, or name "
            "more (CATEGORIES, or the dataset's `categories`)."
        )
    return kept


def read_datasets(
    configs: Sequence[DatasetConfig], bit_depth: int | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> Reading:
    """Read the datasets' names and headers, with one warning per dataset about whatever is odd in it.

    Args:
        configs: the datasets.
        bit_depth: significant bits of 16-bit images; None infers them per dataset from its training images.
        max_megapixels: as in `decode`.

    Raises:
        DataError: no dataset, an unknown name, or data with errors.
    """
    if not configs:
        raise DataError("No dataset is named: give `datasets` at least one entry with a name and a root.")
    listings = {
        config.label or config.name: list_dataset(config.name, config.root, config.categories, config.label)
        for config in configs
    }
    bit_depths: dict[str, int] = {}
    for label, listing in listings.items():
        raise_on_errors(listing)
        found = [problem for problem in listing.problems if problem.severity == WARNING]
        if found:
            warnings.warn(
                f"{label}: {number_of(len(found), 'remark')} on the data:\n{describe(found, limit=5)}", stacklevel=3
            )
        _settle_modes(label, listing.table, bit_depth, max_megapixels, bit_depths)
    table = concatenate(listing.table for listing in listings.values())
    roots = {label: listing.root for label, listing in listings.items()}
    hashes = file_hashes(table, roots)
    fingerprints = {label: fingerprint(listing.table, roots, hashes) for label, listing in listings.items()}
    single = len(listings) == 1  # what every run does before it starts is kept short
    whole = next(iter(fingerprints.values())) if single else fingerprint(table, roots, hashes)
    thresholds = {label: listing.reader.mask_threshold for label, listing in listings.items()}
    readers = {label: listing.reader for label, listing in listings.items()}
    return Reading(table, roots, fingerprints, whole, hashes, bit_depths, thresholds, readers)


def _settle_modes(
    label: str, table: SampleTable, bit_depth: int | None, max_megapixels: float, bit_depths: dict[str, int]
) -> None:
    """One warning per dataset about odd image modes, and the bit depth of 16-bit images."""
    files: dict[str, list[str]] = {}
    for path in table["image_path"]:
        mode = odd_mode(path)
        if mode is not None:
            files.setdefault(mode, []).append(path)
    for mode in set(files) - set(REMARKABLE):
        read_image(files[mode][0], bit_depth, max_megapixels)  # refuses pixels of this type with the whole sentence
    notes = [
        f"{number_of(len(paths), 'image')} of mode {mode} (e.g. {paths[0]}): {REMARKABLE[mode]}"
        for mode, paths in files.items()
        if mode in REMARKABLE
    ]
    deep = files.get("16-bit")
    if deep:
        train = set(table.loc[table["split"] == "train", "image_path"])
        bits = bit_depth or infer_bit_depth([p for p in deep if p in train] or deep, max_megapixels=max_megapixels)
        bit_depths[label] = bits
        how = "as declared" if bit_depth else "inferred from the brightest values; declare bit_depth to fix it"
        notes.append(f"16-bit images are read as {bits} bits ({how})")
    if notes:
        warnings.warn(f"{label}: " + "; ".join(notes), stacklevel=4)
