"""Pictures of anomaly maps: image, ground truth, map of each level, fused map; chosen by rule, on one scale per category.

The scale is made of normal images, see `lightning_modules.decisions.pixels`: a good image looks good beside the defects.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import ReconstructionModule
from models.head import ScoredMaps

RANKS = ("worst", "median", "best")
GOOD_RANK = "good"
"""Of the good image that is shown beside the defects."""


def choose(image_scores: pd.DataFrame) -> dict[int, str]:
    """Image ids to draw: of every category the anomalous image with the lowest, median and highest image score.

    Where a category has structural and logical anomalies, three of each.

    Args:
        image_scores: One row per test image with `id`, `category`, `anomaly_type`, `label` (0 or 1) and
            `image_score`.

    Returns:
        id -> rank (`worst`, `median`, `best`); a category with fewer anomalous images gives fewer.
    """
    chosen: dict[int, str] = {}
    for _, rows in image_scores[image_scores.label == 1].groupby(["category", "anomaly_type"], sort=False):
        ordered = rows.sort_values(["image_score", "id"]).id.to_numpy()
        for rank, position in zip(RANKS, (0, len(ordered) // 2, len(ordered) - 1), strict=True):
            chosen.setdefault(int(ordered[position]), rank)
    return chosen


def beside(chosen: Mapping[int, str], image_scores: pd.DataFrame) -> dict[int, str]:
    """The chosen images and, of each of their categories, the good test image with the median score, of rank `GOOD_RANK`."""
    categories = set(image_scores[image_scores.id.isin(list(chosen))].category)
    found = dict(chosen)
    good = image_scores[(image_scores.label == 0) & image_scores.category.isin(categories)]
    for _, rows in good.groupby("category", sort=False):
        ordered = rows.sort_values(["image_score", "id"]).id.to_numpy()
        found[int(ordered[(len(ordered) - 1) // 2])] = GOOD_RANK
    return found


@torch.no_grad()
def draw(
    module: ReconstructionModule,
    data: Any,
    ranks: Mapping[int, str],
    image_scores: pd.DataFrame,
    scales: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[dict[str, bytes], list[tuple]]:
    """Draws the chosen test images, one picture per category, with the pictures' lines of the index.

    Args:
        module: The trained method, in eval mode.
        data: The data module; images are read through `UnifiedDataModule.scored_batches`.
        ranks: Image id -> rank, from `choose`.
        image_scores: The scores of all test images.
        scales: Category -> ends of its colour scale; None takes the lowest and the highest pixel of each picture.

    Returns:
        File name in the record -> JPEG bytes, and the lines for `index_of`.
    """
    files: dict[str, bytes] = {}
    index = []
    chosen = image_scores[image_scores.id.isin(list(ranks))]
    for category, rows in chosen.groupby("category", sort=False):
        kinds = dict(zip(rows.id, rows.anomaly_type, strict=True))
        order = (GOOD_RANK, *RANKS)
        ids = sorted(rows.id, key=lambda i: (ranks[i] != GOOD_RANK, kinds[i], order.index(ranks[i])))
        shown, datasets = scored_images(module, data, ids)
        defects = [data.table["defect"][i] for i in ids]
        titles = [
            "good, the median one" if ranks[i] == GOOD_RANK else f"{ranks[i]}: {defect}"
            for i, defect in zip(ids, defects, strict=True)
        ]
        name = f"{category.replace('/', '-')}.jpg"
        files[f"heatmaps/{name}"] = picture(*shown, titles, map_names(module), (scales or {}).get(category))
        score = rows.set_index("id").image_score
        for n, i in enumerate(ids):
            what = "median good image" if ranks[i] == GOOD_RANK else f"{ranks[i]} by image score, {defects[n]}"
            caption = f"{category}: {what}"
            index.append((datasets[n], data.table["category"][i], ranks[i], defects[n], score[i], name, caption))
    return files, index


def scored_images(
    module: ReconstructionModule, data: Any, ids: Sequence[int]
) -> tuple[tuple[np.ndarray, Tensor, ScoredMaps], list[str]]:
    """Chosen images, uint8 (B, H, W, 3), masks, bool (B, 1, H, W), and scores, for `picture`; and the images' datasets.

    Photographs in tiles are shown at the size of the network's input, their masks and maps reduced to it; no mask vanishes.
    """
    images, masks, scored, datasets = [], [], [], []
    for batch in data.scored_batches(ids):
        on_device = {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        found = module.score_batch(on_device)[""]
        mask = batch["mask"]
        if "tiles" in batch:
            size = tuple(batch["image"].shape[-2:])
            found = found._replace(maps=F.interpolate(found.maps[:, None], size, mode="area")[:, 0])
            mask = F.adaptive_max_pool2d(mask.float(), size).bool()
        images.append(to_rgb(batch["image"], data.mean, data.std))
        masks.append(mask)
        scored.append(found)
        datasets += batch["dataset"]
    maps, scores, levels = zip(*scored, strict=True)
    joined = ScoredMaps(torch.cat(maps), torch.cat(scores), [torch.cat(level) for level in zip(*levels, strict=True)])
    return (np.concatenate(images), torch.cat(masks), joined), datasets


def map_names(module: ReconstructionModule) -> tuple[str, ...]:
    """Names of the method's level maps in their own order: its own, or else its backbone's levels; () if unknown."""
    config = getattr(getattr(module, "extractor", None), "config", None)
    return tuple(module.map_names) or tuple(f"level {level}" for level in getattr(config, "levels", ()))


def index_of(rows: Sequence[tuple]) -> str:
    """The text of `heatmaps/index.csv` with some pictures' lines."""
    columns = ["dataset", "category", "rank", "defect", "image_score", "file", "caption"]
    return pd.DataFrame(rows, columns=columns).to_csv(index=False)


