"""Features of frozen backbones on disk: computed once per image, read by every epoch, run, seed and method that needs them.

An entry is a folder named by the hash of everything that decides its content (`CacheSpec`). It holds one memory-
mapped array per level, the packed masks, the resized images if they are asked for, and a checksum per row. It is built
beside its place, row by row, and renamed when complete, so a half-written entry is never read and an interrupted build
goes on where it stopped. Every row is compared with its checksum when the entry is opened; a damaged entry is built anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from datamodules.cache.folder import CacheTooLargeError, entries, locked, make_room, remove
from datamodules.problems import number_of
from results.common.files import sync_folder, write_json

VERSION = 4
"""Of the layout and of the way features are computed; raising it makes all older entries stale."""

DTYPES = ("float32", "float16")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError)  # what reading a damaged entry may raise
FLUSH_EVERY = 512  # rows
RELEASE_EVERY = 32  # rows

Computed = Iterator[tuple[list[Tensor], Tensor, Tensor | None]]
"""Consecutive batches: levels (B, C_l, H_l, W_l), masks bool (B, 1, H, W), images uint8 (B, 3, H, W) or None."""


class NonFiniteFeaturesError(RuntimeError):
    """A backbone gave NaN or infinity, or a number that float16 cannot hold."""


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides an entry's content.

    Args:
        content: Hash of the images, masks and reading rules in the order of their ids.
        image_size: (height, width) in pixels.
        resize: Resize rule of the data module.
        backbone: Name, sha256 of the weights, padding and levels of the frozen backbone; None: no features, only images.
        preparation: What is done to the levels before anything trainable, in words (see `FeatureNetwork.preparation`).
        mean: Normalisation of the input images, per channel.
        std: Likewise.
        dtype: `float32` (bit-exact) or `float16`.
        images: Whether the resized images are kept too, for a network that reads them.
        symmetries: Hash of the rows that follow those of the table: symmetries of training images; empty without any.
    """

    content: str
    image_size: tuple[int, int]
    resize: str
    backbone: dict[str, Any] | None = None
    preparation: str = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: str = "float32"
    images: bool = False
    symmetries: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"Feature cache dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}.")
        if self.backbone is None and not self.images:
            raise ValueError("A cache entry without a backbone holds images: set images=True.")

    @property
    def key(self) -> str:
        """Name of the entry's folder."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def title(self) -> str:
        """A few words for a person."""
        size = "x".join(map(str, self.image_size))
        if self.symmetries:
            size += ", flipped and turned"
        if self.backbone is None:
            return f"images at {size}, {self.resize}"
        levels = ",".join(map(str, self.backbone["levels"]))
        return f"{self.backbone['name']}, levels {levels}, images at {size}, {self.resize}, {self.dtype}"


class FeatureCache:
    """A complete entry, open for reading.

    Args:
        folder: The entry's folder.

    Attributes:
        levels: One array (N, C_l, H_l, W_l) per level, memory-mapped; row i belongs to the table's row with id i, rows
            beyond the table to symmetries of training images.
        masks: uint8 (N, ceil(H * W / 8)), bits of the boolean masks.
        images: uint8 (N, 3, H, W), or None.

    Raises:
        OSError, ValueError, KeyError: a file is missing or not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.meta["arrays"]}
        self.levels = [array for name, array in arrays.items() if name.startswith("level")]
        self.masks = arrays["mask"]
        self.images = arrays.get("image")
        self.image_size = tuple(self.meta["spec"]["image_size"])
        self._arrays = list(arrays.values())
        self._checksums = np.load(folder / "checksums.npy")
        with contextlib.suppress(OSError):  # another user's entry can be read, but not marked as used
            os.utime(folder / "meta.json")

    def is_intact(self) -> bool:
        """Whether every row has the checksum that it was written with; reads the entry once."""
        return _first_damaged(self._arrays, self._checksums) == len(self._checksums)

    def mask(self, row: int) -> np.ndarray:
        """Mask bool (H, W) of a row."""
        height, width = self.image_size
        return np.unpackbits(self.masks[row], count=height * width).view(bool).reshape(height, width)

    def let_go(self) -> None:
        """Drops what was read from this process's memory."""
        _let_go(self._arrays)


