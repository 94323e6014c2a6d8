"""What the frozen features attend to: `python -m lightning_modules.pictures.self_similarity results/runs/SWEEP/RUN`.

ULSAD (TMLR 2025), Figure 5: rows of the self-attention of the frozen features (Eq. 3), without any training: how much every
position of an image counts for a chosen one. Nothing is learned, so it takes seconds. The positions are chosen by rule: the
middle of the defect and the middle of the image, of every category's anomalous test image with the median score.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from datamodules import UnifiedDataModule
from lightning_modules.base import ReconstructionModule
from lightning_modules.pictures.heatmaps import to_rgb
from lightning_modules.pictures.reconstructions import choose, image_scores, trained
from lightning_modules.running.finding import find_run
from lightning_modules.running.quiet import quiet
from lightning_modules.running.settings import work_folder
from results.common import trouble

MEASURES = ("attention", "cosine")


def similarity_row(features: Tensor, position: tuple[float, float], measure: str = "attention") -> Tensor:
    """How much every position counts for one.

    Args:
        features: (C, h, w) float.
        position: (row, column), each in [0, 1), of the image's height and width.
        measure: `attention`, the softmax of z_p . x_q / sqrt(C) over all positions p (Eq. 3), which sums to 1; or `cosine`
            of the angle between z_p and x_q, in [-1, 1].

    Returns:
        (h, w) float32.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}; choose {' or '.join(MEASURES)}.")
    C, h, w = features.shape
    at = int(position[0] * h) * w + int(position[1] * w)
    tokens = features.float().flatten(1).T  # (h w, C)
    if measure == "cosine":
        return F.cosine_similarity(tokens, tokens[at], dim=1).view(h, w)
    return (tokens @ tokens[at] / math.sqrt(C)).softmax(0).view(h, w)


def middle(mask: np.ndarray) -> tuple[float, float]:
    """(row, column) in [0, 1) of the marked pixel of a mask (H, W) that is nearest to the centre of all marked ones."""
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return (rows[nearest] + 0.5) / mask.shape[0], (columns[nearest] + 0.5) / mask.shape[1]


@torch.no_grad()
def figure(
    module: ReconstructionModule, data: UnifiedDataModule, ids: dict[str, int], measure: str = "attention"
) -> Figure:
    """Two rows per category (defect, image centre): the image with the position, then the row of each feature level."""
    rows = []
    for category, number in ids.items():
        batch = data.image_batch([number])
        levels = [level[0].cpu() for level in module.extractor(batch["image"].to(module.device))]
        mask = batch["mask"][0, 0].numpy()
        places = {"defect": middle(mask)} if mask.any() else {}
        picture = to_rgb(batch["image"], data.mean, data.std)[0]
        for what, place in {**places, "image centre": (0.5, 0.5)}.items():
            found = [similarity_row(level, place, measure).numpy() for level in levels]
            rows.append((f"{category}\n{what}", picture, place, found))
    titles = ["position", *(f"level {number}" for number in module.extractor.config.levels)]
    drawn = Figure(figsize=(1.5 * len(titles) + 0.3, 1.5 * len(rows) + 0.3), layout="constrained")
    axes = drawn.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, picture, place, found) in zip(axes, rows, strict=True):
        line[0].imshow(picture)
        line[0].plot(place[1] * picture.shape[1], place[0] * picture.shape[0], "+", color="red", ms=10, mew=2)
        line[0].set_ylabel(label, fontsize=7)
        for axis, values in zip(line[1:], found, strict=True):
            axis.imshow(values, cmap="inferno")
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return drawn


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.pictures.self_similarity", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("run", type=Path, help="a finished run: its name, or its record results/runs/SWEEP/RUN")
    parser.add_argument("--measure", choices=MEASURES, default="attention", help="softmax as in Eq. 3, or the cosine")
    parser.add_argument("--output", type=Path, help="the figure (default: self_similarity.png beside the checkpoint)")
    options = parser.parse_args(arguments)
    quiet()
    try:
        options.run = find_run(options.run)
        module, data = trained(options.run)
    except (FileNotFoundError, ValueError) as error:  # also those of records and data
        raise SystemExit(f"error: {error}") from error
    data.normalise(module.extractor.mean, module.extractor.std)
    chosen = choose(image_scores(options.run / "image_scores.csv"), data.table)
    output = options.output or work_folder(options.run) / "self_similarity.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"The features of {len(chosen)} images: seconds, nothing is trained.")
    ids = {name: anomalous for name, (_, anomalous) in chosen.items()}
    figure(module, data, ids, options.measure).savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    main()
