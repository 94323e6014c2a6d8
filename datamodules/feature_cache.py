"""Features of frozen backbones on disk: computed once per image, read by every epoch, run, seed and method that needs them.

An entry is a folder named by the hash of everything that decides its content (:class:`CacheSpec`). It holds one memory-
mapped array per level, the packed masks and a checksum per row. It is built beside its place, row by row, and renamed
when complete, so a half-written entry is never read and an interrupted build goes on where it stopped. Rows whose
checksum fails raise :class:`DamagedCacheError`; the entry is then built anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from datamodules.dataset import Row

VERSION = 1
"""Of the layout and of the way features are computed; raising it makes all older entries stale."""

DTYPES = ("float32", "float16")


class DamagedCacheError(RuntimeError):
    """A stored row is not what was written."""


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides an entry's content.

    Args:
        backbone: Name, sha256 of the weights, padding and levels of the frozen backbone.
        preparation: What is done to the levels before anything trainable, in words (see ``ReconstructionModule.prepare``).
        image_size: (height, width) in pixels.
        resize: Resize rule of the data module.
        mean: Normalisation of the input images, per channel.
        std: Likewise.
        fingerprint: Fingerprint of the data.
        dtype: ``float32`` (bit-exact) or ``float16``.
        images: Whether the resized images are kept too, for a network that reads them.
    """

    backbone: dict[str, Any]
    preparation: str
    image_size: tuple[int, int]
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    dtype: str = "float32"
    images: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"Feature cache dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}.")

    @property
    def key(self) -> str:
        """Name of the entry's folder."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


class FeatureCache:
    """A complete entry, open for reading.

    Args:
        folder: The entry's folder.

    Attributes:
        levels: One array (N, C_l, H_l, W_l) per level, memory-mapped; row i belongs to the table's row with id i.
        masks: uint8 (N, ceil(H * W / 8)), bits of the boolean masks.
        images: uint8 (N, 3, H, W), or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.meta["arrays"]}
        self.levels = [array for name, array in arrays.items() if name.startswith("level")]
        self.masks = arrays["mask"]
        self.images = arrays.get("image")
        self.image_size = tuple(self.meta["spec"]["image_size"])
        self._checksums = np.load(folder / "checksums.npy")
        self._checked = np.zeros(len(self.masks), bool)
        os.utime(folder / "meta.json")

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def check(self, rows: np.ndarray) -> None:
        """Compares rows that were not read before with their checksums; raises DamagedCacheError."""
        for row in rows[~self._checked[rows]]:
            if _checksum(self._arrays(), row) != self._checksums[row]:
                (self.folder / "meta.json").unlink(missing_ok=True)  # without it the entry is never opened again
                raise DamagedCacheError(
                    f"{self.folder}: row {row} is damaged (checksum). The entry is given up; the next run builds it anew."
                )
            self._checked[row] = True

    def _arrays(self) -> list[np.ndarray]:
        return [*self.levels, self.masks, *([] if self.images is None else [self.images])]


def _checksum(arrays: Sequence[np.ndarray], row: int) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array[row]).data, value)
    return value


