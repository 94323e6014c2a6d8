"""The command line gives a run what its environment, its profile and its recipe say, in that order of weakness."""

from __future__ import annotations

import pytest

from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.callbacks.history import History
from lightning_modules.running.command_line import main
from lightning_modules.running.filling import environment_arguments, with_environment


def test_environment_stands_between_the_configuration_files_and_explicit_arguments():
    given = ["fit", "--config", "a.yaml", "--config=b.yaml", "--model.init_args.backbone.weights=random"]
    assert with_environment(given, {"WEIGHTS": "imagenet"}) == [
        *given[:4],
        "--model.init_args.backbone.weights=imagenet",
        given[4],
    ]


def test_without_variables_arguments_are_left_alone():
    given = ["test", "--run.name=x"]
    assert with_environment(given, {"DATASET": "", "BACKBONE": ""}) == given


def test_one_dataset_with_categories_becomes_one_argument():
    arguments = environment_arguments({"DATASET": "mvtec_ad", "DATA_ROOT": "/d", "CATEGORIES": "bottle,cable"})
    assert arguments == [
        '--data.init_args.datasets=[{"name": "mvtec_ad", "root": "/d", "categories": ["bottle", "cable"], "label": null}]'
    ]


def test_spaces_and_empty_parts_of_a_list_are_dropped():
    (argument,) = environment_arguments({"DATASET": "mvtec_ad,", "DATA_ROOT": " /d", "CATEGORIES": "bottle, cable,"})
    assert '"root": "/d", "categories": ["bottle", "cable"]' in argument


def test_photographs_of_the_project_need_no_root():
    (argument,) = environment_arguments({"DATASET": "photos", "DATA_ROOT": "", "CATEGORIES": "cookie"})
    assert argument.endswith('[{"name": "photos", "root": "", "categories": ["cookie"], "label": null}]')


def test_help_names_the_program_as_it_is_started(capsys):
    for words in (["--help"], ["fit", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().out.startswith("usage: python -m lightning_modules ")


def test_several_datasets_pair_with_their_roots_in_order():
    (argument,) = environment_arguments({"DATASET": "mvtec_ad,visa", "DATA_ROOT": "/m,/v"})
    rest = '"categories": null, "label": null'
    assert argument.endswith(
        f'[{{"name": "mvtec_ad", "root": "/m", {rest}}}, {{"name": "visa", "root": "/v", {rest}}}]'
    )


def test_two_datasets_of_one_reader_are_called_after_their_folders(make_project, tmp_path, write_data, monkeypatch):
    roots = [write_data(tmp_path / "data" / name) for name in ("spring", "autumn")]
    monkeypatch.setenv("DATASET", "folder,folder")
    monkeypatch.setenv("DATA_ROOT", ",".join(map(str, roots)))
    record = make_project(tmp_path, roots[0]).fit("--trainer.max_epochs=1")
    assert [dataset["name"] for dataset in record.record.datasets] == ["spring", "autumn"]
    assert set(record.metrics.category[record.metrics.scope == "category"]) == {"bolt", "disc"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DATASET": "mvtec_ad"}, "DATA_ROOT 0 folder"),
        ({"DATASET": "a,b", "DATA_ROOT": "/a"}, "DATASET names 2 dataset"),
        ({"CATEGORIES": "x"}, "needs exactly one DATASET"),
        ({"DATASET": "a,b", "DATA_ROOT": "/a,/b", "CATEGORIES": "x"}, "needs exactly one DATASET"),
    ],
)
def test_contradicting_variables_are_refused_with_what_was_found(environment, message):
    with pytest.raises(SystemExit, match=message):
        environment_arguments(environment)


def test_an_interrupted_training_says_how_to_go_on(project, monkeypatch, caplog):
    def interrupt(self, trainer, module):
        raise KeyboardInterrupt

    monkeypatch.setattr(History, "on_train_epoch_end", interrupt)
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        project.run()
    assert "RUN=first" not in caplog.text  # there is nothing yet to go on from
    monkeypatch.undo()
    monkeypatch.setattr(EpochSeed, "on_train_epoch_start", _interrupt_second)
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        project.run()
    assert "RUN=first" in caplog.text


def _interrupt_second(self, trainer, module):
    if trainer.current_epoch == 1:
        raise KeyboardInterrupt
