"""Methods side by side on the same images: `python -m lightning_modules.pictures.gallery --runs A B` or `--methods a b`.

As in RLR's supplement (Figure 1) and ULSAD's Figure 9: image, ground truth, a column per run. Nothing is picked by hand. The
images are those of one reference run, by its heat maps' rule: of every category the anomalous image with the lowest, the median
and the highest image score. Every column has one colour scale, by the rule of all heat maps
(`lightning_modules.decisions.pixels`): black up to the 99th percentile of the pixels of the run's held-out normal images (its
training images where none are held out); the other end is the highest pixel that is shown, but at least twice as far away as the
highest normal one. So whatever is brighter than half exceeds every pixel of every normal image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from datamodules import UnifiedDataModule
from datamodules.sample_table import category_keys
from lightning_modules.base import ReconstructionModule
from lightning_modules.decisions.pixels import scaled
from lightning_modules.metrics.thresholds import PixelCollector
from lightning_modules.pictures.heatmaps import RANKS, choose, overlay, to_rgb
from lightning_modules.pictures.reconstructions import image_scores, trained
from lightning_modules.running.finding import find_run
from lightning_modules.running.quiet import quiet
from lightning_modules.running.settings import work_folder
from results.aggregator.names import category_label, method_label
from results.aggregator.records import StoredRecord, read_record, read_records
from results.common import trouble

NAME = "gallery"
"""Of the files: `gallery.png`, `gallery.tex` and `gallery.json`, which the report reads."""


@dataclass(frozen=True)
class Shown:
    """An image of the gallery: where it is, whatever a run calls it."""

    dataset: str
    category: str
    defect: str
    file: str
    rank: str


@dataclass(frozen=True)
class Column:
    """What a run shows of the images, in their order: heat maps uint8 (H, W, 3), and the ends of its colour scale."""

    label: str
    pictures: list[np.ndarray]
    scale: tuple[float, float]


def of_methods(methods: Sequence[str], root: Path) -> list[Path]:
    """Per method the folder of its newest run that still has its checkpoint; ValueError if there is none."""
    newest: dict[str, StoredRecord] = {}
    records = read_records(root, warn=False)
    for stored in sorted(records, key=lambda stored: str(stored.record.provenance.get("started") or "")):
        if (work_folder(stored.path) / "checkpoints" / "last.ckpt").is_file():
            newest[stored.record.method] = stored
    missing = [method for method in methods if method not in newest]
    if missing:
        known = ", ".join(sorted(newest)) or "none"
        raise ValueError(f"no run with a checkpoint of {', '.join(missing)} in {root}; there are runs of: {known}.")
    return [newest[method].path for method in methods]


def images_of(folder: Path, data: UnifiedDataModule) -> list[Shown]:
    """The reference run's images, worst, median and best of every category."""
    chosen = choose(image_scores(folder / "image_scores.csv"))
    table, keys = data.table, category_keys(data.table)
    ids = sorted(chosen, key=lambda i: (keys[i], table["anomaly_type"][i], RANKS.index(chosen[i])))
    return [_shown(table, i, chosen[i]) for i in ids]


def _shown(table: Any, number: int, rank: str) -> Shown:
    path = Path(table["image_path"][number])
    defect = str(table["defect"][number])
    return Shown(str(table["dataset"][number]), str(table["category"][number]), defect, path.name, rank)


@torch.no_grad()
def colour_scale(module: ReconstructionModule, data: UnifiedDataModule, highest: float) -> tuple[float, float]:
    """Ends of a run's colour scale, from its normal images; `highest` is the highest pixel of the maps that are shown."""
    collected = PixelCollector()
    for batch in data.normal_images():
        for one in module.evaluate(_on(batch, module))[""].maps.float().cpu().numpy():
            collected.add(one)
    found = scaled(collected.statistics(), highest)
    return found.low, found.high


@torch.no_grad()
def column(label: str, module: ReconstructionModule, data: UnifiedDataModule, images: Sequence[Shown]) -> Column:
    """A run's heat maps of the images.

    Raises:
        ValueError: one of them is no test image of the run.
    """
    places = _places(data)
    missing = [image for image in images if _key(image) not in places]
    if missing:
        image = missing[0]
        raise ValueError(
            f"{label}: {image.category}/{image.defect}/{image.file} is not one of its test images: all runs of a gallery "
            "need the same test set, so leave the run out or train it on the same data."
        )
    batches = [data.image_batch([places[_key(image)]]) for image in images]
    maps = [module.evaluate(_on(batch, module))[""].maps[0].float().cpu().numpy() for batch in batches]
    scale = colour_scale(module, data, max(float(one.max()) for one in maps))
    pictures = [
        overlay(to_rgb(batch["image"], data.mean, data.std)[0], one, *scale)
        for batch, one in zip(batches, maps, strict=True)
    ]
    return Column(label, pictures, scale)


