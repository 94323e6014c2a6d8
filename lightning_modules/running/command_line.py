"""The command line: `python -m lightning_modules fit|validate|test|predict`.

`fit` trains, scores the test set with the last epoch's weights and leaves a run record (`.recording`). What a
configuration leaves open is filled (`.filling`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from datetime import datetime
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import datamodules
from datamodules.errors import DataError
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.compile import Compile
from lightning_modules.callbacks.curve import EvaluationCurve
from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.callbacks.history import History
from lightning_modules.callbacks.kept_epochs import KeptEpochs
from lightning_modules.callbacks.normal_scores import NormalScores
from lightning_modules.callbacks.progress import PlainProgress, Progress
from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.running import (
    checkpoints,
    decisions,
    folds,
    internals,
    normalisation,
    per_category,
    preemption,
    recorded_configuration,
    recording,
    refusals,
    resuming,
    tracking,
)
from lightning_modules.running.checkpoints import WholeCheckpoints
from lightning_modules.running.filling import fill, with_environment
from lightning_modules.running.methods import import_methods
from lightning_modules.running.parser import PlainParser
from lightning_modules.running.quiet import quiet
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.running.settings import RunConfig
from results.common import trouble


class UniReconCLI(internals.OpenCLI):
    """LightningCLI in subclass mode for model and data, with recipes, run folders and records."""

    def __init__(self, args: list[str]) -> None:
        self.started = datetime.now().astimezone()
        self.only = next(iter(args), None)
        super().__init__(
            ReconstructionModule,
            datamodules.UnifiedDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=PlainParser,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,  # the data module deals its samples to processes itself
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stdout.isatty(),
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: PlainParser) -> None:
        parser.add_class_arguments(RunConfig, "run")
        parser.add_class_arguments(CacheConfig, "cache")

    # ---- making -------------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        fill(self.config[self.subcommand], self.subcommand, self.started)

    def instantiate_classes(self) -> None:
        """Refuses what a constructor refuses with its own words, not with a trace of the parser's."""
        if self.config[self.subcommand].data.init_args.setting == "per_category":
            per_category.split(self.subcommand, self.config[self.subcommand])
        try:
            self._leave_finished()  # before anything is built, which takes seconds
            folds.split(self.subcommand, self.config[self.subcommand])
            super().instantiate_classes()
        except ValueError as error:
            # Some constructors are called by the parser, which wraps their words in its own.
            found = re.findall(r"^( *)- (.*(?:\n\1 {4}.*)*)", str(error), re.MULTILINE)
            noise = ("Expected a <class 'NoneType'>", "Does not validate against any of")
            reasons = [reason for _, reason in found if not reason.startswith(noise)]
            raise SystemExit("\n".join(reasons) or str(error)) from error

    def _leave_finished(self) -> None:
        """Refuses to train a run that has its record already; `test` scores it again and leaves the record as it is."""
        run = RunConfig(**self.config[self.subcommand].run.as_dict())
        finished = self.subcommand in ("fit", "test") and not run.overwrite and run.finished()
        self.checks_record = finished and self.subcommand == "test" and not tracking.handed_out(run)
        if finished and not self.checks_record:
            per_category.leave_finished(run, self._configuration())

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.run_config: RunConfig = self.made("run")
        normalisation.follow_weights(self.model, self.datamodule, self.config[self.subcommand].data.init_args)
        refusals.tiles(self.model, self.datamodule)
        try:
            self.model.set_protocol(self.run_config.protocol, self.run_config.selects)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if self.subcommand == "fit":
            refusals.random_features(self.model, self.datamodule)
            refusals.place(self.run_config, self._bytes_needed())
            resuming.claim(self.run_config)
            self._leave_finished()  # another process may have finished the run while this one waited for it
        given = self.made("trainer")
        self.normal_scores, self.history = NormalScores(), History()
        self.evaluation = Evaluation(self.run_config.fpr_limits, self.normal_scores)
        self.curve: EvaluationCurve | None = None
        seed = EpochSeed(self.config[self.subcommand].seed_everything)
        self.throughput = Throughput()
        own = [seed, self.normal_scores, self.evaluation, self.throughput, self.history, *self._callbacks()]
        more = given.get("callbacks") or []
        callbacks = [*(more if isinstance(more, list) else [more]), *own]
        if given.get("logger") is None:
            kwargs["logger"] = False if self.checks_record else self._wandb_logger()
        if given.get("plugins") is None:
            slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
            kwargs["plugins"] = [WholeCheckpoints(), *slurm]
        trainer = super().instantiate_trainer(callbacks=callbacks, default_root_dir=str(self.run_config.work), **kwargs)
        if trainer.world_size > 1:
            internals.stop_with_the_first(trainer)
        return trainer

    def _bytes_needed(self) -> int:
        """Bytes of three checkpoints, each of the trained parameters and two moments of each."""
        return 3 * 3 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _callbacks(self) -> list[L.Callback]:
        run, model = self.run_config, self.model
        callbacks: list[L.Callback] = [RichProgressBar(leave=False) if sys.stdout.isatty() else PlainProgress()]
        if self.subcommand != "fit":
            return callbacks
        epochs = self.made("trainer")["max_epochs"]
        every, select = run.curve_every, None
        if run.selects == "best_on_test" and model.recipe.best_on_test is None:
            raise SystemExit(
                f"{model.method} has no protocol as_released by itself; its recipe names no selection on the test set. For the "
                "released behaviour with the last epoch give --run.selection=last."
            )
        if run.selects == "best_on_test":
            select, released_every = model.recipe.best_on_test
            every = every or released_every
        if every:
            self.curve = EvaluationCurve(self.history, every, select, model.recipe.best_on_test_tie)
            callbacks.append(self.curve)
        checkpoint = ModelCheckpoint(
            run.work / "checkpoints",
            filename="last",
            every_n_epochs=max(1, epochs // 100),
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        if run.keep_epochs:
            callbacks.append(KeptEpochs(run.work / "checkpoints", run.keep_epochs))
        return [*callbacks, Progress(run.work / "progress.json", self.history), checkpoint]

    def _wandb_logger(self) -> Any:
        from lightning.pytorch.loggers import WandbLogger

        run = self.run_config
        run.work.mkdir(parents=True, exist_ok=True)
        tracking.announce(run)
        logger = WandbLogger(**tracking.settings(run, self._configuration()), save_dir=str(run.work))
        internals.without_anonymous(logger)
        return logger

    def _configuration(self) -> dict[str, Any]:
        return json.loads(self.dump(self.config[self.subcommand], format="json", skip_none=True))

    # ---- running -----------------------------------------------------------------------------------------------------

    def run_subcommand(self, subcommand: str) -> None:
        with contextlib.nullcontext() if subcommand == "fit" else preemption.at_once():
            super().run_subcommand(subcommand)

    def subcommand_options(self, subcommand: str) -> dict[str, Any]:
        kwargs = super().subcommand_options(subcommand)
        if kwargs.get("ckpt_path") is None:
            last = self.run_config.work / "checkpoints" / "last.ckpt"
            if whole := checkpoints.newest_whole(last):
                rank_zero_info(f"Going on from {whole}" if subcommand == "fit" else f"Weights from {whole}")
                kwargs["ckpt_path"] = str(whole)
            elif subcommand != "fit":
                raise SystemExit(
                    f"{subcommand} needs trained weights: give --ckpt_path, or the configuration of a trained run "
                    f"(there is no {last})."
                )
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        kwargs["weights_only"] = True
        return kwargs

    def before_validate(self) -> None:
        if not self.datamodule.holdout and not self._validation_images():
            raise SystemExit(
                "No normal image is held out, so there is nothing to validate on: set --data.init_args.holdout, for "
                "example to 0.1, as in the training."
            )
        self._serve_features(build=False)

    def before_test(self) -> None:
        self._serve_features(build=False)

    def before_fit(self) -> None:
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        backbone = self.model.extractor.provenance
        size = f"{trainable:,} trainable parameters" if trainable else "a network that the training data will size"
        rank_zero_info(f"{self.model.method}: {size} on {backbone['name']} ({backbone['weights']} weights)")
        self.datamodule.setup("fit")
        decisions.check(self.datamodule.table, self.run_config)
        folds.check_data(self.run_config, self.datamodule.fingerprints)
        rank_zero_info(normalisation.described(self.model, self.datamodule))
        if not self.datamodule.has_test_images:
            if self.run_config.selects == "best_on_test":
                raise DataError("No test image: run.protocol=as_released chooses its epoch on the test set. Use clean.")
            rank_zero_info(recording.NOTHING_TO_MEASURE)
        if self.trainer.max_steps > 0:  # whatever counts epochs must know the last one
            loader = self.datamodule.train_dataloader()
            self.trainer.fit_loop.max_epochs = min(
                self.trainer.max_epochs, -(-self.trainer.max_steps // max(1, len(loader)))
            )
        left = self.run_config.work / "checkpoints" / "last.ckpt"
        packages = self.model.needs_packages
        resuming.check(self.run_config, self._configuration(), self.datamodule.fingerprint, left, packages)
        self._serve_features(build=True)
        for remark in self.datamodule.remarks():
            rank_zero_info(f"Note: {remark}")
        if self.run_config.compile:
            if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
                raise SystemExit(
                    "run.compile needs a C++ compiler (g++ or clang++), and none is on this machine's PATH."
                )
            device = self.trainer.strategy.root_device
            if self.run_config.cuda_graphs and device.type != "cuda":
                raise SystemExit(
                    f"run.cuda_graphs needs an NVIDIA GPU, but this run is on {device.type}: leave it out."
                )
            self.trainer.callbacks.append(Compile("reduce-overhead" if self.run_config.cuda_graphs else None))
        self._training_started = time.perf_counter()

    def _serve_features(self, build: bool) -> None:
        cache = self.made("cache")
        attach(self.model, self.datamodule, cache, self.trainer.strategy.root_device, build)

    def _validation_images(self) -> int:
        self.datamodule.setup("validate")
        return int((self.datamodule.table["split"] == "val").sum())

    def after_fit(self) -> None:
        self.training_seconds = time.perf_counter() - self._training_started
        self.trainer.save_checkpoint(self.run_config.work / "checkpoints" / "last.ckpt")
        with preemption.at_once():
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        self.after_test()

    def after_test(self) -> None:
        if not self.trainer.is_global_zero:
            return
        if self.checks_record:
            rank_zero_info(recording.compared(self.run_config.record, self.evaluation.result.table))
            return
        outcome = recording.Outcome(
            self.run_config, self.subcommand, self.config[self.subcommand], self.model, self.datamodule, self.trainer,
            self.evaluation, self.normal_scores, self.history, self.curve, self.started,
            getattr(self, "training_seconds", 0.0), self.throughput.images_per_second,
        )  # fmt: skip
        recording.write(outcome, self.dump)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; leaves with 143 after SIGTERM, so that a pre-empted run is not taken for a finished one."""
    arguments, debug = trouble.debugging(sys.argv[1:] if arguments is None else arguments)
    quiet()
    online = os.environ.get("WANDB") == "online" or "WANDB_SWEEP_ID" in os.environ
    os.environ.setdefault("WANDB_MODE", "online" if online else "offline")
    if os.environ["WANDB_MODE"] == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")
    torch.backends.cudnn.allow_tf32 = False  # features in full float32, as the papers' GPUs computed them
    methods = import_methods().values()
    try:
        with preemption.reported():
            if arguments[:1] == ["import"]:
                from lightning_modules.running.importing import main as import_checkpoint

                import_checkpoint(arguments[1:])
            elif arguments[:1] == ["submission"]:
                from lightning_modules.running.submission import main as submit

                submit(arguments[1:], methods)
            elif arguments[:1] == ["predict"]:
                from lightning_modules.prediction.command import main as predict

                predict(arguments[1:], methods)
            else:
                _run(with_environment(recorded_configuration.as_data(arguments, methods), os.environ))
    except Exception as error:
        if debug:
            raise
        raise SystemExit(trouble.sentence(error)) from error
    finally:
        recorded_configuration.clean_up()


def _run(arguments: list[str]) -> None:
    try:
        UniReconCLI(arguments)
    except (per_category.OneModelEach, folds.FoldsFirst) as split:
        split.run(lambda more: _run([*arguments, *more]))
    except SIGTERMException:
        raise preemption.Preempted from None
