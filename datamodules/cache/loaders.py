"""What a cache entry is filled with besides the table's images, and batches from it in the place of those from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from datamodules.augmentation import Augmentation, not_square
from datamodules.cache.entry import FeatureCache
from datamodules.dataset import UNKNOWN, Batch, ImageSource, Row, TableDataset
from datamodules.sampling import Draw


class CachedImages:
    """Resized images and masks from a cache, in the place of an `ImageSource`.

    Args:
        cache: An entry with images.
        source: For images that are not of the table (prediction on a folder).
    """

    def __init__(self, cache: FeatureCache, source: ImageSource) -> None:
        self.cache, self.source = cache, source

    def load(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) and mask bool (H, W)."""
        if row.label == UNKNOWN:
            return self.source.load(row)
        image = np.ascontiguousarray(self.cache.images[row.id].transpose(1, 2, 0))
        mask = self.mask(row) if row.mask_paths else np.zeros(self.size, bool)
        self.cache.let_go()
        return image, mask

    def mask(self, row: Row) -> np.ndarray:
        """Mask bool (H, W) of a row of the table."""
        return self.cache.mask(row.id)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.cache.image_size


class CachedBatches(Dataset):
    """Whole batches from a cache: item = positions in `rows` -> the batch dict with `features` instead of pixels.

    Args:
        cache: The open entry.
        rows: The images, in the order that positions count.
        symmetric: (id, symmetry) -> row of the entry, for all symmetries that the augmentation may give to the images.
        augmentation: Decides which symmetry a training draw gets.
        normalised: (3, 256) look-up table of the normalisation, for entries that keep images.
        device: Copy the rows' features to this device now and serve from there; None reads them from disk each time.
    """

    def __init__(
        self,
        cache: FeatureCache,
        rows: Sequence[Row],
        normalised: np.ndarray,
        device: torch.device | None,
        symmetric: Mapping[tuple[int, int], int] = MappingProxyType({}),
        augmentation: Augmentation | None = None,
    ) -> None:
        self.cache, self.rows, self.augmentation = cache, rows, augmentation
        self.ids = np.array([row.id for row in rows])
        self.stored = np.full((len(rows), 8), -1)  # position, symmetry -> row of the entry
        self.stored[:, 0] = self.ids
        position = {row.id: i for i, row in enumerate(rows)}
        for (image, symmetry), row in symmetric.items():
            self.stored[position[image], symmetry] = row
        self.labels = torch.tensor([row.label for row in rows])
        self.has_mask = torch.tensor([row.label == 0 or bool(row.mask_paths) for row in rows])
        self.normalised = torch.from_numpy(normalised)
        self.resident: list[Tensor] | None = None
        if device is not None:
            held = self.stored >= 0
            self.resident = [torch.from_numpy(level[self.stored[held]]).to(device) for level in cache.levels]
            self.place = np.cumsum(held).reshape(held.shape) - 1  # position, symmetry -> row of `resident`

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draws: list[int | Draw]) -> Batch:
        positions = [draw.row if isinstance(draw, Draw) else draw for draw in draws]
        symmetries = [self._symmetry(draw) for draw in draws]
        stored = self.stored[positions, symmetries]
        if self.resident is None:
            features = [torch.from_numpy(level[stored]) for level in self.cache.levels]
        else:
            index = torch.from_numpy(self.place[positions, symmetries]).to(self.resident[0].device)
            features = [level.index_select(0, index) for level in self.resident]
        height, width = self.cache.image_size
        rows = [self.rows[position] for position in positions]
        packed = self.cache.masks[stored]
        packed[[not row.mask_paths for row in rows]] = 0  # of a defect that is trained on as if it were normal
        bits = np.unpackbits(packed, axis=1, count=height * width)
        batch = Batch(
            features=[level.float() for level in features],
            mask=torch.from_numpy(bits.view(bool)).view(-1, 1, height, width),
            has_mask=self.has_mask[positions],
            label=self.labels[positions],
            id=torch.from_numpy(self.ids[positions]),
            category=[row.category for row in rows],
            dataset=[row.dataset for row in rows],
            anomaly_type=[row.anomaly_type for row in rows],
            path=[row.image_path for row in rows],
        )
        if self.cache.images is not None:
            pixels = torch.from_numpy(self.cache.images[stored]).long()
            batch["image"] = torch.stack([self.normalised[c][pixels[:, c]] for c in range(3)], dim=1)
        self.cache.let_go()
        return batch

    def _symmetry(self, draw: int | Draw) -> int:
        if self.augmentation is None or not isinstance(draw, Draw):
            return 0
        return self.augmentation.symmetry(self.rows[draw.row].category, draw.seed)


def _as_it_is(batch: Batch) -> Batch:
    return batch


class Batches(BatchSampler):
    """Batches of another sampler's draws; hands the epoch on to it."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.sampler.set_epoch(epoch)


class CachedSplits:
    """The batches of each split from one entry, copied to the training device as long as they fit there.

    Args:
        cache: The open entry.
        device: Where training happens.
        room: Bytes that may be copied there.
        symmetric: (id, symmetry) of training images -> row of the entry.
        augmentation: Decides which symmetry a training draw gets.
    """

    def __init__(
        self,
        cache: FeatureCache,
        device: torch.device,
        room: int,
        symmetric: Mapping[tuple[int, int], int],
        augmentation: Augmentation | None,
    ) -> None:
        self.cache, self.device, self.room = cache, device, room
        self.symmetric, self.augmentation = symmetric, augmentation
        self._made: dict[tuple[int, ...], CachedBatches] = {}

    def batches(self, dataset: TableDataset) -> CachedBatches:
        """Those of the dataset's rows; made once per split."""
        key = tuple(row.id for row in dataset.rows)
        if key not in self._made:
            ids = set(key)
            symmetric = {which: place for which, place in self.symmetric.items() if which[0] in ids}
            needed = (len(key) + len(symmetric)) * sum(level[0].nbytes for level in self.cache.levels)
            fits = needed <= self.room
            self.room -= needed if fits else 0
            device = self.device if fits else None
            self._made[key] = CachedBatches(
                self.cache, dataset.rows, dataset.normalised, device, symmetric, self.augmentation
            )
        return self._made[key]


def symmetric_rows(rows: Sequence[Row], augmentation: Augmentation | None, size: tuple[int, int]) -> list[Row] | None:
    """The rows as the augmentation flips and turns them; None if it makes more of them than symmetries.

    Raises:
        DataError: images would be turned by 90 degrees that are not square.
    """
    if augmentation is None:
        return []
    found = {key: augmentation.symmetries(key) for key in dict.fromkeys(row.category for row in rows)}
    if None in found.values():
        return None
    turned = [key for key, symmetries in found.items() if any(symmetry % 2 for symmetry in symmetries)]
    if turned and size[0] != size[1]:
        raise not_square(turned[0])
    return [row._replace(symmetry=symmetry) for row in rows for symmetry in found[row.category] if symmetry]


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
        collate_fn=_as_it_is,
        num_workers=0 if resident else num_workers,
        pin_memory=not resident and torch.cuda.is_available(),
        persistent_workers=not resident and num_workers > 0,
        generator=torch.Generator().manual_seed(0),
    )
