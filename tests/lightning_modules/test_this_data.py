"""A result is that of its seed and its data: neither a cache, nor a checkpoint of earlier, nor a changed file hides in it."""

from __future__ import annotations

import os
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.running import command_line


@pytest.mark.parametrize("latent", ["null", "4"])
def test_a_cold_and_a_warm_cache_give_equal_numbers_when_the_network_is_built_from_the_data(
    project, latent, monkeypatch
):
    more = [
        "--model=lightning_modules.dfr.DFR",
        "--model.init_args.backbone.name=test_efficientnet.r160_in1k",
        "--model.init_args.backbone.weights=random",
        "--model.init_args.backbone.padding=default",
        "--model.init_args.image_size=64",
        f"--model.init_args.latent={latent}",
    ]
    cold = project.fit(*more, name="cold")
    warm = project.fit(*more, name="warm")
    original = command_line.attach
    if latent == "null":  # built after the cache: nothing drawn before it may matter

        def attach(*arguments):
            torch.rand(1)
            original(*arguments)

        monkeypatch.setattr(command_line, "attach", attach)
        drawn = project.fit(*more, name="drawn")
        pd.testing.assert_frame_equal(cold.metrics, drawn.metrics)
        pd.testing.assert_frame_equal(cold.history, drawn.history)
    pd.testing.assert_frame_equal(cold.metrics, warm.metrics)
    for name, value in project.weights("cold").items():
        assert torch.equal(project.weights("warm")[name], value), name


def test_overwriting_begins_anew_whatever_time_the_checkpoint_bears(finished):
    project = finished
    for shift in (3600, -3600):
        os.utime(project.checkpoint(), (time.time() + shift,) * 2)
        record = project.fit(
            "--run.overwrite=true", "--seed_everything=1", f"--trainer.max_epochs={1 if shift > 0 else 2}"
        )
        assert len(project.losses()) == (1 if shift > 0 else 2)
        assert record.record.seed == 1


def test_overwriting_begins_anew_beside_a_checkpoint_of_the_future_that_nothing_was_noted_of(finished):
    project = finished
    (project.checkpoint().parent / "recorded.txt").unlink()
    future = time.time() + 3600
    os.utime(project.checkpoint(), (future,) * 2)
    project.run("--run.overwrite=true")
    assert project.checkpoint().stat().st_mtime < future - 1, "not the file that was there"
    assert project.record().record.provenance["seconds_per_epoch"] > 0


def test_an_image_that_changes_during_the_training_is_named_in_the_record(
    tmp_path, write_data, make_project, monkeypatch
):
    project = make_project(tmp_path, write_data(tmp_path / "data"))
    victim = tmp_path / "data" / "disc" / "train" / "good" / "001.png"
    original = EpochSeed.on_train_epoch_start

    def change(self, trainer, module):
        original(self, trainer, module)
        if trainer.current_epoch == 1:
            times = victim.stat().st_atime, victim.stat().st_mtime
            Image.fromarray(255 - np.asarray(Image.open(victim))).save(victim)
            os.utime(victim, times)

    monkeypatch.setattr(EpochSeed, "on_train_epoch_start", change)
    (note,) = [note for note in project.fit().record.notes if "DATA CHANGED" in note]
    assert str(victim) in note
    monkeypatch.setattr(EpochSeed, "on_train_epoch_start", original)
    victim.touch()  # another time, the same bytes
    assert not [note for note in project.fit(name="second").record.notes if "DATA CHANGED" in note]


def test_wandb_is_sent_no_picture_and_no_path_if_the_user_says_so(tmp_path, monkeypatch, caplog):
    from unittest.mock import MagicMock

    from lightning_modules.running import tracking
    from lightning_modules.running.settings import RunConfig

    monkeypatch.delenv("WANDB_X_DISABLE_META", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    run, wandb = MagicMock(), MagicMock()
    wandb.run = run
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / "a.jpg").write_bytes(b"")
    columns = ["variant", "scope", "dataset", "category", "metric", "value"]
    table = pd.DataFrame([("", "category", "d", "c", "image_auroc", 1.0)], columns=columns)
    tracking.log_record(tmp_path, table, upload=False)
    assert not run.log_artifact.called
    assert not wandb.Image.called
    tracking.log_record(tmp_path, table)
    assert run.log_artifact.called
    assert wandb.Image.called
    secret = {"data": {"datasets": [{"root": "/home/me/secret/parts", "name": "folder"}]}, "run": {"name": "a"}}
    sent = tracking.settings(RunConfig(name="a", upload=False), secret)["config"]["cli"]
    assert sent == {"data": {"datasets": [{"root": "parts", "name": "folder"}]}, "run": {"name": "a"}}
    assert tracking.settings(RunConfig(name="a"), secret)["config"]["cli"] == secret
    with caplog.at_level("INFO"):
        tracking.announce(RunConfig(name="a"))
    assert "--run.upload=false" in caplog.text
