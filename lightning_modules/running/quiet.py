"""Leaves out what libraries print that says nothing to a user of this one."""

from __future__ import annotations

import logging
import warnings

EXPECTED_WARNINGS = (
    ".*LightningCLI's args parameter is intended",  # the environment's arguments stand between the given ones
    ".*LeafSpec.*is deprecated",  # inside Lightning
    ".*Total length of `list` across ranks is zero",  # nothing is held out, so there is no validation
    ".*module.s. in eval mode at the start of training",  # the frozen backbone
    ".*configure_optimizers` returned `None`",  # methods that are fitted in one pass
    ".*does not have many workers",  # cached features need none
    ".*The dirpath has changed from",  # a checkpoint is read by a command that writes none
    "Importing from timm.models.layers is deprecated",  # inside anomalib, as the next
    "The anomalib.models.components.dinov2 package is deprecated",
    "Checkpoint directory .* exists and is not empty",  # that is where an interrupted training goes on
)
EXPECTED_NOTES = (
    "💡 Tip",  # of another product
    "`weights_only` was not set",  # the program's own checkpoints
    "TPU available",
    "`Trainer.fit` stopped: `max_epochs",  # the program counts the epochs
    "Restor",  # the program has said from which checkpoint
    "Loaded model weights",
)


def quiet() -> None:
    """From now on these warnings and notes are not shown."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(EXPECTED_NOTES)
