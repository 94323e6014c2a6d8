"""Pictures of what a trained run reconstructs: `python -m lightning_modules.pictures.reconstructions RUN`.

A `models.visual_decoder.VisualDecoder` is trained on the run's normal training images to turn the method's clean
features back into images, then draws, per category, an anomalous test image's features and their reconstruction. It
serves every method whose pairs are feature maps. Decoder and figure are written beside the run's checkpoint; a training
that was interrupted goes on where it stopped. What the training costs on this machine is said before it starts.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from datamodules import UnifiedDataModule
from datamodules.sample_table import category_keys
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.progress import PlainProgress
from lightning_modules.pictures.heatmaps import overlay, to_rgb
from lightning_modules.running import checkpoints, recorded_configuration
from lightning_modules.running.checkpoints import WholeCheckpoints
from lightning_modules.running.finding import find_run
from lightning_modules.running.loading import load_run
from lightning_modules.running.methods import build
from lightning_modules.running.quiet import quiet
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.running.settings import work_folder
from models.visual_decoder import VisualDecoder
from results.aggregator.records import read_record
from results.common import trouble
from results.common.environment import parts

TIMED = 2
"""Training steps by which the cost is estimated before it is paid."""
COLUMNS = ("normal", "anomaly", "its features", "reconstructed", "ground truth", "anomaly map")


def trained(folder: Path) -> tuple[ReconstructionModule, UnifiedDataModule]:
    """The trained method, in eval mode, and the data module, set up, of a finished run.

    Args:
        folder: The run's record, `<results>/runs/<sweep>/<run>`; its checkpoint lies in `<results>/work`.

    Raises:
        FileNotFoundError, ValueError: as `lightning_modules.running.loading.load_run`; or the data on disk are not
            those of the run.
    """
    module = load_run(folder).module
    record = read_record(folder)
    section = yaml.safe_load(record.config_text).get("data")
    recorded_configuration.check(section, folder / "config.yaml", ())
    data = build(UnifiedDataModule, section)
    data.setup("fit")
    for dataset in record.record.datasets:
        now = data.fingerprints[dataset["name"]]
        if now != dataset["fingerprint"]:
            raise ValueError(
                f"The images of {dataset['name']} changed since the run {folder}: their fingerprint was "
                f"{dataset['fingerprint'][:12]} and is {now[:12]}. Train the run again."
            )
    return module, data


class DecoderTraining(L.LightningModule):
    """Trains a decoder of a method's clean features on normal images, by mean squared error, with Adam.

    Args:
        method: In eval mode. The checkpoints do not hold it.
        width: Channels of the decoder's first stage.
        shapes: (C, H, W) of each feature map.
        lr: Learning rate.
    """

    def __init__(
        self, method: ReconstructionModule, width: int, shapes: Sequence[torch.Size], lr: float = 1e-4
    ) -> None:
        super().__init__()
        channels, sizes = [shape[0] for shape in shapes], [tuple(shape[1:]) for shape in shapes]
        self.decoder = VisualDecoder(channels, sizes, method.image_size, width)
        self.lr = lr
        self.trained_epochs = 0
        self._method = (method,)  # in a tuple, so that torch does not take it for a part of this module

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        maps, _ = clean_and_reconstructed(self._method[0].to(self.device), batch)
        loss = F.mse_loss(self.decoder(maps), batch["image"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.trained_epochs = self.current_epoch + 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trained_epochs"] = self.trained_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_epochs = checkpoint["trained_epochs"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.decoder.parameters(), lr=self.lr)


def train_decoder(
    module: ReconstructionModule, data: UnifiedDataModule, file: Path, epochs: int, width: int, cache: CacheConfig
) -> VisualDecoder:
    """The decoder of a run in eval mode, trained or taken from `file`, where an interrupted training goes on.

    What `file` holds is used if its width is this one, it has not been trained for longer, and the run's weights are
    not newer.
    """
    maps, _ = clean_and_reconstructed(module, data.image_batch([0]))
    training = DecoderTraining(module, width, [m.shape[1:] for m in maps])
    done = _trained_epochs(file, training)
    if done is None or done > epochs:
        done = None
        file.unlink(missing_ok=True)
    checkpoint = ModelCheckpoint(
        file.parent,
        filename=file.stem,
        every_n_epochs=max(1, epochs // 100),
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        devices=1,
        max_epochs=epochs,
        logger=False,
        callbacks=[checkpoint, RichProgressBar(leave=False) if sys.stdout.isatty() else PlainProgress()],
        plugins=[WholeCheckpoints()],
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        use_distributed_sampler=False,
        default_root_dir=file.parent,
    )
    if done != epochs:
        attach(module, data, cache, trainer.strategy.root_device, build=True, images=True)
    loader = data.train_dataloader()
    if done != epochs:
        left = (epochs - (done or 0)) * seconds_per_epoch(training, module, data.train_dataloader())
        print(
            f"The visual decoder (width {width}) is trained for {epochs - (done or 0)} epochs first: about "
            f"{max(left / 60, 0.1):.1f} min on this machine. Fewer --epochs or a smaller --width cost less, more draw "
            "sharper. Ctrl-C stops, and the same command goes on.",
            flush=True,
        )
    trainer.fit(training, loader, ckpt_path=None if done is None else str(file), weights_only=True)
    if done != epochs:
        trainer.save_checkpoint(file)
        error = trainer.callback_metrics["train/loss"]
        print(f"Visual decoder: mean squared error {error:.4f} on normalised training images; kept in {file}")
    return training.decoder.eval()


def seconds_per_epoch(training: DecoderTraining, method: ReconstructionModule, loader: DataLoader) -> float:
    """How long an epoch of a decoder's training takes here, by `TIMED` steps of a copy; nothing of them is kept."""
    decoder = deepcopy(training.decoder).to(method.device).train()
    optimizer, moments = torch.optim.Adam(decoder.parameters()), []
    for _, batch in zip(range(TIMED + 1), loader, strict=False):  # the first step, which allocates, is not counted
        maps, _ = clean_and_reconstructed(method, batch)
        optimizer.zero_grad()
        F.mse_loss(decoder(maps), batch["image"].to(method.device)).backward()
        optimizer.step()
        moments.append(time.perf_counter())
    return (moments[-1] - moments[0]) / max(1, len(moments) - 1) * len(loader)


