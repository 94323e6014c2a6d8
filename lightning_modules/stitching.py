"""Scores of a photograph in tiles: each tile is scored by itself, a few at a time, and the maps become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from datamodules.tiled import TiledPhotograph
from datamodules.tiling import Canvas
from models.head import ScoredMaps

Evaluate = Callable[[Mapping[str, Any]], dict[str, ScoredMaps]]


def stitched(evaluate: Evaluate, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
    """Maps and scores of a batch of one photograph, by variant.

    A tile's map, of whatever size the head gives it, is resized to the tile's pixels and blended with its neighbours'
    (`datamodules.tiling`). The photograph's score is the highest of its tiles': each is then the method's own, by its own
    rule and at the size of an image that it was trained on. There are no level maps.

    Args:
        evaluate: Scores tiles, normalised images (B, 3, H, W), as a method does images.
        batch: `tiles`, a list of one `TiledPhotograph`, and `image`, whose device is used; what else it tells of the
            photograph is told of every tile.

    Returns:
        Variant -> maps float32 (1, height, width) at the photograph's own size, image scores float32 (1,).
    """
    (photograph,) = batch["tiles"]
    device = batch["image"].device
    canvases: dict[str, Canvas] = {}
    highest: dict[str, Tensor] = {}
    for numbers, images in photograph.chunks():
        found = evaluate(_of_tiles(batch, images.to(device)))
        for variant, scored in found.items():
            if variant not in canvases:
                canvases[variant] = Canvas(photograph.tiling, device)
            for number, tile_map in zip(numbers, scored.maps, strict=True):
                canvases[variant].add(number, tile_map)
            top = scored.image_scores.float().amax(0, keepdim=True)
            highest[variant] = torch.maximum(highest[variant], top) if variant in highest else top
    return {variant: ScoredMaps(canvas.map[None], highest[variant], []) for variant, canvas in canvases.items()}


def of_photograph(evaluate: Evaluate, photograph: TiledPhotograph, device: torch.device, **told: Any) -> ScoredMaps:
    """As `stitched`, for a method without its variants, of a photograph that is in no batch."""
    return stitched(evaluate, {"tiles": [photograph], "image": torch.empty(0, device=device), **told})[""]


def _of_tiles(batch: Mapping[str, Any], images: Tensor) -> dict[str, Any]:
    """The batch of some tiles."""
    told = {
        name: batch[name] * len(images) for name in ("category", "dataset", "anomaly_type", "path") if name in batch
    }
    numbers = {name: batch[name].expand(len(images)) for name in ("label", "id") if name in batch}
    return {"image": images, **told, **numbers}