def _checksum(arrays: Sequence[np.ndarray], row: int) -> int:
    value = xxhash.xxh3_64()
    for array in arrays:
        value.update(np.ascontiguousarray(array[row]).data)
    return value.intdigest()


def _let_go(arrays: Iterable[np.ndarray]) -> None:
    """Drops the pages of memory-mapped arrays from this process, which would else grow to the size of the entry.

    Nothing is lost: the system keeps them in its own memory as long as it has room, and writes them out otherwise.
    """
    for array in arrays:
        if hasattr(mmap, "MADV_DONTNEED"):
            cast(mmap.mmap, array.base).madvise(
                mmap.MADV_DONTNEED
            )  # a memory-mapped array lies in a mapping of the system


def _first_damaged(arrays: Sequence[np.ndarray], checksums: np.ndarray) -> int:
    """The first row whose checksum fails; the number of checksums if none does."""
    for row, expected in enumerate(checksums):
        if _checksum(arrays, row) != expected:
            return row
        if row % RELEASE_EVERY == 0:
            _let_go(arrays)
    _let_go(arrays)
    return len(checksums)


def open_or_build(
    root: Path,
    spec: CacheSpec,
    rows: int,
    compute: Callable[[int], Computed],
    budget: int,
    announce: Callable[[str], None] = lambda message: None,
    about: str = "",
) -> FeatureCache:
    """The entry of `spec`, built first if it is missing or damaged; other processes asking for it wait and then read it.

    Args:
        root: Folder of all entries.
        spec: What to store.
        rows: Number of images N.
        compute: Called with the first missing row; yields consecutive batches in row order.
        budget: Bytes that all entries together may take; the least recently used ones make room.
        announce: Told, in a sentence, of every build and its size before anything is written, and of waiting.
        about: The data in a few words, for a list of entries.

    Raises:
        CacheTooLargeError: the entry alone would exceed the budget or the free disk space.
        NonFiniteFeaturesError: a feature is NaN or infinite.
    """
    if (shared := _intact(root / spec.key)) is not None:
        return shared  # without a lock: whoever may only read needs nothing more
    root = _writable(root, announce)
    folder = root / spec.key
    with locked(root, spec.key, lambda: announce(f"Waiting for another process that writes {folder}")):
        if folder.exists():
            if (cache := _intact(folder)) is not None:
                return cache
            announce(f"{folder} is damaged; it is built anew.")
            shutil.rmtree(folder)
        for old in entries(root):
            if old.complete and old.version < VERSION and old.title == spec.title:
                announce(f"{old.folder} has an older layout (version {old.version}, now {VERSION}); it is built anew.")
                remove(old)
        _build(root, spec, rows, compute, budget, announce, about)
        return FeatureCache(folder)


def _intact(folder: Path) -> FeatureCache | None:
    """The entry if it is there, complete and every row is as it was written."""
    with contextlib.suppress(*_DAMAGE):
        cache = FeatureCache(folder)
        if cache.is_intact():
            return cache
    return None


def _writable(root: Path, announce: Callable[[str], None]) -> Path:
    """The folder of all entries, or one of this user's own if that cannot be written."""
    with contextlib.suppress(PermissionError, OSError):
        root.mkdir(parents=True, exist_ok=True)
    if os.access(root, os.W_OK):
        return root
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unirecon"
    announce(f"{root} cannot be written; this entry is built in {own} (cache.root names another place).")
    own.mkdir(parents=True, exist_ok=True)
    return own


