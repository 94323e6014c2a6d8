"""What would end a run at its end, or make its numbers another run's, is refused at its start, in one sentence each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from datamodules import UnifiedDataModule
from lightning_modules.base import ReconstructionModule
from lightning_modules.running.settings import RunConfig
from results.common.no_weights import no_weights

PARTS = {
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "limit_test_batches": None,
    "limit_predict_batches": None,
    "barebones": False,
    "use_distributed_sampler": False,
}
"""Options of the trainer under which only a part is trained or scored, with the values that a run may have."""
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
CUTS = ("max_steps", "max_time", "min_steps", "min_epochs")
"""Options of the trainer that end a training otherwise than after its epochs; the record says so."""


def trainer(options: Mapping[str, Any]) -> None:
    """Refuses options of the trainer that no run may have.

    Raises:
        SystemExit: names the option, what was found and what to do.
    """
    for name, whole in PARTS.items():
        value = options.get(name)
        if (
            value is not None
            and value != whole
            and not (name.startswith("limit") and value == 1.0 and isinstance(value, float))
        ):
            raise SystemExit(
                f"error: trainer.{name}={value} trains or scores a part only, and the record would not be of the whole "
                "data. For a short run use fewer categories (CATEGORIES=), PROFILE=demo or fewer --trainer.max_epochs."
            )
    precision = options.get("precision")
    if precision is not None and _ALIASES.get(str(precision), str(precision)) not in PRECISIONS:
        raise SystemExit(
            f"error: trainer.precision={precision} is not supported: scores need float32 around the network. Allowed are "
            f"{', '.join(PRECISIONS)}."
        )
    strategy = options.get("strategy")
    if isinstance(strategy, str) and ("spawn" in strategy or "fork" in strategy or "notebook" in strategy):
        raise SystemExit(
            f"error: trainer.strategy={strategy} starts processes that do not know the run: use ddp for several devices."
        )
    if str(options.get("devices")) in ("0", "[]", ""):
        raise SystemExit(f"error: trainer.devices={options.get('devices')}: a run needs a device, at least 1.")
    accelerator = options.get("accelerator")
    if accelerator == "cpu" and str(options.get("devices")) == "-1":
        raise SystemExit(
            "error: trainer.devices=-1 means every GPU: on a CPU give the number of processes, at least 1."
        )
    if accelerator in ("gpu", "cuda") and not (
        torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())
    ):
        raise SystemExit(
            f"error: trainer.accelerator={accelerator}, but torch finds no GPU on this machine. Use "
            "--trainer.accelerator=auto, or look at what nvidia-smi says."
        )
    for name in ("max_epochs", "max_steps"):
        value = options.get(name)
        if isinstance(value, int) and value < (0 if name == "max_epochs" else -1):
            raise SystemExit(f"error: trainer.{name}={value}: give a number of at least 0.")
    every = options.get("accumulate_grad_batches")
    if isinstance(every, int) and every < 1:
        raise SystemExit(f"error: trainer.accumulate_grad_batches={every}: give a number of batches, at least 1.")


def seed(value: Any) -> None:
    """Raises SystemExit for a seed that a generator does not take."""
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 2**32:
        raise SystemExit(f"error: seed_everything is {value}: give a whole number from 0 to {2**32 - 1}.")


def ckpt_path(value: Any) -> None:
    """Raises SystemExit for a checkpoint that is not a file of this machine."""
    if value is not None and not Path(str(value)).is_file():
        raise SystemExit(
            f"error: --ckpt_path={value} is not a file on this machine. Nothing is fetched from elsewhere: give the path "
            "of a checkpoint, for example results/work/single/RUN/checkpoints/last.ckpt."
        )


def predict_root(value: Any) -> None:
    """Raises SystemExit if there is nothing to predict on."""
    if value in (None, ""):
        raise SystemExit(
            "error: predict needs images: IMAGES=<folder or file> with make, or --data.init_args.predict_root."
        )


def random_features(model: ReconstructionModule, data: UnifiedDataModule) -> None:
    """Refuses to train on someone's own photographs with features that nobody trained, unless they were asked for.

    Raises:
        SystemExit: `auto` came to random weights, and a dataset is read by `folder`.
    """
    config = getattr(model.extractor, "config", None)
    if (
        getattr(config, "weights", None) == "auto"
        and model.extractor.provenance["weights"] == "random"
        and any(dataset.name == "folder" for dataset in data.datasets)
    ):
        raise SystemExit(f"error: {no_weights(config.name)}")


def tiles(model: ReconstructionModule, data: UnifiedDataModule) -> None:
    """Raises SystemExit if photographs are cut into tiles for a method that needs whole ones."""
    if data.tiles is not None and model.untiled:
        raise SystemExit(
            f"error: data.init_args.tiles does not go with {model.method}: {model.untiled}. Leave the tiles out, or take "
            "another method."
        )


def place(run: RunConfig, needed: int) -> None:
    """Checks at the start that the record and the checkpoints can be written at the end.

    Args:
        run: The run.
        needed: Bytes that it will take in its folder.

    Raises:
        SystemExit: a folder cannot be made or written, or the disk is too full.
    """
    for folder in (run.work, run.record.parent):
        try:
            made = _make(folder)
            probe = folder / f".writable.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            for new in made if folder != run.work else ():  # an unfinished run leaves no folder of records
                new.rmdir()
        except OSError as error:
            raise SystemExit(
                f"error: {folder} cannot be written ({error.strerror}): the run could not leave its record. Free it, or "
                "give another folder (--run.results)."
            ) from error
    room(run.work, needed, "checkpoints")


def room(folder: Path, needed: int, what: str) -> None:
    """Raises SystemExit if the disk of an existing folder has less than the bytes that `what` will take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"error: the disk of {folder} has {free / 2**20:,.0f} MiB free, but this run needs about "
            f"{needed / 2**20:,.0f} MiB for its {what}: free some, or give another folder (--run.results)."
        )


def _make(folder: Path) -> list[Path]:
    """Makes a folder; those that were missing, the lowest first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def notes(options: Mapping[str, Any], batches: int | None, epochs: int) -> list[str]:
    """What the record says of a training that was cut, or did not happen.

    Args:
        options: Of the trainer.
        batches: Training batches in all; None if that is not known.
        epochs: Epochs that were trained, the last one perhaps in part.
    """
    out = []
    if batches == 0 or (batches is None and epochs == 0):
        out.append(
            "NOTHING WAS TRAINED: the network is as it was initialised, and the numbers say nothing about the method"
        )
    cuts = [f"{name}={options[name]}" for name in CUTS if options.get(name) not in (None, -1)]
    if cuts:
        out.append(f"the length of the training was set by {', '.join(cuts)}: it ended in epoch {epochs}")
    return out
