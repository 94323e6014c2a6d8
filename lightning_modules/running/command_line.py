"""The command line: ``python -m lightning_modules fit|validate|test|predict``.

``fit`` trains, scores the test set with the last epoch's weights and leaves a run record. What a configuration leaves
open is filled from the method's recipe; what the environment names (``DATASET``, ``DATA_ROOT``, ``CATEGORIES``,
``BACKBONE``, ``WEIGHTS``) stands between the configuration files and the explicit arguments, so that ``make``, the local
sweep runner and ``wandb agent`` steer a run in the same way.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import datamodules
import lightning_modules
from datamodules.errors import DataError
from datamodules.problems import number_of
from datamodules.readers import has_own_root
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks import normal_scores
from lightning_modules.callbacks.compile import Compile
from lightning_modules.callbacks.curve import EvaluationCurve
from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.callbacks.history import History
from lightning_modules.callbacks.normal_scores import NormalScores
from lightning_modules.callbacks.predictions import Predictions
from lightning_modules.callbacks.progress import PlainProgress, Progress
from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.pictures import heatmaps
from lightning_modules.running import (
    checkpoints,
    foreign,
    normalisation,
    per_category,
    preemption,
    refusals,
    resuming,
    tracking,
    trouble,
)
from lightning_modules.running.checkpoints import WholeCheckpoints
from lightning_modules.running.parser import PlainParser
from lightning_modules.running.quiet import quiet
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.running.settings import RunConfig, provenance, sweep_parameters
from results.aggregator.records import RunRecord, StoredRecord, read_record, write_record
from results.common.environment import parse

_NAME = "UNIRECON_RUN_NAME"
"""The variable that tells the further processes of a run its name."""
NOTHING_TO_MEASURE = (
    "No test image, so nothing is measured; normal images are scored instead, for predict to compare with."
)
COLOUR_SCALE = "colour_scale.json"
"""In a record: the ends of the colour scale of the run's heat maps, for ``predict``."""