def _places(data: UnifiedDataModule) -> dict[tuple[str, str, str], int]:
    """Test image -> its id in a run."""
    tested = data.table[data.table["split"] == "test"]["id"]
    return {_key(_shown(data.table, number, "")): number for number in tested.tolist()}


def _key(image: Shown) -> tuple[str, str, str]:
    """Which image it is; the dataset's name may differ between runs."""
    return image.category, image.defect, image.file


def _on(batch: Any, module: ReconstructionModule) -> dict[str, Any]:
    return {name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def figure(
    images: Sequence[Shown], sources: Sequence[tuple[np.ndarray, np.ndarray]], columns: Sequence[Column]
) -> Figure:
    """A row per image; columns image, ground truth, then the runs.

    Args:
        images: What is shown.
        sources: Per image its pixels uint8 (H, W, 3) and its mask bool (H, W).
        columns: The runs.
    """
    titles = ["image", "ground truth", *(column.label for column in columns)]
    drawn = Figure(figsize=(1.35 * len(titles) + 0.5, 1.38 * len(images) + 0.3), layout="constrained")
    axes = drawn.subplots(len(images), len(titles), squeeze=False)
    for row, (image, source) in enumerate(zip(images, sources, strict=True)):
        shown = [source[0], source[1], *(column.pictures[row] for column in columns)]
        for axis, picture in zip(axes[row], shown, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)  # the colour map concerns the mask only
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(f"{category_label(image.category)}\n{image.rank}: {image.defect}", fontsize=6)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return drawn


def caption(reference: str, columns: Sequence[Column]) -> str:
    """How the images and the colours were chosen."""
    return (
        f"Methods side by side ({', '.join(column.label for column in columns)}). Images: of every category the anomalous test "
        f"image with the lowest (worst), median and highest (best) score of {reference}. One colour scale per column, from the "
        "method's own held-out normal images (training images where none are held out): black up to the 99th percentile of "
        "their pixels, none of which is brighter than the middle of the scale."
    )


def latex(picture: str, text: str) -> str:
    """A float with the picture; needs `graphicx`."""
    for character in "_%&#":
        text = text.replace(character, f"\\{character}")
    return (
        "\\begin{figure*}[t]\n  \\centering\n"
        f"  \\includegraphics[width=\\textwidth]{{{picture}}}\n  \\caption{{{text}}}\n\\end{{figure*}}\n"
    )


def write(folders: Sequence[Path], reference: Path, out: Path) -> Path:
    """Writes `gallery.png`, `.tex` and `.json` into `out`; returns the picture's path."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, data = trained(reference)
    data.normalise(module.extractor.mean, module.extractor.std)
    images = images_of(reference, data)
    if not images:
        raise ValueError(f"{reference} has no anomalous test image, so there is nothing to show.")
    places = _places(data)
    batches = [data.image_batch([places[_key(image)]]) for image in images]
    sources = [(to_rgb(b["image"], data.mean, data.std)[0], b["mask"][0, 0].numpy()) for b in batches]
    records = [read_record(folder) for folder in folders]
    columns = []
    for folder, label in zip(folders, _labels(records), strict=True):
        module, data = trained(folder)
        data.normalise(module.extractor.mean, module.extractor.std)
        columns.append(column(label, module.to(device), data, images))
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{NAME}.png"
    figure(images, sources, columns).savefig(picture, dpi=110, metadata={"Software": None})
    text = caption(read_record(reference).name, columns)
    (out / f"{NAME}.tex").write_text(latex(picture.name, text))
    content = {
        "caption": text,
        "runs": [stored.name for stored in records],
        "reference": read_record(reference).name,
        "images": [vars(image) for image in images],
        "scales": {column.label: column.scale for column in columns},
    }
    (out / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n")
    return picture


def _labels(records: Sequence[StoredRecord]) -> list[str]:
    """The methods' names; with the run's where two would be alike."""
    labels = [method_label(stored.record.method) for stored in records]
    return [
        label if labels.count(label) == 1 else f"{label}\n{stored.record.run}"
        for label, stored in zip(labels, records, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.pictures.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="names, or records results/runs/SWEEP/RUN")
    which.add_argument("--methods", nargs="+", metavar="METHOD", help="of each method the newest run with a checkpoint")
    parser.add_argument("--reference", type=Path, help="run whose scores choose the images (default: the first)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of runs/ and figures/")
    parser.add_argument(
        "--out", type=Path, help="folder of the picture (default: figures/, where it replaces the last)"
    )
    options = parser.parse_args(arguments)
    quiet()
    try:
        if options.runs:
            folders = [find_run(run, options.results) for run in options.runs]
        else:
            folders = of_methods(options.methods, options.results / "runs")
        reference = find_run(options.reference, options.results) if options.reference else folders[0]
        print(write(folders, reference, options.out or options.results / "figures"))
    except (FileNotFoundError, ValueError) as error:  # also those of records and data
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
