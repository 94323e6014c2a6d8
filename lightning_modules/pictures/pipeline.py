"""The way of an image from photograph to table, with a run's own numbers: `make pipeline RUN=results/runs/SWEEP/RUN`.

Left to right: a test image with its mask outlined; the frozen backbone's levels and what the network makes of them, in
colours (the first three principal components of the frozen features, for both); each level's distance; the anomaly map;
the run's metrics.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import Bbox
from torch import Tensor

from lightning_modules.pictures.heatmaps import overlay, to_rgb
from lightning_modules.pictures.reconstructions import image_scores, trained
from lightning_modules.running.finding import find_run
from lightning_modules.running.quiet import quiet
from lightning_modules.running.settings import work_folder
from results.common import trouble

METRICS = {"image_auroc": "I-AUROC", "pixel_auroc": "P-AUROC", "pixel_aupro": "AUPRO"}
STEPS = (
    "photograph\n(mask outlined)",
    "frozen\nfeatures",
    "reconstructed by\na network that\nknows normal ones",
    "distance",
    "anomaly map",
    "metrics of all test images",
)


def coloured(target: Tensor, reconstruction: Tensor) -> list[np.ndarray]:
    """Two feature maps (C, H, W) as uint8 RGB (H, W, 3): the target's first three principal components, one scale each."""
    flat = target.flatten(1).T
    mean = flat.mean(0)
    _, _, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    own = (flat - mean) @ axes[:3].T
    low, high = torch.quantile(own, own.new_tensor([0.01, 0.99]), dim=0)
    scaled = [
        ((m.flatten(1).T - mean) @ axes[:3].T - low) / (high - low).clamp_min(1e-12) for m in (target, reconstruction)
    ]
    return [(s.clamp(0, 1) * 255).byte().reshape(*target.shape[1:], -1).numpy() for s in scaled]


@torch.no_grad()
def draw(folder: Path, image: int | None = None) -> Figure:
    """The figure of a finished run.

    Args:
        folder: Its record; checkpoint and data must be on this machine.
        image: Id of a test image, as in `image_scores.csv`; None takes the defect with the median score.

    Raises:
        FileNotFoundError, ValueError: as `lightning_modules.pictures.reconstructions.trained`; the method does not
            reconstruct, or there is no such image.
    """
    module, data = trained(folder)
    if not module.reconstructs:
        raise ValueError(f"{module.method} does not reconstruct anything, so there is nothing to draw.")
    scores = image_scores(folder / "image_scores.csv")
    if image is None:
        ordered = scores[scores.label == scores.label.max()].sort_values(["image_score", "id"])
        image = int(ordered.id.iloc[len(ordered) // 2])
    if image not in set(scores.id):
        raise ValueError(f"{folder} has no test image {image}; `id` in its image_scores.csv lists them.")
    batch = data.image_batch([image])
    pairs, scored = module.reconstruct(batch), module.evaluate(batch)[""]
    rgb = to_rgb(batch["image"], data.mean, data.std)[0]
    anomaly_map = scored.maps[0].float().numpy()
    levels = [coloured(p.target[0].float(), p.reconstruction[0].float()) for p in pairs]
    distances = [((p.target[0] - p.reconstruction[0]).float() ** 2).mean(0).sqrt().numpy() for p in pairs]

    figure = Figure(figsize=(12, 3.6), dpi=110)
    grid = figure.add_gridspec(
        len(pairs), 6, width_ratios=(3, 0.9, 0.9, 0.9, 3, 3.6), left=0.01, right=0.995, top=0.83, bottom=0.02, wspace=0.3,
        hspace=0.08,
    )  # fmt: skip
    whole = [figure.add_subplot(grid[:, column]) for column in (0, 4, 5)]
    small = [[figure.add_subplot(grid[row, column]) for column in (1, 2, 3)] for row in range(len(pairs))]
    whole[0].imshow(rgb)
    if batch["mask"].any():
        whole[0].contour(batch["mask"][0, 0].numpy(), [0.5], colors="white", linewidths=1)
    for axes, pictures, distance in zip(small, levels, distances, strict=True):
        for axis, picture in zip(axes, (*pictures, distance), strict=True):
            axis.imshow(picture, cmap="inferno")
    whole[1].imshow(overlay(rgb, anomaly_map, np.median(anomaly_map), anomaly_map.max()))
    _numbers(whole[2], pd.read_csv(folder / "metrics.csv", dtype={"category": str}, keep_default_na=False))
    top = small[0][0].get_position().y1
    columns = [(axis.get_position().x0, axis.get_position().x1) for axis in (whole[0], *small[0], *whole[1:])]
    for (left, right), step in zip(columns, STEPS, strict=True):
        figure.text((left + right) / 2, top + 0.03, step, ha="center", va="bottom", fontsize=8)
    for (_, left), (right, _) in itertools.pairwise(columns):
        gap, height = right - left, top / 2
        ends = (left + 0.2 * gap, height), (right - 0.2 * gap, height)
        figure.add_artist(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=10, color="0.35"))
    for axis in (*whole, *(a for axes in small for a in axes)):
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _numbers(axis: Axes, metrics: pd.DataFrame) -> None:
    """The run's metrics per category, and their mean, as a small table."""
    axis.axis("off")
    metrics["value"] = pd.to_numeric(metrics.value, errors="coerce")
    own = metrics[(metrics.variant == "") & metrics.scope.isin(["category", "mean"]) & metrics.metric.isin(METRICS)]
    rows: dict[str, list[str]] = {}
    for (scope, category), part in own.groupby(["scope", "category"], sort=False):
        values = part.drop_duplicates("metric").set_index("metric").value
        rows[str(category or scope)] = ["-" if pd.isna(v) else f"{100 * v:.1f}" for v in values.reindex(list(METRICS))]
    height = 0.1 * (len(rows) + 1)
    table = axis.table(
        list(rows.values()), rowLabels=list(rows), colLabels=list(METRICS.values()), cellLoc="center",
        colWidths=[0.24] * len(METRICS), bbox=Bbox.from_bounds(0.28, 0.5 - height / 2, 0.72, height),
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.4)


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.pictures.pipeline", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run: its name, or its record results/runs/SWEEP/RUN")
    parser.add_argument("--image", type=int, help="id of a test image (default: the defect with the median score)")
    parser.add_argument("--output", type=Path, help="the figure (default: pipeline.jpg beside the checkpoint)")
    options = parser.parse_args(arguments)
    quiet()
    try:
        options.run = find_run(options.run)
        figure = draw(options.run, options.image)
    except (FileNotFoundError, ValueError) as error:  # also those of records and data
        raise SystemExit(f"error: {error}") from error
    output = options.output or work_folder(options.run) / "pipeline.jpg"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, **({"pil_kwargs": {"quality": 88}} if output.suffix in (".jpg", ".jpeg") else {}))
    print(output)


if __name__ == "__main__":
    main()
