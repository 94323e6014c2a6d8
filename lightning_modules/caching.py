"""Pays the frozen backbone once: fills the feature cache and lets the data module serve from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor

from datamodules import UnifiedDataModule
from datamodules.feature_cache import CacheSpec, CacheTooLargeError, DamagedCacheError, FeatureCache, open_or_build
from lightning_modules.base import ReconstructionModule

BATCH = 32


@dataclass(frozen=True)
class CacheConfig:
    """The cache of backbone features, shared by all runs that need the same ones.

    Args:
        mode: ``float32`` (bit-exact), ``float16`` (half the size, not exact) or ``off``.
        root: Its folder.
        budget_gb: GiB that it may take on disk; the least recently used entries make room.
        resident_gb: Training features up to this size are held in the memory of the training device; larger ones are
            read from disk batch by batch.
    """

    mode: str = "float32"
    root: str = "results/cache"
    budget_gb: float = 50.0
    resident_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.mode not in ("float32", "float16", "off"):
            raise ValueError(f"cache.mode is {self.mode!r}; allowed are float32, float16 and off.")


def attach(
    model: ReconstructionModule, data: UnifiedDataModule, config: CacheConfig, device: torch.device, build: bool
) -> None:
    """Gives the data module an entry of the cache to serve ``features`` from; without ``build`` only one that exists.

    Nothing happens, with a word why, when the cache is off, when images are augmented (their features differ each time)
    or when the features would not fit.
    """
    if config.mode == "off":
        return
    if data.augmentation != "none":
        rank_zero_info(f"No feature cache: images are augmented ({data.augmentation}), so their features differ each time.")
        return
    data.setup("fit")
    provenance = model.extractor.provenance
    spec = CacheSpec(
        backbone={k: provenance[k] for k in ("name", "sha256", "padding")} | {"levels": list(model.extractor.config.levels)},
        preparation=model.preparation,
        image_size=tuple(data.image_size),
        resize=data.resize,
        mean=tuple(data.mean),
        std=tuple(data.std),
        fingerprint=data.fingerprint,
        dtype=config.mode,
        images=model.needs_images,
    )
    root = Path(config.root)
    if not build and not (root / spec.key / "meta.json").exists():
        return
    try:
        cache = _open(root, spec, model, data, config, device)
        try:
            data.serve_from(cache, device, int(config.resident_gb * 2**30))
        except DamagedCacheError as error:
            rank_zero_warn(str(error))
            data.serve_from(_open(root, spec, model, data, config, device), device, int(config.resident_gb * 2**30))
    except CacheTooLargeError as error:
        rank_zero_info(f"No feature cache: it {error}. Images are read and the backbone runs in every step.")


def _open(
    root: Path,
    spec: CacheSpec,
    model: ReconstructionModule,
    data: UnifiedDataModule,
    config: CacheConfig,
    device: torch.device,
) -> FeatureCache:
    @torch.no_grad()
    def compute(first: int) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        home = model.device
        model.extractor.to(device)
        loader = data.all_images(first, BATCH)
        for batch in track(loader, "Backbone features", disable=not sys.stdout.isatty(), transient=True):
            levels = model.prepare(model.extractor(batch["image"].to(device)))
            yield levels, batch["mask"], batch["pixels"] if spec.images else None
        model.extractor.to(home)

    return open_or_build(root, spec, len(data.table), compute, int(config.budget_gb * 2**30))
