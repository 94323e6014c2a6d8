"""What is touched inside libraries because they offer no other way; each place has a test that fails when it moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import lightning as L
import torch
from jsonargparse import __version__, _typehints
from lightning.pytorch.cli import LightningCLI

_SKIP_NONE = "skip_unset" if tuple(map(int, __version__.split(".")[:2])) >= (4, 49) else "skip_none"
"""What jsonargparse calls the option that leaves out what is None."""


class OpenCLI(LightningCLI):
    """Lightning's command line with names for the steps between parsing and running, which a subclass may override."""

    only: str | None = None
    """The subcommand that is given: its parser alone is built, which saves three quarters of the time."""

    def subcommands(self) -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if self.only not in every or name == self.only}

    def made(self, key: str) -> Any:
        """What was made of a part of the configuration: an object, or the part itself if it names no class."""
        return self._get(self.config_init, key)

    def dump(self, config: Any, format: str = "parser_mode", skip_none: bool = False) -> str:
        """A configuration of this subcommand as text."""
        return self._parser(self.subcommand).dump(config, format=format, **{_SKIP_NONE: skip_none})

    def instantiate(self, part: Any) -> Any:
        """The objects that a part of this subcommand's configuration names."""
        return self._parser(self.subcommand).instantiate_classes(part)

    def run_subcommand(self, subcommand: str) -> None:
        """Runs it, with the hooks before and after."""
        super()._run_subcommand(subcommand)

    def subcommand_options(self, subcommand: str) -> dict[str, Any]:
        """Arguments of the trainer's method."""
        return super()._prepare_subcommand_kwargs(subcommand)

    def _dump_config(self) -> None:
        """Lightning would write out the whole configuration for `save_hyperparameters`, which nothing here calls: records hold
        the configuration."""
        self.config_dump: dict[str, Any] = {}

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.subcommand_options(subcommand)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint gives weights; options that one may hold are not taken over."""


def parser_options(parser: Any) -> Iterator[str]:
    """Names of all options, without dashes, of a parser and of its subcommands."""
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings if option.startswith("--"))
    for choice in getattr(parser._subcommands_action, "choices", None) or ():
        yield from parser_options(parser._subcommands_action.choices[choice])


def keep_class_parsers() -> None:
    """Lets the parser of a class's arguments be made once per process, as jsonargparse does from some version on.

    Older ones (anomalib needs one) make some ninety of them anew for one command line of ours, which is three quarters of the
    time that reading it takes.
    """
    if hasattr(_typehints, "cached_get_class_parser"):
        return
    make = _typehints.ActionTypeHint.get_class_parser
    kept: dict[tuple[Any, ...], Any] = {}

    def get(of: Any, sub_add_kwargs: Any = None, skip_args: Any = None) -> Any:
        if _typehints.nested_links.get():  # for one instantiation
            return make(of, sub_add_kwargs, skip_args)
        if isinstance(of, str):
            of = _typehints.import_object(of)
        around = _typehints.parent_parser.get()
        key = (of, type(around), around.parser_mode, _frozen(sub_add_kwargs or {}), _frozen(skip_args or ()))
        if key not in kept:
            kept[key] = make(of, sub_add_kwargs, skip_args)
        kept[key].logger = around.logger
        return kept[key]

    _typehints.ActionTypeHint.get_class_parser = staticmethod(get)


def _frozen(options: Any) -> Any:
    """Nested mappings and collections as something that can be a key."""
    if isinstance(options, Mapping):
        return frozenset((name, _frozen(value)) for name, value in options.items())
    return frozenset(options) if isinstance(options, (set, list, tuple)) else options


def stop_with_the_first(trainer: L.Trainer) -> None:
    """Lets the processes of a trainer stop in order when SIGTERM reaches the first of them, and not otherwise.

    Lightning's own handler makes the processes speak to each other from within the signal, wherever each of them is.
    They then fail or wait for each other for ever, and the first process is killed for the others' failure.
    """
    connector = trainer._signal_connector

    def note(number: int, frame: FrameType | None) -> None:
        connector.received_sigterm = trainer.is_global_zero

    connector._sigterm_notifier_fn = note


def without_anonymous(logger: Any) -> None:
    """Takes a setting from a W&B logger that Lightning always passes, and of whose end W&B warns in every run."""
    vars(logger).get("_wandb_init", {}).pop("anonymous", None)


def allow_clipping(optimizer: torch.optim.Optimizer) -> None:
    """Lets Lightning clip the gradients of a fused optimiser in mixed precision.

    A fused optimiser says that it can unscale gradients itself. Lightning then refuses to clip them, since it would
    clip scaled ones; without the word, Lightning unscales them first.
    """
    vars(optimizer).pop("_step_supports_amp_scaling", None)
