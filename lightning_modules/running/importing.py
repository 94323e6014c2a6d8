"""`python -m lightning_modules import`: a run record whose weights are an authors' checkpoint.

The checkpoint is read as tensors only, put into the method's network under the names of its own file in `models/`, saved
as a run's checkpoint, and scored on the test set as `test` does. Afterwards `test` and `predict` work on the record
as on any other. A backbone inside the checkpoint is used as it is there.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_modules.running.command_line import UniReconCLI
from lightning_modules.running.filling import with_environment
from lightning_modules.running.methods import class_at
from models.released import load_released
from models.weight_files import file_sha256, read_state_dict

SWEEP = "imported"


class ImportCLI(UniReconCLI):
    """`test`, after the authors' weights were put where the run's checkpoint belongs."""

    def __init__(self, args: list[str], state: dict[str, Tensor], origin: str) -> None:
        self.state, self.origin = state, origin
        super().__init__(args)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except SystemExit as refusal:
            if "setting per_category" not in str(refusal):
                raise
            raise SystemExit(
                "The authors trained one model per category, and a checkpoint holds one of them: name its category "
                "(CATEGORIES=bottle)."
            ) from refusal

    def before_test(self) -> None:
        model, data = self.model, self.datamodule
        data.setup("test")
        model.prepare_import(self.state, data.categories)
        try:
            imported = load_released(model.network, self.state)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        rank_zero_info(str(imported))
        model.origin = self.origin
        self._save()
        super().before_test()

    def after_test(self) -> None:
        self._save()  # with what the method has estimated from the training images before it could score
        super().after_test()

    def _save(self) -> None:
        model = self.model
        checkpoint: dict[str, Any] = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": L.__version__,
            "state_dict": model.state_dict(),
        }
        model.on_save_checkpoint(checkpoint)
        self.trainer.strategy.checkpoint_io.save_checkpoint(
            checkpoint, self.run_config.work / "checkpoints" / "last.ckpt"
        )


def backbone_part(state: dict[str, Tensor], marker: str) -> dict[str, Tensor]:
    """The tensors of the backbone in a checkpoint, without what stands before `marker` and without it."""
    found = {}
    for name, value in state.items():
        before, here, rest = name.partition(marker)
        if here and (not before or before.endswith(".")):
            found[rest] = value
    return found


def main(arguments: list[str]) -> None:
    """Parses the command's own options; everything else is an option of `test`."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules import", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--method", required=True, help="a method with an importer, for example uniad")
    parser.add_argument("--checkpoint", required=True, help="the authors' file")
    parser.add_argument("--config", help="by default the method's paper profile")
    options, more = parser.parse_known_args(arguments)
    profile = os.environ.get("PROFILE") or "paper"
    config = Path(options.config or f"sweeps/profiles/{profile}/{options.method}.yaml")
    if not config.is_file():
        raise SystemExit(f"There is no {config}: --method names a profile, for example uniad, hvq_trans or destseg.")
    network_file = _network_file(config)
    if not hasattr(network_file, "released_name"):
        raise SystemExit(
            f"{network_file.__name__} has no function `released_name`: no checkpoint of {options.method} can be imported."
        )
    checkpoint = Path(options.checkpoint)
    try:
        state = read_state_dict(checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    digest = file_sha256(checkpoint)
    named = next((a.partition("=")[2] for a in more if a.startswith("--run.name=")), f"{options.method}-{digest[:12]}")
    written = (yaml.safe_load(config.read_text()).get("run") or {}).get("results", "results")
    results = next((a.partition("=")[2] for a in more if a.startswith("--run.results=")), written)
    work = Path(results) / "work" / SWEEP / named
    own = [f"--run.name={named}", f"--run.sweep={SWEEP}"]
    marker = getattr(network_file, "RELEASED_BACKBONE", None)
    if marker and (part := backbone_part(state, marker)):
        work.mkdir(parents=True, exist_ok=True)
        torch.save(part, work / "backbone.pth")
        own.append(f"--model.init_args.backbone.weights={work / 'backbone.pth'}")
    arguments = with_environment(["test", f"--config={config}", *more], os.environ)
    # After the environment's arguments, whose WEIGHTS a backbone inside the checkpoint replaces; the user's come last.
    position = len(arguments) - len(more)
    ImportCLI(
        [*arguments[:position], *own, *arguments[position:]],
        state,
        f"weights imported from the authors' checkpoint {checkpoint.name} (sha256 {digest[:12]}), not trained here",
    )


def _network_file(config: Path) -> Any:
    """The file in `models/` that has the network, and the authors' names, of a configuration's method."""
    path = yaml.safe_load(config.read_text())["model"]["class_path"]
    return importlib.import_module(f"models.{class_at(path).method}")
