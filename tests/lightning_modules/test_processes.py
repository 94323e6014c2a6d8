"""Several processes and the real logger: the same numbers, and no account."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_modules.running import preemption

pytestmark = pytest.mark.program
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
# Asks both processes to leave in the second epoch, as SLURM does with all processes of a task, where PREEMPT is set.
CALLBACK = """
import os, signal
import lightning as L

class Preempt(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, number):
        if "PREEMPT" in os.environ and trainer.current_epoch == 1 and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            if trainer.is_global_zero:
                trainer.strategy.launcher.kill(signal.SIGTERM)
"""


def _second_process(first: int) -> int | None:
    """The process that a run's first one has started for the second device; None if there is none yet."""
    for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
        with contextlib.suppress(OSError):  # others come and go
            if "LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    return None


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_find_the_numbers_of_one(programs, trained):
    more = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--ckpt_path={trained.checkpoint()}",
        "--data.init_args.eval_batch_size=3",
    ]
    programs.run(trained.arguments(*more, command="test", name="two"))
    one, two = trained.record("first"), trained.record("two")
    assert two.record.provenance["world_size"] == 2
    pd.testing.assert_frame_equal(one.metrics.drop(columns="value"), two.metrics.drop(columns="value"))
    np.testing.assert_allclose(one.metrics.value, two.metrics.value, rtol=0, atol=1e-6)
    scores = [pd.read_csv(trained.results / "runs" / "single" / name / "image_scores.csv") for name in ("first", "two")]
    pd.testing.assert_frame_equal(*scores, rtol=1e-5)


def test_more_processes_than_test_and_held_out_images_leave_a_whole_record(
    programs, tmp_path, write_data, make_project
):
    root = write_data(tmp_path / "data")
    shutil.rmtree(root / "disc")
    for path in (*(root / "bolt" / "test").rglob("*.png"), *(root / "bolt" / "ground_truth").rglob("*.png")):
        if not path.name.startswith("000"):
            path.unlink()
    project = make_project(tmp_path, root)
    more = ["--trainer.devices=3", "--trainer.strategy=ddp", "--data.init_args.holdout=0.1", "--trainer.max_epochs=1"]
    programs.run(project.arguments(*more, name="three"))
    record = project.results / "runs" / "single" / "three"
    assert pd.read_csv(record / "image_scores.csv").id.is_unique
    assert len(pd.read_csv(record / "image_scores.csv")) == 2
    # One held-out image is too few to be called that: the training images are scored beside it.
    assert pd.read_csv(record / "normal_scores.csv").split.value_counts().to_dict() == {"train": 5, "val": 1}
    images = f"--data.init_args.predict_root={root / 'bolt' / 'test'}"
    programs.run(
        project.arguments("--trainer.devices=3", "--trainer.strategy=ddp", images, command="predict", name="three")
    )
    written = pd.read_csv(project.results / "work" / "single" / "three" / "predictions" / "scores.csv")
    assert len(written) == 2


def test_two_processes_train_and_leave_one_record_with_the_curve_of_one(programs, project):
    # What is drawn per process is off; the 12 images are one batch of either.
    more = ["--run.curve_every=1", "--model.init_args.dropout=0", "--model.init_args.jitter_probability=0"]
    programs.run(project.arguments("--trainer.devices=2", "--trainer.strategy=ddp", *more))
    record = project.record()
    alone = project.fit(*more, "--data.init_args.batch_size=16", name="alone")
    pd.testing.assert_frame_equal(record.history, alone.history, rtol=1e-5)
    assert record.record.provenance["effective_batch_size"] == 16
    losses = record.history[record.history.metric == "train/loss"]
    assert losses.step.tolist() == [1, 2]  # 12 images, two processes, batches of at most 8
    assert "curve/pixel_auroc" in set(record.history.metric)


def test_two_processes_that_are_asked_to_leave_end_with_143_and_go_on_like_uninterrupted_ones(
    programs, project
) -> None:
    (project.folder / "preempt.py").write_text(CALLBACK)
    paths = os.pathsep.join([str(project.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = (*TWO, "--data.init_args.batch_size=2")
    more = (*more, "--trainer.callbacks=preempt.Preempt")
    programs.run(project.arguments(*more, name="asked"), code=preemption.EXIT_CODE, PYTHONPATH=paths, PREEMPT="1")
    assert torch.load(project.checkpoint("asked"), weights_only=False)["epoch"] == 0
    assert not (project.results / "runs").exists()
    for name in ("asked", "whole"):
        programs.run(project.arguments(*more, name=name), PYTHONPATH=paths)
    asked, whole = project.record("asked"), project.record("whole")
    pd.testing.assert_frame_equal(asked.metrics, whole.metrics, check_exact=True)
    pd.testing.assert_frame_equal(asked.history, whole.history, check_exact=True)
    weights = project.weights("whole")
    assert all(torch.equal(value, weights[name]) for name, value in project.weights("asked").items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_second_process_that_is_still_starting_ends_with_the_first(programs, project, number: signal.Signals) -> None:
    process = programs.start(project.arguments(*TWO))
    while not (second := _second_process(process.pid)):
        assert process.poll() is None, process.wait()
        time.sleep(0.01)
    process.send_signal(number)
    output = process.wait(120)  # until the second one has closed it too
    assert process.returncode == (preemption.EXIT_CODE if number == signal.SIGTERM else -number), output[-4000:]
    end = time.monotonic() + 5
    while _alive(second):  # it closes its output a moment before it is gone
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_of_a_run_without_a_name_agree_on_one(programs, project) -> None:
    more = ("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    arguments = project.arguments(*TWO, *more)
    programs.run([word for word in arguments if not word.startswith("--run.name")])
    (record,) = (project.results / "runs" / "single").iterdir()
    assert [path.name for path in (project.results / "work" / "single").iterdir()] == [record.name]


def test_wandb_logs_offline_without_an_account(project, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    project.run("--trainer.max_epochs=1", logger=True)
    import wandb

    wandb.finish()
    work = project.results / "work" / "single" / "first"
    (log,) = work.glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 0
    assert project.record().history.metric.tolist() == ["train/loss"]