def open_or_build(
    root: Path,
    spec: CacheSpec,
    rows: int,
    compute: Callable[[int], Iterator[tuple[list[Tensor], Tensor, Tensor | None]]],
    budget: int,
) -> FeatureCache:
    """The entry of ``spec``, built first if it is missing; other processes asking for it wait and then read it.

    Args:
        root: Folder of all entries.
        spec: What to store.
        rows: Number of images N.
        compute: Called with the first missing row; yields, in row order, (levels, masks bool (B, 1, H, W), images uint8
            (B, 3, H, W) or None) of consecutive batches.
        budget: Bytes that all entries together may take; the least recently used ones make room.

    Raises:
        CacheTooLargeError: the entry alone would exceed the budget or the free disk space.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / spec.key
    with _locked(root / f"{spec.key}.lock"):
        if not (folder / "meta.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _build(root, spec, rows, compute, budget)
        return FeatureCache(folder)


class CacheTooLargeError(RuntimeError):
    """The entry does not fit into the budget or onto the disk."""


def _build(root: Path, spec: CacheSpec, rows: int, compute: Callable, budget: int) -> None:
    partial = root / f"{spec.key}.partial"
    state = partial / "state.json"
    done = json.loads(state.read_text())["done"] if state.exists() else 0
    arrays: dict[str, np.ndarray] = {}
    if done:
        names = json.loads(state.read_text())["arrays"]
        arrays = {name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="r+") for name in names}
        checksums = np.lib.format.open_memmap(partial / "checksums.npy", mode="r+")
    for levels, masks, images in compute(done):
        batch = {f"level{i}": level.to(getattr(torch, spec.dtype)).cpu().numpy() for i, level in enumerate(levels)}
        batch["mask"] = np.packbits(masks.flatten(1).cpu().numpy(), axis=1)
        if images is not None:
            batch["image"] = images.cpu().numpy()
        if not arrays:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _make_room(root, spec, sum(rows * values[0].nbytes for values in batch.values()), budget)
            arrays = {
                name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", values.dtype, (rows, *values.shape[1:]))
                for name, values in batch.items()
            }
            checksums = np.lib.format.open_memmap(partial / "checksums.npy", "w+", np.uint32, (rows,))
        end = done + len(masks)
        for name, values in batch.items():
            arrays[name][done:end] = values
        for row in range(done, end):
            checksums[row] = _checksum(list(arrays.values()), row)
        done = end
        if done % 512 < len(masks):
            for array in (*arrays.values(), checksums):
                array.flush()
            state.write_text(json.dumps({"done": done, "arrays": list(arrays)}))
    if done != rows:
        raise RuntimeError(f"{partial}: {done} of {rows} rows were computed.")
    for array in (*arrays.values(), checksums):
        array.flush()
    (partial / "meta.json").write_text(json.dumps({"spec": asdict(spec), "arrays": list(arrays), "version": VERSION}))
    state.unlink(missing_ok=True)
    partial.rename(root / spec.key)


def _make_room(root: Path, spec: CacheSpec, needed: int, budget: int) -> None:
    """Deletes the least recently used entries until ``needed`` bytes fit into the budget."""
    if needed > budget:
        raise CacheTooLargeError(f"needs {needed / 2**30:.1f} GiB, the budget is {budget / 2**30:.1f} GiB")
    entries = sorted((meta.stat().st_mtime, meta.parent) for meta in root.glob("*/meta.json"))
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in entries}
    for _, folder in entries:
        if sum(sizes.values()) + needed <= budget:
            break
        shutil.rmtree(folder)
        del sizes[folder]
    free = shutil.disk_usage(root).free
    if needed > 0.9 * free:
        raise CacheTooLargeError(f"needs {needed / 2**30:.1f} GiB, the disk of {root} has {free / 2**30:.1f} GiB free")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CachedBatches(Dataset):
    """Whole batches from a cache: item = positions in ``rows`` -> the batch dict with ``features`` instead of pixels.

    Args:
        cache: The open entry.
        rows: The images, in the order that positions count.
        normalised: (3, 256) look-up table of the normalisation, for entries that keep images.
        device: Copy the rows' features to this device now and serve from there; None reads them from disk each time.
    """

    def __init__(
        self, cache: FeatureCache, rows: Sequence[Row], normalised: np.ndarray, device: torch.device | None
    ) -> None:
        self.cache, self.rows = cache, rows
        self.ids = np.array([row.id for row in rows])
        self.labels = torch.tensor([row.label for row in rows])
        self.has_mask = torch.tensor([row.label == 0 or bool(row.mask_paths) for row in rows])
        self.normalised = torch.from_numpy(normalised)
        self.resident: list[Tensor] | None = None
        if device is not None:
            cache.check(self.ids)
            self.resident = [torch.from_numpy(level[self.ids]).to(device) for level in cache.levels]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[Any]) -> dict[str, Any]:
        positions = [getattr(position, "row", position) for position in positions]
        ids = self.ids[positions]
        if self.resident is None:
            self.cache.check(ids)
            features = [torch.from_numpy(level[ids]) for level in self.cache.levels]
        else:
            index = torch.tensor(positions, device=self.resident[0].device)
            features = [level.index_select(0, index) for level in self.resident]
        height, width = self.cache.image_size
        bits = np.unpackbits(self.cache.masks[ids], axis=1, count=height * width)
        rows = [self.rows[position] for position in positions]
        batch = {
            "features": [level.float() for level in features],
            "mask": torch.from_numpy(bits.view(bool)).view(-1, 1, height, width),
            "has_mask": self.has_mask[positions],
            "label": self.labels[positions],
            "id": torch.from_numpy(ids),
            "category": [row.category for row in rows],
            "dataset": [row.dataset for row in rows],
            "anomaly_type": [row.anomaly_type for row in rows],
            "path": [row.image_path for row in rows],
        }
        if self.cache.images is not None:
            pixels = torch.from_numpy(self.cache.images[ids]).long()
            batch["image"] = torch.stack([self.normalised[c][pixels[:, c]] for c in range(3)], dim=1)
        return batch


class Batches(BatchSampler):
    """Batches of another sampler's draws; hands the epoch on to it."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.sampler.set_epoch(epoch)


def cached_loader(
    batches: CachedBatches, sampler: Sampler, batch_size: int, drop_last: bool, num_workers: int
) -> DataLoader:
    """Loader over whole batches; rows that live on a device need neither workers nor pinned memory.

    It has a generator of its own, so that it takes nothing from the global one that dropout and noise draw from.
    """
    resident = batches.resident is not None
    return DataLoader(
        batches,
        batch_size=None,
        sampler=Batches(sampler, batch_size, drop_last),
        num_workers=0 if resident else num_workers,
        pin_memory=not resident and torch.cuda.is_available(),
        persistent_workers=not resident and num_workers > 0,
        generator=torch.Generator().manual_seed(0),
    )
