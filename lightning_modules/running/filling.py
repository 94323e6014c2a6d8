"""What a configuration leaves open is filled: from the environment, from the method's recipe, from the run's moment.

What the environment names (`DATASET`, `DATA_ROOT`, `CATEGORIES`, `BACKBONE`, `WEIGHTS`, `ALPHA`, `RULE`) stands between the
configuration files and the explicit arguments, so that `make`, the local sweep runner and `wandb agent` steer a run in
the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from datamodules.readers import has_own_root, load_readers
from lightning_modules.running import preemption, refusals
from lightning_modules.running.methods import class_at
from results.common import methods
from results.common.environment import parse

_NAME = "UNIRECON_RUN_NAME"
"""The variable that tells the further processes of a run its name."""


def environment_arguments(environment: Mapping[str, str]) -> list[str]:
    """Command-line arguments for what the environment names.

    Datasets of one reader are called after their folders. See `results.common.environment.parse` for the rest.

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
    if named.alpha is not None or named.rule:  # together they replace the configuration's two
        arguments.append(f"--run.alpha={'null' if named.alpha is None else named.alpha}")
        arguments.append(f"--run.rule={named.rule or 'null'}")
    if named.backbone and not named.backbone.startswith("tf_efficientnet_b4."):
        arguments.append("--model.init_args.backbone.padding=default")  # a released padding belongs to its own backbone
    return arguments


def with_environment(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments with those of the environment after the last `--config`, so that explicit ones still win.

    `--method` and `--compare`, the parameters of the sweep `methods`, become what they stand for; see
    `results.common.methods`.

    Raises:
        SystemExit: the variables or those two contradict each other.
    """
    try:
        arguments, shared = methods.expand(arguments, environment)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    position = min(1, len(arguments))
    for index, argument in enumerate(arguments):
        if argument == "--config":
            position = index + 2
        elif argument.startswith("--config="):
            position = index + 1
    return [*arguments[:position], *shared, *environment_arguments(environment), *arguments[position:]]


def fill(config: Any, subcommand: str, started: datetime) -> None:
    """Fills a subcommand's configuration in place: sizes, batches, epochs and clipping by the recipe, and the run's name.

    Args:
        config: As parsed, before anything is made of it.
        subcommand: fit, validate, test or predict.
        started: When the program did, for the name.

    Raises:
        SystemExit: options contradict each other, or what cannot be filled is missing.
    """
    if config.seed_everything is False:
        raise SystemExit("seed_everything is false, but every run has a seed: give a number, or true for a random one.")
    refusals.seed(config.seed_everything)
    refusals.trainer(config.trainer)
    refusals.ckpt_path(config.get("ckpt_path"))
    if subcommand == "predict":
        refusals.predict_root(config.data.init_args.predict_root)
    model = class_at(config.model.class_path)
    recipe = model.recipe
    data, trainer = config.data.init_args, config.trainer
    size = config.model.init_args.image_size
    if data.image_size is not None and data.image_size != size:
        raise SystemExit(
            f"data.init_args.image_size is {data.image_size} but the model's is {size}: set --model.init_args.image_size "
            "only; the data follows it."
        )
    data.image_size = size
    readers = load_readers()
    if data.holdout is None and not any(
        getattr(readers.get(dataset.name), "holdout", 0.0) for dataset in data.datasets or ()
    ):
        data.holdout = 0.0
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
            os.environ[_NAME] = f"{model.method}-{started:%Y%m%d-%H%M%S}-seed{config.seed_everything}"
        config.run.name = agent or os.environ[_NAME]