def _reserve(folder: Path, arrays: Iterable[str]) -> None:
    """Takes the room of the arrays now: on a disk that fills up later, writing to mapped memory would kill the process."""
    for name in arrays:
        with open(folder / f"{name}.npy", "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except (AttributeError, OSError) as error:  # not on every system and file system
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    shutil.rmtree(folder, ignore_errors=True)
                    raise CacheTooLargeError(f"{folder.parent}: {os.strerror(error.errno)}") from error


def _build(
    root: Path,
    spec: CacheSpec,
    rows: int,
    compute: Callable[[int], Computed],
    budget: int,
    announce: Callable[[str], None],
    about: str,
) -> None:
    partial = root / f"{spec.key}.partial"
    done, arrays, checksums = _unfinished(partial, rows)
    start = done
    for levels, masks, images in compute(done):
        batch = {f"level{i}": level.to(getattr(torch, spec.dtype)).cpu().numpy() for i, level in enumerate(levels)}
        if not all(np.isfinite(values).all() for values in batch.values()):
            shutil.rmtree(partial, ignore_errors=True)
            limit = " (float16 holds up to 65504: cache.mode=float32 holds more)" if spec.dtype == "float16" else ""
            raise NonFiniteFeaturesError(
                f"The features of images {done} to {done + len(masks) - 1} hold NaN or infinity{limit}. "
                "Look at the backbone's weights."
            )
        batch["mask"] = np.packbits(masks.flatten(1).cpu().numpy(), axis=1)
        if images is not None:
            batch["image"] = images.cpu().numpy()
        if not arrays:
            shutil.rmtree(partial, ignore_errors=True)
            needed = sum(rows * values[0].nbytes for values in batch.values())
            announce(
                f"Cache of {number_of(rows, 'image')}, {needed / 2**30:.2f} GiB, in {root / spec.key}: {spec.title}"
            )
            make_room(root, needed, budget)
            partial.mkdir()
            arrays = {
                name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", values.dtype, (rows, *values.shape[1:]))
                for name, values in batch.items()
            }
            checksums = np.lib.format.open_memmap(partial / "checksums.npy", "w+", np.uint64, (rows,))
            _reserve(partial, [*arrays, "checksums"])
        end = done + len(masks)
        for name, values in batch.items():
            arrays[name][done:end] = values
        for row in range(done, end):
            checksums[row] = _checksum(list(arrays.values()), row)
        _let_go(arrays.values())
        done = end
        if done - start >= FLUSH_EVERY:
            start = done
            _flush(partial, arrays, checksums, done)
    if done != rows:
        raise RuntimeError(f"{partial}: {done} of {rows} rows were computed.")
    _flush(partial, arrays, checksums, done)
    meta = {"spec": asdict(spec), "title": spec.title, "arrays": list(arrays), "rows": rows, "version": VERSION}
    meta["data"] = f"{about}, {number_of(rows, 'image')}" if about else number_of(rows, "image")
    write_json(partial / "meta.json", meta)
    (partial / "state.json").unlink()
    partial.rename(root / spec.key)
    sync_folder(root)


def _flush(partial: Path, arrays: Mapping[str, np.ndarray], checksums: np.ndarray, done: int) -> None:
    """Writes everything to disk, and only then that it is there."""
    for array in (*arrays.values(), checksums):
        cast(np.memmap, array).flush()
    write_json(partial / "state.json", {"done": done, "arrays": list(arrays)})


def _unfinished(partial: Path, rows: int) -> tuple[int, Mapping[str, np.ndarray], np.ndarray | None]:
    """(intact rows, arrays, checksums) of an interrupted build; (0, {}, None) if nothing of it can be used."""
    with contextlib.suppress(*_DAMAGE):
        state = json.loads((partial / "state.json").read_text())
        arrays = {name: np.lib.format.open_memmap(partial / f"{name}.npy", "r+") for name in state["arrays"]}
        checksums = np.lib.format.open_memmap(partial / "checksums.npy", "r+")
        done = _first_damaged(list(arrays.values()), checksums[: state["done"]])
        if done and all(len(array) == rows for array in (*arrays.values(), checksums)):
            return done, arrays, checksums
    return 0, {}, None
