"""Rows of the sample table -> samples -> batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.anomalies.sources import Anomalies
from datamodules.augmentation import Augmentation, apply_symmetry
from datamodules.errors import DataError
from datamodules.images import MAX_MEGAPIXELS, centre, read_mask, read_pair, resize_image, resize_mask
from datamodules.sample_table import SampleTable, category_keys
from datamodules.sampling import Draw
from datamodules.tiling import Box

UNKNOWN = -1
"""Label of an image of which nothing is known (prediction on a folder)."""
TrainingViews = Callable[[np.ndarray, int, Callable[[np.ndarray], torch.Tensor]], dict[str, Any]]
"""(image uint8 (H, W, 3), seed of the draw, `normalise`) -> what a sample carries besides or instead of its image.

`normalise` makes a normalised float32 (3, h, w) of uint8 levels or of float pixels in [0, 1], (h, w, 3). What it returns
depends on image and seed alone.
"""
SMALL = 1000
"""Up to this many training images, reading them in the main process is quicker than starting workers."""


class Row(NamedTuple):
    """What a batch tells of an image besides its pixels."""

    id: int
    dataset: str
    category: str
    label: int
    anomaly_type: str
    image_path: str
    mask_paths: tuple[str, ...]
    symmetry: int = 0
    """Of the resized image and mask, see `datamodules.augmentation`."""
    tile: Box | None = None
    """The part of the photograph that stands for an image; `id` then counts tiles."""


def table_rows(table: SampleTable, *splits: str) -> list[Row]:
    """Rows of some splits in table order; `category` is the category key."""
    names = ("id", "label", "anomaly_type", "image_path", "mask_paths", "split", "dataset")
    columns = (table[name].tolist() for name in names)
    return [
        Row(number, dataset, key, label, kind, image, masks)
        for number, label, kind, image, masks, split, dataset, key in zip(*columns, category_keys(table), strict=True)
        if split in splits
    ]


class ImageSource:
    """Loads a row's image and mask at the size of the run.

    Args:
        size: (height, width).
        resize: name of an image resize.
        bit_depths: dataset -> significant bits of its 16-bit images.
        thresholds: dataset -> value above which a mask pixel is defective (default 0).
        mask_resize: nearest or area, see `resize_mask`.
        max_megapixels: larger files are refused.
        cache_bytes: how much of the resized images to keep in memory, first come first kept.
        crop_from: (height, width) to resize to before the centre of `size` is kept; None resizes to `size` straight away.
    """

    def __init__(
        self,
        size: tuple[int, int],
        resize: str,
        bit_depths: dict[str, int] | None = None,
        thresholds: dict[str, int] | None = None,
        mask_resize: str = "nearest",
        max_megapixels: float = MAX_MEGAPIXELS,
        cache_bytes: int = 0,
        crop_from: tuple[int, int] | None = None,
    ) -> None:
        self.whole = crop_from or size
        self.size, self.resize, self.mask_resize, self.max_megapixels = size, resize, mask_resize, max_megapixels
        self._bit_depths, self._thresholds = bit_depths or {}, thresholds or {}
        self._cache: dict[tuple[str, Box | None], tuple[np.ndarray, np.ndarray]] = {}
        self._room = cache_bytes
        self._last: tuple[str, tuple[np.ndarray, np.ndarray | None]] | None = None

    def load(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) and mask bool (H, W); both are shared with the cache, so never write into them."""
        cached = self._cache.get((row.image_path, row.tile))
        if cached is not None:
            return cached
        image, mask = self.photograph(row) if row.tile is None else self._tile(row)
        loaded = (
            np.ascontiguousarray(centre(resize_image(image, self.whole, self.resize), self.size)),
            np.zeros(self.size, bool) if mask is None else self._resized(mask),
        )
        needed = loaded[0].nbytes + loaded[1].nbytes
        if needed <= self._room:
            self._room -= needed
            self._cache[row.image_path, row.tile] = loaded
        return loaded

    def photograph(self, row: Row) -> tuple[np.ndarray, np.ndarray | None]:
        """Image uint8 (H, W, 3) and mask bool (H, W) at their own size; the mask is None without files."""
        bits, threshold = self._bit_depths.get(row.dataset), self._thresholds.get(row.dataset, 0)
        return read_pair(row.image_path, row.mask_paths, bits, threshold, self.max_megapixels)

    def _tile(self, row: Row) -> tuple[np.ndarray, np.ndarray | None]:
        """As `photograph`, the row's tile of it. The last photograph is kept: its tiles often follow each other."""
        if self._last is None or self._last[0] != row.image_path:
            self._last = row.image_path, self.photograph(row)
        image, mask = self._last[1]
        return np.ascontiguousarray(row.tile.of(image)), None if mask is None else np.ascontiguousarray(
            row.tile.of(mask)
        )

    def mask(self, row: Row) -> np.ndarray:
        """Mask bool (H, W) of a row with mask files, without its image."""
        return np.ascontiguousarray(centre(self.whole_mask(row), self.size))

    def whole_mask(self, row: Row) -> np.ndarray:
        """Mask bool of a row with mask files, resized, with the margin that is cut off."""
        mask = read_mask(row.mask_paths, self._thresholds.get(row.dataset, 0), self.max_megapixels)
        return resize_mask(mask, self.whole, self.mask_resize)

    def _resized(self, mask: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(centre(resize_mask(mask, self.whole, self.mask_resize), self.size))


class LastImage:
    """An image source that does not load again what it loaded last: symmetries of an image follow each other."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._last: tuple[tuple[str, Box | None], tuple[np.ndarray, np.ndarray]] | None = None

    def load(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """As `ImageSource.load`."""
        key = row.image_path, row.tile
        if self._last is None or self._last[0] != key:
            self._last = key, self.source.load(row)
        return self._last[1]


class TableDataset(Dataset):
    """Samples of some rows. Indexed by position, or by a `Draw` that also carries the seed of the augmentation.

    Args:
        rows: the images.
        source: where pixels come from; anything with `load(row)` as ImageSource has it.
        mean, std: of the normalisation, for pixels in [0, 1].
        augmentation: applied to draws only.
        anomalies: put into draws only; their samples also carry `clean`, the image without, and `mask` is the anomaly's.
        pixels: samples also carry `pixels`, the resized image as uint8 (3, H, W).
        views: what the samples of draws carry more; they may replace `image` and `mask`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        source: Any,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        anomalies: Anomalies | None = None,
        pixels: bool = False,
        views: TrainingViews | None = None,
    ) -> None:
        self.rows, self.source, self.augmentation, self.pixels = list(rows), source, augmentation, pixels
        self.anomalies, self.views = anomalies, views
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self.normalised = normalised_levels(mean, std)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        """A sample: `image` float32 (3, H, W) normalised, `mask` bool (1, H, W), and the fields of a batch.

        An image of which nothing is known also has a text `error`: empty, or why it could not be read and is black.
        """
        row = self.rows[index.row if isinstance(index, Draw) else index]
        error = ""
        try:
            *loaded, more = self._load(row)
        except DataError as failure:
            if row.label != UNKNOWN:
                raise
            error = str(failure)
            *loaded, more = self._black()
        image, mask = (apply_symmetry(array, row.symmetry) for array in loaded)
        if self.augmentation is not None and isinstance(index, Draw):
            image, mask = self.augmentation(image, mask, row.category, index.seed)
        sample = {
            "image": normalise(image, self.normalised),
            "mask": torch.from_numpy(np.array(mask)[None]),
            "has_mask": row.label == 0 or bool(row.mask_paths),
            "label": row.label,
            "category": row.category,
            "dataset": row.dataset,
            "anomaly_type": row.anomaly_type,
            "id": row.id,
            "path": row.image_path,
            **more,
        }
        if self.anomalies is not None and isinstance(index, Draw):
            corrupted, blobs = self.anomalies(image, row.category, index.seed)
            sample["clean"], sample["mask"] = sample["image"], torch.from_numpy(blobs[None])
            values = (corrupted / np.float32(255) - self.mean) / self.std
            sample["image"] = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
        if self.views is not None and isinstance(index, Draw):
            sample |= self.views(image, index.seed, self._normalise)
        if row.label == UNKNOWN:
            sample["error"] = error
        if self.pixels:
            sample["pixels"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return sample

    def _load(self, row: Row) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Image and mask of a row, and what its sample carries besides."""
        return *self.source.load(row), {}

    def _black(self) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """What stands for an image that cannot be read."""
        return np.zeros((*self.source.size, 3), np.uint8), np.zeros(self.source.size, bool), {}

    def _normalise(self, image: np.ndarray) -> torch.Tensor:
        """uint8 (H, W, 3), or floats in [0, 1], to float32 (3, H, W)."""
        if image.dtype == np.uint8:
            return normalise(image, self.normalised)
        values = (image.astype(np.float32, copy=False) - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalised_levels(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What each of the 256 levels of a channel becomes, float32 (3, 256): one look-up per pixel is exact and fast."""
    levels = torch.arange(256, dtype=torch.float32)[:, None] / 255
    return np.ascontiguousarray(((levels - torch.tensor(mean)) / torch.tensor(std)).numpy().T)


def normalise(image: np.ndarray, levels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) by `normalised_levels`."""
    pixels = np.empty((3, *image.shape[:2]), np.float32)
    for channel, values in enumerate(levels):
        np.take(values, image[..., channel], out=pixels[channel], mode="clip")
    return torch.from_numpy(pixels)


class Batch(dict):
    """A batch by field: tensors, lists of tensors and lists of texts. Moving it to a device leaves the texts alone."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """The batch with all its tensors on a device; by default a copy to a GPU does not make the processor wait."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch with all its tensors in page-locked memory."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = Batch(self)
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                changed[name] = [change(tensor) for tensor in value]
        return changed


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Stack samples: tensors to (B, ...), numbers to int64 (B,), truth values to bool (B,), texts and the rest to lists."""
    batch = Batch()
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], int | float):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def image_loader(
    dataset: TableDataset, sampler: Sampler | None, batch_size: int, num_workers: int, drop_last: bool = False
) -> DataLoader:
    """Loader over images; it has a generator of its own, so that it takes nothing from the global one."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),
    )


def usual_workers(images: int) -> int:
    """Worker processes for so many training images: none for few, else one less than the cores, at most 8."""
    return 0 if images <= SMALL else max(0, min(8, (os.cpu_count() or 1) - 1))


def _quiet_worker(worker: int) -> None:
    """One thread per worker: OpenCV would otherwise start one per core in each of them."""
    cv2.setNumThreads(0)
