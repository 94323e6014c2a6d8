"""An interrupted run, started again with the same command, ends as if nothing had happened."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.callbacks.progress import Progress
from lightning_modules.running import resuming
from lightning_modules.running.checkpoints import WholeCheckpoints
from lightning_modules.running.command_line import UniReconCLI, main

EPOCHS = "--trainer.max_epochs=4"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_root, make_project):
    project = make_project(tmp_path_factory.mktemp("whole"), data_root)
    torch.set_num_threads(1)
    project.run(EPOCHS, "--model.init_args.lr_scheduler.first=2", "--run.curve_every=2")
    return project


def test_an_interrupted_run_goes_on_with_its_own_options_and_data_only(project, data_root, cut_off):
    cut_off(project)
    discs = f"[{{'name': 'folder', 'root': '{data_root}', 'categories': ['disc']}}]"
    for option, named in (
        ("--model.init_args.optimizer.lr=0.01", "optimizer.init_args.lr: 0.001 then, 0.01 now"),
        ("--seed_everything=1", "seed_everything: 0 then, 1 now"),
        (f"--data.init_args.datasets={discs}", "fingerprint of the data"),
    ):
        with pytest.raises(SystemExit, match=named):
            project.run(option)
    project.run("--data.init_args.eval_batch_size=3", "--trainer.max_epochs=3")
    assert project.record().record.provenance["epochs"] == 3


def test_overwriting_begins_an_interrupted_run_of_other_options_anew(project, cut_off, trained):
    cut_off(project, "--seed_everything=1")
    project.run("--run.overwrite=true")
    assert project.losses() == trained.losses()
    record = project.record()
    before = {file: file.read_bytes() for file in record.path.rglob("*") if file.is_file()}
    main(["test", f"--config={record.path / 'config.yaml'}", "--trainer.logger=false"])
    after = {file: file.read_bytes() for file in record.path.rglob("*") if file.is_file()}
    assert after == before  # what was overwritten once is not so for ever


def test_finished_categories_are_not_joined_with_those_of_other_options(project, cut_off):
    setting = "--data.init_args.setting=per_category"
    cut_off(project, setting)
    with pytest.raises(SystemExit, match=r"optimizer\.init_args\.lr"):
        project.run(setting, "--model.init_args.optimizer.lr=0.01")


@pytest.mark.parametrize(
    ("owner", "hook", "epoch"),
    [(EpochSeed, "on_train_epoch_start", 2), (Progress, "on_train_epoch_end", 3)],
    ids=["between two epochs", "before the last epoch's checkpoint"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(uninterrupted, project, cut_off, owner, hook, epoch):
    more = (EPOCHS, "--model.init_args.lr_scheduler.first=2", "--run.curve_every=2")
    cut_off(project, *more, at=epoch, owner=owner, hook=hook)
    assert not (project.results / "runs").exists()  # complete or absent
    project.run(*more)
    pd.testing.assert_frame_equal(project.record().history, uninterrupted.record().history)
    pd.testing.assert_frame_equal(project.record().metrics, uninterrupted.record().metrics)
    assert project.record().record.provenance["epochs"] == 4
    for name, value in uninterrupted.weights().items():
        assert torch.equal(project.weights()[name], value), name


def test_a_training_cut_off_after_its_last_epoch_still_ends_with_the_best_weights(project, cut_off):
    more = ("--run.protocol=as_released", "--run.curve_every=1", EPOCHS, "--model.init_args.optimizer.lr=0.05")
    cut_off(project, *more, at=4, hook="on_train_end")
    record = project.fit(*more)
    best = record.history[record.history.metric == "curve/pixel_auroc"].value.max()
    means = record.metrics[(record.metrics.scope == "mean") & (record.metrics.dataset == "")].set_index("metric").value
    assert means["pixel_auroc"] == pytest.approx(best, abs=1e-9)


def test_progress_goes_on_from_where_it_stopped(uninterrupted):
    state = json.loads((uninterrupted.results / "work" / "single" / "first" / "progress.json").read_text())
    assert (state["epoch"], state["epochs"]) == (4, 4)


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "run" / "last.ckpt"
    writer = WholeCheckpoints()
    writer.save_checkpoint({"epoch": 1}, path)
    (path.parent / ".last.ckpt.123").write_bytes(b"part of one")  # of a process killed while writing
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_disk)
        with pytest.raises(OSError, match="No space left"):
            writer.save_checkpoint({"epoch": 2}, path)
    assert writer.load_checkpoint(path) == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]
    writer.save_checkpoint({"epoch": 2}, path)
    assert writer.load_checkpoint(path) == {"epoch": 2}


def _full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_program_writes_its_checkpoints_whole(project, monkeypatch):
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(SystemExit, match="No space left"):
        project.run()
    assert not project.checkpoint().exists()
    monkeypatch.undo()
    assert project.fit().record.provenance["epochs"] == 2


def test_an_interrupted_replacement_goes_on_instead_of_beginning_again(finished, cut_off, monkeypatch):
    project = finished
    anew = "--seed_everything=1", "--run.overwrite=true", EPOCHS
    cut_off(project, *anew, at=3)
    begun = []
    original = EpochSeed.on_train_epoch_start
    with monkeypatch.context() as patch:
        patch.setattr(
            EpochSeed,
            "on_train_epoch_start",
            lambda self, trainer, module: (begun.append(trainer.current_epoch), original(self, trainer, module)),
        )
        project.run(*anew)
    assert begun == [3]
    assert project.record().record.seed == 1
    begun.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            EpochSeed, "on_train_epoch_start", lambda self, trainer, module: begun.append(trainer.current_epoch)
        )
        project.run(*anew)  # finished: replaced from the beginning
    assert begun == [0, 1, 2, 3]


def test_a_run_that_another_process_is_training_is_left_alone(project, monkeypatch):
    work = project.results / "work" / "single" / "first"
    work.mkdir(parents=True)
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); f.write('4321'); f.flush()"
    )
    words = [
        sys.executable,
        "-c",
        f"{script}; print('held', flush=True); sys.stdin.read()",
        str(work / "training.lock"),
    ]
    monkeypatch.setattr(resuming, "PATIENCE", 0.2)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit, match="Process 4321 is training the run"):
            project.run("--run.overwrite=true")
        other.stdin.close()
    project.run("--trainer.max_epochs=1")


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(finished, monkeypatch):
    project = finished
    record, kept, claim = project.results / "runs" / "single" / "first", project.results / "kept", resuming.claim
    record.rename(kept)

    def claim_at_last(run):
        claim(run)
        kept.rename(record)  # as the other process leaves it at its end

    monkeypatch.setattr(resuming, "claim", claim_at_last)
    monkeypatch.setattr(UniReconCLI, "before_fit", lambda self: pytest.fail("it is trained once more"))
    with pytest.raises(SystemExit, match="is already a finished run"):
        project.run()


def test_a_record_whose_replacing_was_cut_off_is_found_before_anything_is_trained(finished, data_root, monkeypatch):
    project = finished
    record = project.results / "runs" / "single" / "first"
    hidden = record.with_name(".first.host-1-x.old")
    record.rename(hidden)
    images = f"--data.init_args.predict_root={data_root}"
    main(["predict", f"--config={record}/config.yaml", images])
    assert (project.results / "work" / "single" / "first" / "predictions").is_dir()
    record.rename(hidden)
    monkeypatch.setattr(UniReconCLI, "before_fit", lambda self: pytest.fail("it is trained once more"))
    with pytest.raises(SystemExit, match="is already a finished run"):
        project.run()


def test_scoring_again_keeps_how_the_weights_came_about(finished):
    project = finished
    trained = project.record()
    project.run("--run.overwrite=true", command="test")
    again = project.record()
    kept = ("command", "wall_seconds", "seconds_per_epoch", "started")
    assert [again.record.provenance[k] for k in kept] == [trained.record.provenance[k] for k in kept]
    assert again.record.provenance["scored_again"]["started"] >= trained.record.provenance["started"]  # whole seconds
    assert set(again.record.provenance["scored_again"]) >= set(kept)
    pd.testing.assert_frame_equal(again.history, trained.history)
    pd.testing.assert_frame_equal(again.metrics, trained.metrics)


def test_a_file_system_without_locks_is_no_obstacle(project, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    project.run("--trainer.max_epochs=1")