def import_methods() -> dict[str, type[ReconstructionModule]]:
    """All methods by name: every subclass of :class:`ReconstructionModule` found in this package's files."""
    found = {}
    for info in pkgutil.iter_modules(lightning_modules.__path__):
        if info.ispkg or info.name == "__main__":
            continue
        module = importlib.import_module(f"lightning_modules.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, ReconstructionModule) and "method" in vars(value):
                found[value.method] = value
    return found


def environment_arguments(environment: Mapping[str, str]) -> list[str]:
    """Command-line arguments for what the environment names.

    Datasets of one reader are called after their folders. See :func:`results.common.environment.parse` for the rest.

    Raises:
        SystemExit: the variables contradict each other.
    """
    try:
        named = parse(environment, has_own_root)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    arguments = []
    if named.datasets:
        # Every key is written: what is left out would be taken over from the configuration files.
        datasets = [asdict(dataset) for dataset in named.datasets]
        arguments.append(f"--data.init_args.datasets={json.dumps(datasets)}")
    for value, key in ((named.backbone, "name"), (named.weights, "weights")):
        if value:
            arguments.append(f"--model.init_args.backbone.{key}={value}")
    if named.backbone and not named.backbone.startswith("tf_efficientnet_b4."):
        arguments.append("--model.init_args.backbone.padding=default")  # a released padding belongs to its own backbone
    return arguments


def with_environment(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments with those of the environment after the last ``--config``, so that explicit ones still win."""
    position = min(1, len(arguments))
    for index, argument in enumerate(arguments):
        if argument == "--config":
            position = index + 2
        elif argument.startswith("--config="):
            position = index + 1
    return [*arguments[:position], *environment_arguments(environment), *arguments[position:]]


class UniReconCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data, with recipes, run folders and records."""

    def __init__(self, args: list[str]) -> None:
        self.started = datetime.now().astimezone()
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

    # ---- filling in --------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.seed_everything is False:
            raise SystemExit(
                "seed_everything is false, but every run has a seed: give a number, or true for a random one."
            )
        refusals.seed(config.seed_everything)
        refusals.trainer(config.trainer)
        refusals.ckpt_path(config.get("ckpt_path"))
        if self.subcommand == "predict":
            refusals.predict_root(config.data.init_args.predict_root)
        model = _class(config.model.class_path)
        recipe = model.recipe
        data, trainer = config.data.init_args, config.trainer
        size = config.model.init_args.image_size
        if data.image_size is not None and data.image_size != size:
            raise SystemExit(
                f"data.init_args.image_size is {data.image_size} but the model's is {size}: set --model.init_args.image_size "
                "only; the data follows it."
            )
        data.image_size = size
        for name in ("resize", "batch_size", "drop_last", "repeat"):
            if data.get(name) is None:
                data[name] = getattr(recipe, name)
        released = config.run.protocol == "as_released"
        if data.test_subset is None:
            data.test_subset = recipe.released_subset if released else "full"
        if data.test_subset != "full" and not released:
            raise SystemExit(
                f"data.init_args.test_subset={data.test_subset} leaves test images out: it needs run.protocol=as_released."
            )
        if not data.datasets:
            raise SystemExit("No dataset is named: set DATASET and DATA_ROOT, or --data.init_args.datasets.")
        if trainer.max_epochs is None and trainer.max_steps == -1:
            trainer.max_steps = recipe.max_steps
        for name in ("max_epochs", "gradient_clip_val"):
            if trainer.get(name) is None:
                trainer[name] = getattr(recipe, name)
        data.seed = config.seed_everything
        if config.run.name is None:
            # A cell that W&B hands out again after a pre-emption keeps its run id, and so finds its checkpoint.
            agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
            if preemption.is_first():  # the further processes start later, and take the name over
                os.environ[_NAME] = f"{model.method}-{self.started:%Y%m%d-%H%M%S}-seed{config.seed_everything}"
            config.run.name = agent or os.environ[_NAME]

    def instantiate_classes(self) -> None:
        """Refuses what a constructor refuses with its own words, not with a trace of the parser's."""
        if self.config[self.subcommand].data.init_args.setting == "per_category":
            per_category.split(self.subcommand, self.config[self.subcommand])
        try:
            super().instantiate_classes()
        except ValueError as error:
            # Some constructors are called by the parser, which wraps their words in its own.
            reasons = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
            reasons = [reason for reason in reasons if not reason.startswith("Expected a <class 'NoneType'>")]
            raise SystemExit("\n".join(reasons) or str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.run_config: RunConfig = self._get(self.config_init, "run")
        normalisation.follow_weights(self.model, self.datamodule, self.config[self.subcommand].data.init_args)
        try:
            self.model.set_protocol(self.run_config.protocol, self.run_config.selects)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if self.subcommand in ("fit", "test") and self.run_config.record.exists() and not self.run_config.overwrite:
            per_category.leave_finished(self.run_config, self._configuration())
        if self.subcommand == "fit":
            resuming.claim(self.run_config)
        given = self._get(self.config_init, "trainer")
        self.evaluation, self.normal_scores, self.history, self.curve = Evaluation(), NormalScores(), History(), None
        seed = EpochSeed(self.config[self.subcommand].seed_everything)
        own = [seed, self.normal_scores, self.evaluation, self.history, *self._callbacks()]
        more = given.get("callbacks") or []
        callbacks = [*(more if isinstance(more, list) else [more]), *own]
        if given.get("logger") is None:
            kwargs["logger"] = self._wandb_logger()
        if given.get("plugins") is None:
            slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
            kwargs["plugins"] = [WholeCheckpoints(), *slurm]
        if self.subcommand == "fit":
            refusals.place(self.run_config, self._bytes_needed())
        trainer = super().instantiate_trainer(callbacks=callbacks, default_root_dir=str(self.run_config.work), **kwargs)
        if trainer.world_size > 1:
            preemption.stop_all_with_the_first(trainer)
        return trainer

    def _bytes_needed(self) -> int:
        """Bytes of three checkpoints, each of the trained parameters and two moments of each."""
        return 3 * 3 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _callbacks(self) -> list[L.Callback]:
        run, model = self.run_config, self.model
        callbacks: list[L.Callback] = [RichProgressBar(leave=False) if sys.stdout.isatty() else PlainProgress()]
        if self.subcommand == "predict":
            scale = _colour_scale(run.record / COLOUR_SCALE)
            self.predictions = Predictions(run.work / "predictions", scale, normal_scores.read(run.record))
            return [*callbacks, self.predictions]
        if self.subcommand != "fit":
            return callbacks
        epochs = self._get(self.config_init, "trainer")["max_epochs"]
        every, select = run.curve_every, None
        if run.selects == "best_on_test" and model.recipe.best_on_test is None:
            raise SystemExit(
                f"{model.method}'s recipe names no selection on the test set. For as_released with the last epoch give "
                "--run.selection=last."
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
        return [*callbacks, Progress(run.work / "progress.json", self.history), checkpoint]

    def _wandb_logger(self) -> Any:
        from lightning.pytorch.loggers import WandbLogger

        run = self.run_config
        run.work.mkdir(parents=True, exist_ok=True)
        tracking.announce(run)
        logger = WandbLogger(**tracking.settings(run, self._configuration()), save_dir=str(run.work))
        # Lightning always passes this setting, and W&B warns of its end in every run.
        vars(logger).get("_wandb_init", {}).pop("anonymous", None)
        return logger

    def _configuration(self) -> dict[str, Any]:
        return json.loads(self._parser(self.subcommand).dump(self.config[self.subcommand], format="json"))

    def _parse_ckpt_path(self) -> None:
        """A checkpoint gives weights; options that one may hold are not taken over."""

    # ---- running -----------------------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        with contextlib.nullcontext() if subcommand == "fit" else preemption.at_once():
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
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
        if not self.datamodule.has_test_images:
            if self.run_config.selects == "best_on_test":
                raise DataError("No test image: run.protocol=as_released chooses its epoch on the test set. Use clean.")
            rank_zero_info(NOTHING_TO_MEASURE)
        if self.trainer.max_steps > 0:  # whatever counts epochs must know the last one
            loader = self.datamodule.train_dataloader()
            self.trainer.fit_loop.max_epochs = min(
                self.trainer.max_epochs, -(-self.trainer.max_steps // max(1, len(loader)))
            )
        left = self.run_config.work / "checkpoints" / "last.ckpt"
        resuming.check(self.run_config, self._configuration(), self.datamodule.fingerprint, left)
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
        cache = self._get(self.config_init, "cache")
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

    def after_predict(self) -> None:
        if failed := self.predictions.failed:
            shown = [f"  {line}" for line in failed[:20]] + [f"  and {len(failed) - 20} more"] * (len(failed) > 20)
            what = (
                f"{number_of(len(failed), 'image')} could not be read and has no score (reasons stand in scores.csv):"
            )
            raise SystemExit("\n".join([f"error: {what}", *shown]))

    def after_test(self) -> None:
        trainer = self.trainer
        if not trainer.is_global_zero:
            return
        attachments: dict[str, bytes | str] = {
            "image_scores.csv": self.evaluation.image_scores.to_csv(index=False),
            normal_scores.FILE: self.normal_scores.table.to_csv(index=False),
            COLOUR_SCALE: json.dumps(self.evaluation.colour_scale),
        }
        if self.run_config.heatmaps and self.model.has_map:
            self.model.eval().to(self.trainer.strategy.root_device)  # the trainer has moved it off the device
            scores = self.evaluation.image_scores
            attachments |= heatmaps.draw(self.model, self.datamodule, heatmaps.choose(scores), scores)
        config = self.config[self.subcommand]
        config.pop("verbose", None)  # an option of `test` that `predict` does not have
        config.run.overwrite = False  # whoever starts from the record's configuration shall not replace the record
        depths = set(self.datamodule.bit_depths.values())
        if len(depths) == 1:  # as inferred from the training images, for those of `predict`
            config.data.init_args.bit_depth = depths.pop()
        config_text = self._parser(self.subcommand).dump(config, skip_none=False)
        before = self._scored_before()
        path = write_record(
            Path(self.run_config.results) / "runs",
            self.record(before),
            self.evaluation.result.table,
            self.history.table() if before is None else before.history,
            config_text,
            attachments=attachments,
            overwrite=self.run_config.overwrite,
        )
        if self.subcommand == "fit":
            checkpoints.note_recorded(self.run_config.work / "checkpoints" / "last.ckpt")
        if trainer.logger is not None:
            tracking.log_record(path, self.evaluation.result.table, self.run_config.upload)
        rank_zero_info(f"Run record: {path}")

    def _scored_before(self) -> StoredRecord | None:
        """The record of the training whose weights ``test`` scores again, which keeps how they came about."""
        record = self.run_config.record
        return read_record(record) if self.subcommand == "test" and record.exists() else None

    def record(self, before: StoredRecord | None) -> RunRecord:
        """What this run was, for its record; ``before`` is that of the training whose weights were scored again."""
        model, data, trainer = self.model, self.datamodule, self.trainer
        backbone = model.extractor.provenance
        notes = [f"{key}: {note}" for key, note in (("backbone", backbone.get("note")),) if note]
        notes += normalisation.notes(model, data) + ([model.origin] if model.origin else []) + model.record_notes()
        notes += data.remarks()
        if before is None:
            options = self.config[self.subcommand].trainer
            notes += refusals.notes(options, self.history.batches_seen, model.trained_epochs)
            notes += self.datamodule.changed_since(self.started.timestamp())
        if model.standardisation is not None:
            notes.append("feature channels standardised over the training images")
        if not data.has_test_images:
            notes.append(NOTHING_TO_MEASURE)
        if data.left_out:
            notes.append(f"test_subset {data.test_subset}: {len(data.left_out)} test images are not evaluated")
        if self.curve is not None and self.curve.best is not None:
            metric, epoch = self.curve.select, self.curve.best[1]
            notes.append(f"weights of epoch index {epoch}, chosen on the test set by {metric}")
        device = trainer.strategy.root_device
        started = provenance(device) | {
            "started": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round((datetime.now().astimezone() - self.started).total_seconds(), 1),
            "epochs": model.trained_epochs,
            "seconds_per_epoch": round(getattr(self, "training_seconds", 0.0) / max(1, self.history.epochs_seen), 3),
            "peak_memory_bytes": _peak_memory(device),
            "world_size": trainer.world_size,
            "effective_batch_size": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
        }
        if before is not None:
            started = before.record.provenance | {"scored_again": started}
        return RunRecord(
            run=self.run_config.name,
            sweep=self.run_config.sweep,
            cell=sweep_parameters(),
            method=model.method,
            profile=os.environ.get("PROFILE") or "custom",
            protocol=self.run_config.protocol,
            setting=data.setting,
            seed=self.config[self.subcommand].seed_everything,
            image_size=model.image_size,
            resize=data.resize,
            backbone=backbone,
            datasets=data.provenance(),
            metrics={"version": self.evaluation.result.version, "definitions": self.evaluation.result.definitions},
            parameters={"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)},
            provenance=started,
            notes=notes,
        )


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _colour_scale(file: Path) -> tuple[float, float] | None:
    """Ends of the colour scale that the run's test set gave; None if the run has no record."""
    return tuple(json.loads(file.read_text())) if file.is_file() else None


def _peak_memory(device: torch.device) -> int:
    """Largest memory use so far in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
            else:
                _run(with_environment(foreign.as_data(arguments, methods), os.environ))
    except Exception as error:
        if debug:
            raise
        raise SystemExit(trouble.sentence(error)) from error
    finally:
        foreign.clean_up()


def _run(arguments: list[str]) -> None:
    try:
        UniReconCLI(arguments)
    except per_category.OneModelEach as split:
        split.run(lambda more: UniReconCLI([*arguments, *more]))
    except SIGTERMException:
        raise preemption.Preempted from None
