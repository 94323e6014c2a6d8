"""What the sweep `identical_shortcut` reconstructs, early and late: `python -m lightning_modules.pictures.shortcuts`.

After UniAD's slides (Figure 5b): all networks get the same frozen features, so *one* decoder, trained to turn those into images,
shows what each of them makes of an anomaly: one that copies its input shows the anomaly again. The cost is said before it starts:
a few minutes on a CPU with the packaged backbone. Early weights are those that `run.keep_epochs` kept.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure

from datamodules import UnifiedDataModule
from lightning_modules.base import ReconstructionModule
from lightning_modules.pictures.heatmaps import to_rgb
from lightning_modules.pictures.reconstructions import (
    DecoderTraining,
    choose,
    clean_and_reconstructed,
    image_scores,
    train_decoder,
    trained,
)
from lightning_modules.running.loading import load_run
from lightning_modules.running.quiet import quiet
from lightning_modules.running.serving import CacheConfig
from lightning_modules.running.settings import work_folder
from models.visual_decoder import VisualDecoder
from results.aggregator.records import StoredRecord, read_records
from results.common import trouble

NETWORK = "model.init_args.network"


@dataclass(frozen=True)
class Moment:
    """A network at the end of an epoch."""

    network: str
    epoch: int
    module: ReconstructionModule

    @property
    def title(self) -> str:
        """For the head of a column."""
        return f"{self.network.replace('_', ' ')}\nepoch {self.epoch}"


def networks(root: Path, sweep: str, seed: int) -> dict[str, StoredRecord]:
    """Network -> its newest run of the sweep with the seed, in the order of their names; ValueError if there is none."""
    found = {}
    for stored in sorted(read_records(root, sweep), key=lambda s: str(s.record.provenance.get("started") or "")):
        if stored.record.seed == seed and NETWORK in stored.record.cell:
            found[str(stored.record.cell[NETWORK])] = stored
    if not found:
        raise ValueError(f"{root / sweep} holds no run of seed {seed} with a parameter {NETWORK}.")
    return dict(sorted(found.items()))


def moments(name: str, stored: StoredRecord) -> list[Moment]:
    """A network early, as far as its run kept such weights, and late."""
    folder = work_folder(stored.path) / "checkpoints"
    early = sorted((int(file.stem.partition("-")[2]), file) for file in folder.glob("epoch-*.ckpt"))
    late = load_run(stored.path).module
    found = [Moment(name, epoch, load_run(stored.path, checkpoint=file).module) for epoch, file in early[:1]]
    return [*found, Moment(name, int(stored.record.provenance.get("epochs") or late.trained_epochs), late)]


def check_common(modules: Sequence[Moment], data: UnifiedDataModule) -> None:
    """ValueError unless all networks get the same features; one decoder would not be fair to the others."""
    batch = data.image_batch([0, 1])
    with torch.no_grad():
        first, *others = [clean_and_reconstructed(moment.module, batch)[0] for moment in modules]
    for moment, maps in zip(modules[1:], others, strict=True):
        if len(maps) != len(first) or not all(map(torch.equal, first, maps)):
            raise ValueError(
                f"{moment.network} does not get the features of {modules[0].network}, so one decoder cannot show both: give "
                "all runs the same backbone, image size and data."
            )


def cost(module: ReconstructionModule, data: UnifiedDataModule, epochs: int, width: int) -> str:
    """What training the decoder will take here, from two timed steps."""
    state = torch.get_rng_state()
    ids = data.table[data.table["split"] == "train"]["id"].tolist()[: data.batch_size]
    batch = data.image_batch(ids)
    maps, _ = clean_and_reconstructed(module, batch)
    training = DecoderTraining(module, width, [m.shape[1:] for m in maps])
    optimizer = training.configure_optimizers()
    for _ in range(2):  # the first one also warms up
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(training.decoder(maps), batch["image"]).backward()
        optimizer.step()
        seconds = time.perf_counter() - started
    torch.set_rng_state(state)
    steps = epochs * len(data.train_dataloader())
    return f"Cost: {steps} steps of {len(ids)} images, {seconds:.2f} s each here, so about {steps * seconds / 60:.1f} minutes."


@torch.no_grad()
def draw(
    shown: Sequence[Moment], data: UnifiedDataModule, decoder: VisualDecoder, chosen: dict[str, tuple[int, int]]
) -> bytes:
    """One JPEG: a row per category's anomalous image; image, ground truth, its features, then every network's."""
    titles = ["image", "ground truth", "its features", *(moment.title for moment in shown)]
    figure = Figure(figsize=(1.3 * len(titles) + 0.3, 1.35 * len(chosen) + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, (category, (_, anomalous)) in zip(axes, chosen.items(), strict=True):
        batch = data.image_batch([anomalous])
        maps = [clean_and_reconstructed(moment.module, batch) for moment in shown]
        decoded = [decoder(maps[0][0]), *(decoder(reconstructed) for _, reconstructed in maps)]
        rgb = to_rgb(torch.cat([batch["image"], *(picture.cpu() for picture in decoded)]), data.mean, data.std)
        for axis, picture in zip(row, [rgb[0], batch["mask"][0, 0].numpy(), *rgb[1:]], strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)  # the colour map concerns the mask only
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(category, fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", pil_kwargs={"quality": 88})
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.pictures.shortcuts", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--sweep", default="identical_shortcut", help="the sweep (default identical_shortcut)")
    parser.add_argument("--seed", type=int, default=0, help="whose runs are shown (default 0)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of the decoder (default 60)")
    parser.add_argument("--width", type=int, default=128, help="channels of the decoder's first stage (default 128)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of runs/, work/ and figures/")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.width < 16:
        parser.error(f"epochs must be at least 1 and width at least 16, found {options.epochs} and {options.width}.")
    quiet()
    torch.manual_seed(0)
    try:
        runs = networks(options.results / "runs", options.sweep, options.seed)
        first = next(iter(runs.values())).path
        module, data = trained(first)
        data.normalise(module.extractor.mean, module.extractor.std)
        shown = [moment for name, stored in runs.items() for moment in moments(name, stored)]
        check_common(shown, data)
    except (FileNotFoundError, ValueError) as error:  # also those of records and data
        raise SystemExit(f"error: {error}") from error
    if len(shown) == len(runs):
        print("No early weights were kept: train with --run.keep_epochs=[N] to see them.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = work_folder(first) / "visual_decoder" / "last.ckpt"
    if not file.is_file():
        print(cost(module, data, options.epochs, options.width), flush=True)
    cache = CacheConfig(**yaml.safe_load((first / "config.yaml").read_text()).get("cache", {}))
    decoder = train_decoder(module.to(device), data, file, options.epochs, options.width, cache).to(device)
    for moment in shown:
        moment.module.to(device)
    output = options.results / "figures" / "identical_shortcut_decoded.jpg"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(draw(shown, data, decoder, choose(image_scores(first / "image_scores.csv"), data.table)))
    print(output)


if __name__ == "__main__":
    main()
