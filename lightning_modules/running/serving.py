"""Pays the frozen backbone once: fills the feature cache and lets the data module serve from it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import track

from datamodules import UnifiedDataModule
from datamodules.cache.entry import CacheSpec, Computed, FeatureCache, open_or_build
from datamodules.cache.folder import CacheTooLargeError
from datamodules.dataset import Row
from lightning_modules.base import ReconstructionModule

BATCH = 32
FEATURE_OPTIONS = ("levels", "final_norm", "prefix_tokens", "position", "maps", "rectified")
"""Options of the backbone that decide what its features are, besides its weights and padding."""


@dataclass(frozen=True)
class CacheConfig:
    """The cache of backbone features, shared by all runs that need the same ones.

    Args:
        mode: `float32` (bit-exact), `float16` (half the size, not exact) or `off`. Measured on the demo's four
            categories with packaged weights, seed 0: noisy_bottleneck 11.7 and 6.1 MB, patchcore 65.8 and 33.2 MB; image
            AUROC and AP equal, pixel AUROC, AP and AUPRO at most 0.003 percent points apart.
        root: Its folder.
        budget_gb: GiB that it may take on disk; the least recently used entries make room.
        resident_gb: GiB of a GPU's memory that may hold features; by default half of what is free. What does not fit,
            and everything on a CPU, is read from disk batch by batch.
    """

    mode: str = "float32"
    root: str = "results/cache"
    budget_gb: float = 50.0
    resident_gb: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("float32", "float16", "off"):
            raise ValueError(f"cache.mode is {self.mode!r}; allowed are float32, float16 and off.")


def attach(
    model: ReconstructionModule,
    data: UnifiedDataModule,
    config: CacheConfig,
    device: torch.device,
    build: bool,
    images: bool = False,
) -> None:
    """Lets the data module serve `features` from the cache, or, where that cannot be, at least decoded images.

    An augmentation that only flips and turns by 90 degrees makes at most eight versions of an image, so their features
    are kept too. Features cannot be served when it does more than that (they differ each time), or when they do not fit
    into the budget; then the resized images are kept, and the backbone runs in every step. Without `build`, only an
    entry that exists is used. With `images`, batches carry them beside the features, whether or not the method needs them.
    """
    if config.mode == "off":
        return
    data.setup("fit")
    data.normalise(model.extractor.mean, model.extractor.std)
    source = {"content": data.content(), "image_size": tuple(data.image_size), "resize": data.resizing}
    symmetric = data.symmetric_rows()
    if symmetric is not None and not model.uncached:
        provenance, backbone = model.extractor.provenance, model.extractor.config
        turns = json.dumps([(row.id, row.symmetry) for row in symmetric]) if symmetric else ""
        features = CacheSpec(
            **source,
            backbone={k: provenance[k] for k in ("name", "sha256", "padding")}
            | {name: getattr(backbone, name) for name in FEATURE_OPTIONS},
            preparation=model.network.preparation,
            mean=tuple(data.mean),
            std=tuple(data.std),
            dtype=config.mode,
            images=images or model.needs_images,
            symmetries=turns and hashlib.sha256(turns.encode()).hexdigest(),
        )
        try:
            cache = _open(features, model, data, config, device, build, symmetric)
            if cache is not None:
                data.serve_from(cache, device, _resident_bytes(config, device), symmetric)
            return
        except CacheTooLargeError as error:
            why = f"it {error}"
    else:
        changed = "get synthetic anomalies" if data.anomalies else f"are augmented ({data.augmentation})"
        why = model.uncached or f"images {changed}, so their features differ each time"
    runs = "The backbone runs in every step; decoded" if model.has_backbone else "Decoded"
    rank_zero_info(f"No feature cache: {why}. {runs} images are cached.")
    try:
        cache = _open(CacheSpec(**source, images=True), model, data, config, device, build)
        if cache is not None:
            data.serve_images_from(cache)
    except CacheTooLargeError as error:
        rank_zero_info(f"No image cache: it {error}. Images are read and decoded in every step.")


def _resident_bytes(config: CacheConfig, device: torch.device) -> int:
    """Bytes of features that may live on the training device."""
    if device.type != "cuda":
        return 0  # the system keeps the file in memory anyway, as far as there is room
    if config.resident_gb is not None:
        return int(config.resident_gb * 2**30)
    return torch.cuda.mem_get_info(device)[0] // 2


def _open(
    spec: CacheSpec,
    model: ReconstructionModule,
    data: UnifiedDataModule,
    config: CacheConfig,
    device: torch.device,
    build: bool,
    symmetric: Sequence[Row] = (),
) -> FeatureCache | None:
    """The entry of `spec`; None if it does not exist and is not to be built."""

    @torch.no_grad()
    def compute(first: int) -> Computed:
        home = model.device
        model.extractor.to(device)
        loader = data.all_images(first, BATCH, symmetric)
        for batch in track(loader, "Cache", disable=not sys.stdout.isatty(), transient=True):
            levels = [] if spec.backbone is None else model.extract(batch["image"].to(device))
            yield levels, batch["mask"], batch["pixels"] if spec.images else None
        model.extractor.to(home)

    root = Path(config.root)
    if not build and not (root / spec.key / "meta.json").exists():
        return None
    rows = len(data.cached_rows()) + len(symmetric)
    return open_or_build(root, spec, rows, compute, int(config.budget_gb * 2**30), rank_zero_info, _words(data))


def _words(data: UnifiedDataModule) -> str:
    """The data sets and their categories, for a person: `photos (ball_screw, cookie)`."""
    found: dict[str, dict[str, None]] = {}
    for dataset, category in zip(data.table["dataset"], data.table["category"], strict=True):
        found.setdefault(str(dataset), {})[str(category).rpartition("/")[2]] = None
    return "; ".join(
        f"{name} ({', '.join(list(categories)[:6])}{', ...' if len(categories) > 6 else ''})"
        for name, categories in found.items()
    )