def _trained_epochs(file: Path, training: DecoderTraining) -> int | None:
    """Epochs of the decoder in `file`; None if there is no whole one for this run and this width."""
    run = file.parents[1] / "checkpoints" / "last.ckpt"
    if not file.is_file() or file.stat().st_mtime < run.stat().st_mtime:
        return None
    try:
        stored = checkpoints.read(file)
    except checkpoints.CheckpointError:
        return None
    shapes = {name: value.shape for name, value in stored["state_dict"].items()}
    return (
        stored["trained_epochs"]
        if shapes == {name: value.shape for name, value in training.state_dict().items()}
        else None
    )


@torch.no_grad()
def clean_and_reconstructed(
    module: ReconstructionModule, batch: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The clean features and the reconstructions of a batch, float32 maps (B, C, H, W)."""
    pairs = module.reconstruct({k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return [pair.target.float() for pair in pairs], [pair.reconstruction.float() for pair in pairs]


def choose(image_scores: pd.DataFrame, table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Per category the ids of a normal and an anomalous test image, each with the median image score of its kind.

    Args:
        image_scores: `id`, `category`, `label` and `image_score` of the test images.
        table: The sample table; a category without normal test images shows its first training image.
    """
    chosen = {}
    for category, rows in image_scores.groupby("category", sort=False):
        ordered = rows.sort_values(["image_score", "id"])
        normal, anomalous = (ordered[ordered.label == label].id.tolist() for label in (0, 1))
        if not anomalous:
            continue
        if not normal:
            same = table[(pd.Series(category_keys(table), table.index) == category) & (table.split == "train")]
            normal = same.id.tolist()[:1]
        chosen[category] = (normal[len(normal) // 2], anomalous[len(anomalous) // 2])
    return chosen


@torch.no_grad()
def draw(
    module: ReconstructionModule, data: UnifiedDataModule, decoder: VisualDecoder, chosen: dict[str, tuple[int, int]]
) -> bytes:
    """One JPEG with a row per category and the columns of `COLUMNS`."""
    figure = Figure(figsize=(1.5 * len(COLUMNS) + 0.4, 1.5 * len(chosen) + 0.3), dpi=120, layout="constrained")
    axes = figure.subplots(len(chosen), len(COLUMNS), squeeze=False)
    for row, (category, (normal, anomalous)) in zip(axes, chosen.items(), strict=True):
        batch = data.image_batch([normal, anomalous])
        on_device = {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        scored = module.evaluate(on_device)[""].maps.cpu().numpy()
        decoded = [decoder(maps)[1:] for maps in clean_and_reconstructed(module, batch)]
        rgb = to_rgb(torch.cat([batch["image"], *(picture.cpu() for picture in decoded)]), data.mean, data.std)
        pictures: Sequence = (
            *rgb,
            batch["mask"][1, 0].numpy(),
            overlay(rgb[1], scored[1], scored.min(), scored.max()),
        )
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)  # the colour map concerns the mask only
            axis.set_xticks([])
            axis.set_yticks([])
        if not batch["has_mask"][1]:
            row[4].text(0.5, 0.5, "no mask", color="white", fontsize=8, ha="center", transform=row[4].transAxes)
        row[0].set_ylabel(category, fontsize=8)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", pil_kwargs={"quality": 88})
    return buffer.getvalue()


def image_scores(file: Path) -> pd.DataFrame:
    """A record's image scores; names stay the texts that they are."""
    texts = dict.fromkeys(("category", "dataset", "anomaly_type", "defect", "path"), str)
    return pd.read_csv(file, dtype=texts, keep_default_na=False, na_values={"image_score": [""]})


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.pictures.reconstructions", description=__doc__)
    parser.add_argument("run", help="name or record folder of a finished run")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the decoder (default 10; 100 draw sharper)")
    parser.add_argument(
        "--width", type=int, default=64, help="channels of the decoder's first stage (default 64; 256 draw sharper)"
    )
    parser.add_argument("--categories", default="", help="comma list of category keys to draw (default: all)")
    parser.add_argument("--output", type=Path, help="the figure (default: reconstructions.jpg beside the checkpoint)")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.width < 16:
        parser.error(f"epochs must be at least 1 and width at least 16, found {options.epochs} and {options.width}.")
    quiet()
    torch.manual_seed(0)
    try:
        options.run = find_run(options.run)
        module, data = trained(options.run)
    except (FileNotFoundError, ValueError) as error:  # also those of records and data
        raise SystemExit(f"error: {error}") from error
    if not module.reconstructs:
        raise SystemExit(f"error: {module.method} does not reconstruct anything, so there is nothing to draw.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.to(device)
    chosen = choose(image_scores(options.run / "image_scores.csv"), data.table)
    wanted = parts(options.categories)
    if unknown := [name for name in wanted if name not in chosen]:
        parser.error(f"no anomalous test image of {', '.join(unknown)}; there are: {', '.join(chosen)}.")
    chosen = {name: ids for name, ids in chosen.items() if not wanted or name in wanted}

    work = work_folder(options.run)
    cache = CacheConfig(**yaml.safe_load((options.run / "config.yaml").read_text()).get("cache", {}))
    decoder = train_decoder(module, data, work / "visual_decoder" / "last.ckpt", options.epochs, options.width, cache)
    module, decoder = module.to(device), decoder.to(device)  # the trainer has moved them
    output = options.output or work / "reconstructions.jpg"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(draw(module, data, decoder, chosen))
    print(output)


if __name__ == "__main__":
    main()
