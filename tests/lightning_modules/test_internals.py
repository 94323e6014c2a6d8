"""What is touched inside libraries is still there: when one of these fails, a library has changed."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
from jsonargparse import ActionConfigFile, _core
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.base import ReconstructionModule
from lightning_modules.running import internals, quick_parser
from lightning_modules.running.command_line import UniReconCLI
from lightning_modules.running.parser import PlainParser
from lightning_modules.running.settings import RunConfig


def test_lightnings_command_line_takes_each_of_the_named_steps(tmp_path, monkeypatch):
    taken = []

    class Watched(internals.OpenCLI):
        def run_subcommand(self, subcommand):
            taken.append("run_subcommand")
            super().run_subcommand(subcommand)

        def subcommand_options(self, subcommand):
            taken.append("subcommand_options")
            return super().subcommand_options(subcommand)

    def parse(self):
        taken.append("_parse_ckpt_path")

    monkeypatch.setattr(internals.OpenCLI, "_parse_ckpt_path", parse)
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = Watched(
        BoringModel,
        save_config_callback=None,
        args=["fit", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu",
              f"--trainer.default_root_dir={tmp_path}", *quiet],
    )  # fmt: skip
    assert sorted(taken) == ["_parse_ckpt_path", "run_subcommand", "subcommand_options"]
    assert isinstance(cli.made("model"), BoringModel)
    assert cli.made("trainer")["fast_dev_run"] is True
    assert "fast_dev_run: true" in cli.dump(cli.config["fit"])


def test_the_parser_of_the_given_subcommand_alone_is_built_and_no_hyperparameters_are_written_out(tmp_path):
    class Quick(internals.OpenCLI):
        only = "test"

    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    words = [
        "test",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = Quick(BoringModel, save_config_callback=None, args=[*words, *quiet])
    assert list(cli._subcommand_parsers) == ["test"]
    assert not cli.model.hparams
    Quick.only = "--help"
    with pytest.raises(SystemExit):
        Quick(BoringModel, args=["--help"])


def test_the_programs_own_command_line_overrides_steps_that_exist():
    for name in ("run_subcommand", "subcommand_options"):
        assert name in vars(UniReconCLI)
        assert name in vars(internals.OpenCLI)


def test_options_of_subcommands_are_found_for_suggestions():
    parser, fit = PlainParser(), PlainParser()
    fit.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_subcommands().add_subcommand("fit", fit)
    assert {"seed", "epochs"} <= set(internals.parser_options(parser))


def test_options_are_found_by_name_as_the_library_finds_them():
    quick = next((vars(_core)[name] for name in quick_parser._NAMES if name in vars(_core)), None)
    assert quick is not None, "jsonargparse has no such function any more: look_options_up may go"
    parser, fit = PlainParser(), PlainParser()
    fit.add_argument("--config", action="config")
    fit.add_lightning_class_args(L.Trainer, "trainer")
    fit.add_subclass_arguments(ReconstructionModule, "model")
    fit.add_class_arguments(RunConfig, "run")
    parser.add_argument("--fit", type=int)
    parser.add_argument("--seed", "--fix", type=int)
    parser.add_subcommands().add_subcommand("fit", fit)
    parser.add_argument("--test", type=int)
    ours = {word.lstrip("-") for action in fit._actions for word in (action.dest, *action.option_strings)}
    names = {"fit", "seed", "fix", "test", "none", "fit.none", "help", *ours, *(f"fit.{name}" for name in ours)}
    for of in (parser, fit):
        for name in sorted(names):
            assert quick(of, name) == quick.through_all(of, name)
            assert quick(of, name, exclude=ActionConfigFile) == quick.through_all(of, name, exclude=ActionConfigFile)
    assert quick(parser, "fit.trainer.max_epochs")[0] is not None
    assert quick(parser, "later")[0] is None
    parser.add_argument("--later", type=int)
    assert quick(parser, "later")[0] is not None
    assert quick(PlainParser(add_help=False), "none") == (None, None), "a parser without any option"


@pytest.mark.parametrize("first", [True, False])
def test_sigterm_stops_a_trainer_in_its_first_process_only_and_without_a_word_to_the_others(monkeypatch, first):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(type(trainer), "is_global_zero", first)
    monkeypatch.setattr(trainer.strategy, "barrier", lambda *_: pytest.fail("the processes spoke to each other"))
    internals.stop_with_the_first(trainer)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    connector = trainer._signal_connector
    try:
        connector.register_signal_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.received_sigterm is first
    finally:
        connector.teardown()
        signal.signal(signal.SIGTERM, before)


def test_lightning_still_passes_the_setting_of_whose_end_wandb_warns(tmp_path):
    logger = WandbLogger(project="p", offline=True, save_dir=str(tmp_path))
    assert "anonymous" in logger._wandb_init, "Lightning has stopped: without_anonymous may go"
    internals.without_anonymous(logger)
    assert "anonymous" not in logger._wandb_init


def test_a_module_without_trainer_says_so_instead_of_raising():
    from lightning_modules.base import ReconstructionModule

    class Alone(ReconstructionModule):
        def __init__(self):
            L.LightningModule.__init__(self)

    assert Alone().attached is None


def test_the_parser_of_a_class_is_made_once_and_gives_the_same_configuration(monkeypatch):
    made = []
    add = PlainParser.add_class_arguments
    monkeypatch.setattr(
        PlainParser, "add_class_arguments", lambda self, of, *a, **k: (made.append(of), add(self, of, *a, **k))[1]
    )
    parser = PlainParser()
    parser.add_subclass_arguments(ReconstructionModule, "model", required=True)
    given = [
        ["--model.class_path=lightning_modules.uniad.UniAD", f"--model.init_args.image_size={n}"] for n in (64, 96, 64)
    ]
    first = parser.parse_args(given[0])
    before = len(made)
    assert parser.parse_args(given[1]).model.init_args.image_size == 96
    assert parser.parse_args(given[2]) == first
    assert len(made) == before > 0
