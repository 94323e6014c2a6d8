"""Where a run fails: per category the good images with the highest and the defects with the lowest scores, with their ranks.

After UniAS (supplement, Figure 2) and RLR (section 5), which show failures picked by hand; here a rule picks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from lightning_modules.base import ReconstructionModule
from lightning_modules.pictures.heatmaps import map_names, picture, scored_images

FILE = "failures.csv"
"""In a record: the rows of `find`."""
COUNT = 3
"""Of each kind and category."""
GOOD, MISSED = "highest good", "lowest defect"
COLUMNS = ("category", "kind", "id", "defect", "image_score", "rank", "images", "defects", "path")


def find(image_scores: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The failures, worst first, a row each; a category without defects, or without good images, gives none.

    Args:
        image_scores: One row per test image with `id`, `category`, `label` (0 or 1), `image_score` and `path`.
        table: The sample table, for the kinds of defects.

    Returns:
        `COLUMNS`. `rank` is the image's place among all `images` of its category, 1 for the highest score (alike
        scores share the best place). Of a perfect ranking the `defects` have the first places: a good image fails if its
        rank is no larger than `defects`, a defect if its rank is larger.
    """
    rows = []
    for category, mine in image_scores.groupby("category", sort=False):
        defects, images = int((mine.label == 1).sum()), len(mine)
        if defects in (0, images):
            continue
        ranked = mine.assign(rank=mine.image_score.rank(method="min", ascending=False).astype(int))
        for kind, label, ascending in ((GOOD, 0, False), (MISSED, 1, True)):
            chosen = ranked[ranked.label == label].sort_values(["image_score", "id"], ascending=[ascending, True])
            for row in chosen.head(COUNT).itertuples():
                defect = table["defect"][row.id]
                rows.append((category, kind, row.id, defect, row.image_score, row.rank, images, defects, row.path))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@torch.no_grad()
def draw(
    module: ReconstructionModule,
    data: Any,
    found: pd.DataFrame,
    scales: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[dict[str, bytes], list[tuple]]:
    """One picture per category, on one colour scale each, and its lines of `heatmaps/index.csv`.

    Args:
        module: The trained method, in eval mode.
        data: The data module; images are read through `UnifiedDataModule.scored_batches`.
        found: From `find`.
        scales: Category -> ends of its colour scale, see `lightning_modules.pictures.heatmaps`.
    """
    files, index = {}, []
    for category, rows in found.groupby("category", sort=False):
        shown, datasets = scored_images(module, data, rows.id.tolist())
        ranks = [f"{row.kind}, rank {row.rank} of {row.images}" for row in rows.itertuples()]
        titles = [
            f"{row.kind}: {row.defect}\nrank {row.rank} of {row.images} ({row.defects} defects)"
            for row in rows.itertuples()
        ]
        name = f"{category.replace('/', '-')}-failures.jpg"
        files[f"heatmaps/{name}"] = picture(*shown, titles, map_names(module), (scales or {}).get(category))
        for number, (row, rank) in enumerate(zip(rows.itertuples(), ranks, strict=True)):
            place = (datasets[number], data.table["category"][row.id])
            caption = f"{category}: {rank}, {row.defects} defects"
            index.append((*place, rank, row.defect, row.image_score, name, caption))
    return files, index
