"""Several processes and the real logger: the same numbers, and no account."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]


def _program(arguments: list[str], **variables: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lightning_modules", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_two_processes_find_the_numbers_of_one(trained):
    more = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--ckpt_path={trained.checkpoint()}",
        "--data.init_args.eval_batch_size=3",
    ]
    _program(trained.arguments(*more, command="test", name="two"))
    one, two = trained.record("first"), trained.record("two")
    assert two.record.provenance["world_size"] == 2
    pd.testing.assert_frame_equal(one.metrics.drop(columns="value"), two.metrics.drop(columns="value"))
    np.testing.assert_allclose(one.metrics.value, two.metrics.value, rtol=0, atol=1e-6)
    scores = [pd.read_csv(trained.results / "runs" / "single" / name / "image_scores.csv") for name in ("first", "two")]
    pd.testing.assert_frame_equal(*scores, rtol=1e-5)


def test_two_processes_train_and_leave_one_record_with_the_curve_of_one(project):
    # What is drawn per process is off; the 12 images are one batch of either.
    more = ["--run.curve_every=1", "--model.init_args.dropout=0", "--model.init_args.jitter_probability=0"]
    _program(project.arguments("--trainer.devices=2", "--trainer.strategy=ddp", *more))
    record = project.record()
    alone = project.fit(*more, "--data.init_args.batch_size=16", name="alone")
    pd.testing.assert_frame_equal(record.history, alone.history, rtol=1e-5)
    assert record.record.provenance["effective_batch_size"] == 16
    losses = record.history[record.history.metric == "train/loss"]
    assert losses.step.tolist() == [1, 2]  # 12 images, two processes, batches of at most 8
    assert "curve/pixel_auroc" in set(record.history.metric)


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