def to_rgb(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images (B, 3, H, W) back to uint8 RGB (B, H, W, 3)."""
    mean, std = torch.as_tensor(mean).view(3, 1, 1), torch.as_tensor(std).view(3, 1, 1)
    return (images.cpu() * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def overlay(image: np.ndarray, anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Heat map over a greyed image, uint8 (H, W, 3); `low` and `high` are the ends of the colour scale.

    A map of another size than the image, as the head's `map_size` makes it, is resized to it.
    """
    if anomaly_map.shape != image.shape[:2]:
        anomaly_map = cv2.resize(anomaly_map, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    scaled = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0, 1)
    heat = matplotlib.colormaps["inferno"](scaled)[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return (0.35 * grey + 0.65 * heat).round().astype(np.uint8)


def picture(
    images: np.ndarray,
    masks: Tensor,
    scored: ScoredMaps,
    titles: Sequence[str],
    names: Sequence[str] = (),
    scale: tuple[float, float] | None = None,
) -> bytes:
    """One JPEG: a row per image; columns image, ground truth, the levels from the highest to the lowest, fused map.

    With `names` the level maps stand in their own order under these names. `scale`: ends of the fused map's colours; None
    takes the lowest and the highest pixel of these maps.
    """
    maps = scored.maps.float().cpu().numpy()
    levels = [level.float().cpu().numpy() for level in scored.level_maps] if len(scored.level_maps) > 1 else []
    if len(names) != len(levels):
        levels.reverse()
        names = [f"map {n + 1} of {len(levels)}" for n in range(len(levels))]
    columns = ["image", "ground truth", *names, "anomaly map"]
    low, high = scale or (float(maps.min()), float(maps.max()))
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * len(images)), dpi=90, layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, title in enumerate(titles):
        axes[row, 0].imshow(images[row])
        axes[row, 1].imshow(masks[row, 0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        for column, level in enumerate(levels, start=2):
            axes[row, column].imshow(level[row], cmap="inferno", vmin=level.min(), vmax=level.max())
        axes[row, -1].imshow(overlay(images[row], maps[row], low, high))
        axes[row, 0].set_ylabel(title, fontsize=7)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", pil_kwargs={"quality": 85})
    return buffer.getvalue()
