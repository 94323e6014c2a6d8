"""Base of methods that are fitted in one pass over the training images: memory banks and Gaussians, no gradient.

The pass is an ordinary epoch, so that the feature cache, augmentations, several processes and the progress bar work as for
every method. Each process collects its share; with the epoch's last batch all shares become one fit, equal in every
process, before the checkpoint is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from datamodules.cache.entry import NonFiniteFeaturesError
from lightning_modules.base import ImageSize, ReconstructionModule
from lightning_modules.callbacks.progress import work_progress
from lightning_modules.metrics.sync import Group
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.layers.coreset import CoresetConfig, choose
from models.reconstruction import Pair

ROWS = 2**16
"""Vectors that are projected, or summed over processes, at a time."""


class FittedModule(ReconstructionModule):
    """One epoch without an optimiser; `collect` sees every training image, `fit_network` makes the fit.

    Args:
        backbone: The frozen feature extractor.
        head: What becomes of the map of distances.
        image_size: Size of the input images in pixels.
    """

    reconstructs: ClassVar[bool] = False

    def __init__(self, backbone: BackboneConfig, head: HeadConfig, image_size: ImageSize) -> None:
        super().__init__(backbone, head, make_optimizer=None, image_size=image_size, schedule=None, interval="epoch")
        self.automatic_optimization = False
        # Drawn once from the run's seed, so that all processes draw alike later, whatever each has drawn until then.
        self.fit_seed = int(torch.randint(2**31, ()))
        self._drawn = 0

    # ---- what a method does ------------------------------------------------------------------------------------------

    def begin(self, images: int) -> None:
        """Called before the pass over so many training images: makes room, and refuses what has none."""

    def collect(self, features: list[Tensor], ids: Sequence[int], categories: Sequence[str]) -> None:
        """Takes the prepared levels (B, C_l, H_l, W_l) of training images in, together with their ids and categories."""
        raise NotImplementedError

    def fit_network(self) -> None:
        """Makes the fit of what all processes collected; the network's buffers then hold it."""
        raise NotImplementedError

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.datamodule is not None:
            self.trainer.datamodule.epoch_images = None  # one pass sees every image once
        if stage == "fit" and isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy.configure_ddp = lambda: None  # there is no gradient to reduce, which DDP refuses

    def on_fit_start(self) -> None:
        if self.trainer.max_epochs != 1:
            raise ValueError(
                f"{self.method} is fitted in one pass over the training images: trainer.max_epochs must be 1, found "
                f"{self.trainer.max_epochs}."
            )
        super().on_fit_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._drawn = 0
        self.network.to(self.device)
        self.begin(self.training_images)

    @property
    def training_images(self) -> int:
        """Number of training images, or tiles, over all processes."""
        return self.trainer.datamodule.training_samples

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        # Several processes get equally many images, the last of them a second time: those are left out.
        places = torch.arange(self._drawn, self._drawn + len(batch["label"])) * self.trainer.world_size
        kept = int((places + self.trainer.global_rank < self.training_images).sum())
        self._drawn += len(batch["label"])
        with torch.no_grad():
            features = [level[:kept] for level in self.features(batch)]
            for level in features:
                if not level.isfinite().all():
                    files = ", ".join(batch["path"])
                    raise NonFiniteFeaturesError(f"Features of one of these images are NaN or infinite: {files}")
            if kept:
                self.collect(features, batch["id"][:kept].tolist(), batch["category"][:kept])

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            with torch.no_grad():
                self.fit_network()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Nothing: there is no loss."""

    def compiled_parts(self) -> list[nn.Module]:
        return []

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        raise ValueError(f"{self.method} reconstructs nothing: it measures distances to what it has seen.")

    def announce(self, what: str, needed: int) -> None:
        """Says what takes how much memory, and refuses what exceeds the free memory of the device."""
        free = free_bytes(self.device)
        if needed > free:
            raise ValueError(
                f"{self.method}: {what} takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on "
                f"{self.device}. Use smaller images, fewer levels or channels, or one model per category "
                "(data.init_args.setting=per_category)."
            )
        rank_zero_info(f"{self.method}: {what}, {needed / 1e9:.2f} GB")


class Place(NamedTuple):
    """Where an image's vectors lie: in which process, as which of its images."""

    id: int
    rank: int
    row: int
    category: str


