"""What would end a run at its end, or make its numbers those of a part, is refused before anything runs."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch

from lightning_modules.callbacks import scoring
from lightning_modules.running import refusals
from lightning_modules.running.settings import RunConfig
from lightning_modules.uniad import UniAD


def _refusal(project, *more: str, command: str = "fit") -> str:
    with pytest.raises(SystemExit) as caught:
        project.run(*more, command=command)
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("error: ")
    assert caught.value.code.count("\n") < 4
    assert not (project.results / "runs").exists()
    return caught.value.code


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--trainer.limit_train_batches=1", "limit_train_batches=1 trains or scores a part only"),
        ("--trainer.limit_test_batches=0.5", "limit_test_batches=0.5"),
        ("--trainer.limit_val_batches=0", "limit_val_batches=0"),
        ("--trainer.fast_dev_run=true", "fast_dev_run"),
        ("--trainer.overfit_batches=1", "overfit_batches"),
        ("--trainer.barebones=true", "barebones"),
        ("--trainer.precision=16-true", "Allowed are 32-true, 16-mixed, bf16-mixed"),
        ("--trainer.precision=bf16-true", "bf16-true"),
        ("--trainer.precision=64-true", "64-true"),
        ("--trainer.precision=64", "trainer.precision=64"),
        ("--trainer.strategy=ddp_spawn", "use ddp"),
        ("--trainer.devices=0", "at least 1"),
        ("--trainer.devices=-1", "at least 1"),
        ("--trainer.accumulate_grad_batches=0", "at least 1"),
        ("--trainer.accumulate_grad_batches=-2", "at least 1"),
        ("--seed_everything=-1", "from 0 to"),
        ("--trainer.max_epoch=1", "Did you mean 'trainer.max_epochs'"),
        ("--ckpt_path=http://example.org/a.ckpt", "not a file on this machine"),
        ("--ckpt_path=best", "not a file on this machine"),
    ],
)
def test_an_option_that_would_spoil_the_run_is_refused_in_a_sentence(project, option, expected):
    assert expected in _refusal(project, option)


def test_own_photographs_are_not_trained_on_random_features_unasked(project, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DATASET", "folder")
    monkeypatch.setenv("DATA_ROOT", str(project.data))
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        refusal = _refusal(project, "--model.init_args.backbone.weights=auto")
    assert "BACKBONE=tf_efficientnet_lite0.in1k WEIGHTS=packaged" in refusal
    assert "WEIGHTS=random insists" in refusal


def test_weights_that_a_hub_should_deliver_are_missed_at_once(project, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(SystemExit, match="the hub does not answer"):
        project.run("--model.init_args.backbone.weights=imagenet", command="fit")
    assert time.monotonic() - started < 30  # a hub's client by itself goes on trying for more than a minute


@pytest.mark.skipif(refusals.torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_in_a_sentence(project):
    assert "finds no GPU" in _refusal(project, "--trainer.accelerator=gpu")


@pytest.mark.parametrize("root", ["", None])
def test_predict_without_images_does_not_walk_the_working_directory(project, root):
    more = [] if root is None else [f"--data.init_args.predict_root={root}"]
    assert "predict needs images" in _refusal(project, *more, command="predict")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_of_results_that_cannot_be_written_is_refused_before_the_training(project):
    (project.results / "runs").mkdir(parents=True)
    (project.results / "runs").chmod(0o555)
    with pytest.raises(SystemExit, match=r"cannot be written .*could not leave its record"):
        project.run()


def test_a_file_where_records_go_is_refused_before_the_training(project):
    project.results.mkdir()
    (project.results / "runs").write_text("")
    with pytest.raises(SystemExit, match=r"cannot be written .*could not leave its record"):
        project.run()
    assert not project.checkpoint().exists()


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_training(tmp_path):
    run = RunConfig(name="a", results=str(tmp_path))
    refusals.place(run, 1)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit, match=r"MiB free, but this run needs about 1,125,899,906,842,624 MiB"):
        refusals.place(run, 2**70)


def test_a_run_without_any_training_says_so(project):
    notes = project.fit("--trainer.max_epochs=0").record.notes
    assert any("NOTHING WAS TRAINED" in note for note in notes)


def test_a_training_cut_by_its_steps_says_so_and_a_whole_one_does_not(project, trained):
    cut = ("--trainer.max_steps=1", "--data.init_args.batch_size=4")
    notes = project.fit(*cut).record.notes
    assert any("set by max_steps=1: it ended in epoch 1" in note for note in notes)
    assert not any("TRAINED" in note for note in notes)
    assert not any("max_" in note or "CHANGED" in note for note in trained.record().record.notes)


def test_the_loss_of_an_epoch_cut_by_its_steps_is_recorded_and_looked_at(project, monkeypatch):
    seen = []

    def kept(self, loss, batch, watch=UniAD.watch):
        seen.append(loss.item())
        watch(self, loss, batch)

    monkeypatch.setattr(UniAD, "watch", kept)
    project.run("--trainer.max_steps=4", "--data.init_args.batch_size=4")  # an epoch has three steps
    assert project.losses() == pytest.approx([sum(seen[:3]) / 3, seen[3]], rel=1e-6)
    monkeypatch.setattr(UniAD, "batch_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(SystemExit, match="loss is nan at step 0"):
        project.run("--trainer.max_steps=1", "--data.init_args.batch_size=4", name="not_finite")


def test_the_traceback_can_be_had(project, monkeypatch):
    from lightning_modules.callbacks.epoch_seed import EpochSeed

    def fail(*args):
        raise ZeroDivisionError("as a bug would")

    monkeypatch.setattr(EpochSeed, "on_train_epoch_start", fail)
    with pytest.raises(SystemExit, match=r"^error: ZeroDivisionError: as a bug would \(.*\n`--debug`"):
        project.run()
    with pytest.raises(ZeroDivisionError):
        project.run("--debug", name="option")
    monkeypatch.setenv("UNIRECON_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        project.run(name="variable")


def test_a_disk_too_small_for_the_maps_of_the_test_set_is_refused_before_the_training(project, monkeypatch):
    monkeypatch.setattr(scoring, "MAPS_IN_MEMORY", 0)
    ask = refusals.room

    def only_maps(folder, needed, what):
        ask(folder, 2**70 if what == "anomaly maps" else 0, what)

    monkeypatch.setattr(refusals, "room", only_maps)
    assert "for its anomaly maps" in _refusal(project)
    assert not project.checkpoint().exists()


def test_a_disk_too_small_for_a_prediction_keeps_the_one_before(finished, data_root, monkeypatch):
    project = finished
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test' / 'good'}"
    project.run(images, command="predict")
    scores = project.results / "work/single/first/predictions/scores.csv"
    before = scores.stat().st_mtime_ns
    ask = refusals.room
    monkeypatch.setattr(refusals, "room", lambda folder, needed, what: ask(folder, needed * 2**50, what))
    with pytest.raises(SystemExit, match="for its maps of 2 images"):
        project.run(images, command="predict")
    assert scores.stat().st_mtime_ns == before


def test_a_configuration_that_is_no_text_is_named(project):
    project.config.write_bytes(b"\xff\xfe\0")
    assert f"{project.config} is no configuration: it is not UTF-8 text" in _refusal(project)