class PatchStore:
    """Vectors of the images that this process has seen, (images, P, C) float32, in memory or in a memory-mapped file.

    Args:
        images: How many images it has room for.
        patches: P, vectors per image.
        channels: C.
        file: Where the vectors go if they take more than `memory_bytes`.
        memory_bytes: How much may stay in memory.
    """

    def __init__(self, images: int, patches: int, channels: int, file: Path, memory_bytes: int) -> None:
        shape = (images, patches, channels)
        self.file: Path | None = None
        if images * patches * channels * 4 <= memory_bytes:
            self.vectors = torch.empty(shape)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file = file
            self.vectors = torch.from_numpy(np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape))
        self.images: list[tuple[int, str]] = []

    def add(self, vectors: Tensor, ids: Sequence[int], categories: Sequence[str]) -> None:
        """Keeps vectors (B, P, C) of images; an image that is there already counts once."""
        known = {number for number, _ in self.images}
        for one, number, category in zip(vectors, ids, categories, strict=True):
            if number not in known:
                self.vectors[len(self.images)] = one.cpu()
                self.images.append((number, category))
                known.add(number)

    def places(self, group: Group) -> list[Place]:
        """All images of all processes, in the order of their ids: the fit then depends on neither order nor processes."""
        mine = [Place(number, group.rank, row, name) for row, (number, name) in enumerate(self.images)]
        found = sorted(place for part in group.gather_objects(mine) for place in part)
        return [place for n, place in enumerate(found) if n == 0 or place.id != found[n - 1].id]

    def close(self) -> None:
        """Gives memory and file back."""
        del self.vectors
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def all_vectors(store: PatchStore, group: Group) -> Tensor:
    """The vectors of all processes' stores, float32 (images * P, C) on every process, in the order of the images' ids."""
    places = store.places(group)
    patches, channels = store.vectors.shape[1:]
    whole = torch.zeros(len(places), patches, channels)
    for number, place in enumerate(places):
        if place.rank == group.rank:
            whole[number] = store.vectors[place.row]
    if group.size > 1:
        for part in whole.split(max(1, ROWS // patches)):
            part.copy_(torch.from_numpy(group.sum(part.numpy())))
    return whole.flatten(0, 1)


class MemoryBankModule(FittedModule):
    """A fitted method whose network has a `models.layers.nearest.MemoryBank`, filled with a coreset.

    Args:
        backbone, head, image_size: As for every method.
        coreset: Which vectors are kept.
        memory_gb: GB of collected vectors that stay in a process's memory; more go to a memory-mapped file in the run's
            folder until the bank is chosen.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        head: HeadConfig,
        image_size: ImageSize,
        coreset: CoresetConfig,
        memory_gb: float,
    ) -> None:
        super().__init__(backbone, head, image_size)
        if memory_gb < 0:
            raise ValueError(f"memory_gb must not be negative, found {memory_gb}.")
        self.coreset, self.memory_gb = coreset, memory_gb
        self._store: PatchStore | None = None

    def begin(self, images: int) -> None:
        width, patches = self.network.width, self.network.grid[0] * self.network.grid[1]
        own = -(-images // self.trainer.world_size)
        file = Path(self.trainer.default_root_dir) / f"patches-{self.trainer.global_rank}.npy"
        self._store = PatchStore(own, patches, width, file, int(self.memory_gb * 1e9))
        total = images * patches
        where = "in memory" if self._store.file is None else f"in {file} (memory_gb={self.memory_gb:g})"
        rank_zero_info(
            f"{self.method}: {total:,} training vectors of {width} channels, {total * width * 4 / 1e9:.2f} GB {where}"
        )
        kept = self.coreset.count(total)
        self.announce(f"a memory bank of about {kept:,} of them", kept * width * 4)

    def collect(self, features: list[Tensor], ids: Sequence[int], categories: Sequence[str]) -> None:
        self._store.add(features[0].flatten(2).transpose(1, 2), ids, categories)

    def fit_network(self) -> None:
        group, store = Group(), self._store
        places = store.places(group)
        patches, channels = store.vectors.shape[1:]
        generator = torch.Generator().manual_seed(self.fit_seed)
        picks = self._choose(group, store, places, generator)
        # Each process puts in the vectors that it holds; their sum is the bank.
        bank = np.zeros((len(picks), channels), dtype=np.float32)
        rows = {n: place.row for n, place in enumerate(places) if place.rank == group.rank}
        images = (picks // patches).tolist()
        for number, (image, patch) in enumerate(zip(images, (picks % patches).tolist(), strict=True)):
            if image in rows:
                bank[number] = store.vectors[rows[image], patch].numpy()
        parts = [group.sum(bank[first : first + ROWS]) for first in range(0, len(bank), ROWS)]
        self.network.bank.set(torch.from_numpy(np.concatenate(parts)))
        store.close()
        self._store = None

    def _choose(self, group: Group, store: PatchStore, places: list[Place], generator: torch.Generator) -> Tensor:
        """Indices of the chosen vectors among those of all places, P for each."""
        patches, channels = store.vectors.shape[1:]
        total = len(places) * patches
        if self.coreset.ratio == 1:
            return torch.arange(total)
        matrix = self.coreset.matrix(channels, total, generator)
        own = store.vectors[: len(store.images)].flatten(0, 1)
        if matrix is not None:
            matrix = matrix.to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                own = torch.cat([(part.to(self.device) @ matrix.T).cpu() for part in own.split(ROWS)] or [own])
        width = own.shape[1] if matrix is None else len(matrix)
        held = [torch.from_numpy(part).view(-1, patches, width) for part in group.gather(own.reshape(-1).numpy())]
        if group.size == 1 and [place.row for place in places] == list(range(len(places))):
            points = held[0].flatten(0, 1)
        else:
            points = torch.cat([held[place.rank][place.row] for place in places])
        names = np.repeat([place.category for place in places], patches)
        groups = [torch.from_numpy(np.flatnonzero(names == name)) for name in sorted(set(names))]
        track = work_progress(
            self.trainer, f"{self.method}: choosing {self.coreset.count(total):,} of {total:,} vectors"
        )
        return choose(points.to(self.device), self.coreset, generator, groups, track)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        maps, scores = self.network(self.features(batch))
        scored = self.head.score([self.enlarge(maps)], self.image_size)._replace(level_maps=[maps])
        return {"": scored if scores is None else scored._replace(image_scores=scores)}

    def enlarge(self, maps: Tensor) -> Tensor:
        """The patch map (B, H, W) as the head is to resize it."""
        return maps

    def record_notes(self) -> list[str]:
        share = (
            f"coreset of {self.coreset.ratio:.3%}".replace(".000%", "%") if self.coreset.ratio < 1 else "all vectors"
        )
        of = ", an equal share per category (training labels)" if self.coreset.share == "per_category" else ""
        return [f"memory bank of {len(self.network.bank):,} vectors of {self.network.width} channels: {share}{of}"]


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
