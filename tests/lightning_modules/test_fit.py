"""`fit` from photographs to a record: what a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from datamodules.anomaly_ratio import DEFINITIONS
from lightning_modules.callbacks import progress
from lightning_modules.callbacks import scoring as evaluation
from results.aggregator.records import read_records


def test_a_finished_run_leaves_a_complete_record(trained):
    record = trained.record()
    metrics = record.metrics
    assert {"image_auroc", "pixel_auroc", "pixel_aupro", "dsc"} <= set(metrics.metric)
    of_category = metrics[(metrics.scope == "category") & (metrics.metric == "image_auroc")]
    assert of_category.category.tolist() == ["bolt", "disc"]
    assert of_category.n.tolist() == [5, 5]
    mean = metrics[(metrics.scope == "mean") & (metrics.metric == "image_auroc") & (metrics.dataset == "")]
    assert mean.value.item() == pytest.approx(of_category.value.mean())
    losses = record.history[record.history.metric == "train/loss"]
    assert losses.epoch.tolist() == [0, 1]
    assert losses.step.tolist() == [2, 4]  # 12 images in batches of 8
    assert np.isfinite(losses.value).all()
    assert {"git_commit", "versions", "device", "started", "wall_seconds", "epochs", "command"} <= set(
        record.record.provenance
    )
    assert record.record.provenance["epochs"] == 2
    assert record.record.backbone["weights"] == "random"
    assert record.record.seed == 0
    assert record.record.datasets[0]["categories"] == ["bolt", "disc"]
    assert [r.name for r in read_records(trained.results / "runs")] == [record.name]


def test_heat_maps_show_an_image_of_each_rank_and_category(trained):
    index = trained.record().heatmaps
    ranked = index[index["rank"].isin(["worst", "median", "best"])]
    assert sorted(zip(ranked.category, ranked["rank"], strict=True)) == sorted(
        (category, rank) for category in ("bolt", "disc") for rank in ("worst", "median", "best")
    )
    folder = trained.results / "runs" / "single" / "first" / "heatmaps"
    assert all((folder / name).stat().st_size > 1000 for name in index.file)


def test_failures_are_recorded_with_their_ranks_and_drawn(trained):
    folder = trained.results / "runs" / "single" / "first"
    scores = pd.read_csv(folder / "image_scores.csv").set_index("id")
    failed = pd.read_csv(folder / "failures.csv")
    assert failed.groupby(["category", "kind"]).size().tolist() == [2, 3, 2, 3]
    for row in failed.itertuples():
        same = scores[scores.category == row.category].image_score
        assert row.rank == 1 + (same > same[row.id]).sum()
        assert (row.images, row.defects) == (5, 3)
    for (_, kind), rows in failed.groupby(["category", "kind"]):
        assert rows["rank"].is_monotonic_increasing == (kind == "highest good")
    index = trained.record().heatmaps
    assert len(index[index.file == "bolt-failures.jpg"]) == 5
    assert (folder / "heatmaps" / "bolt-failures.jpg").stat().st_size > 1000


def test_the_record_says_how_much_of_the_images_is_anomalous(trained):
    ratios = pd.read_csv(trained.results / "runs" / "single" / "first" / "anomaly_ratio.csv")
    assert ratios.groupby("category").size().to_dict() == dict.fromkeys(("bolt", "disc"), len(DEFINITIONS))
    assert set(ratios.images) == {5}
    by_name = ratios[ratios.category == "bolt"].set_index("definition").percent
    # All images are alike in size, three of five are anomalous.
    assert by_name.test_pixels == pytest.approx(by_name.anomalous_pixels * 3 / 5)
    assert 0 < by_name.image_mean <= by_name.box_mean < 100


def test_every_test_image_has_its_score_in_the_record(trained):
    scores = pd.read_csv(trained.results / "runs" / "single" / "first" / "image_scores.csv")
    assert len(scores) == 10
    assert scores.id.is_unique
    assert scores.groupby(["category", "label"]).size().tolist() == [2, 3, 2, 3]


def test_the_recipe_fills_what_the_configuration_leaves_open_and_is_written_down(trained):
    config = yaml.safe_load(trained.record().config_text)
    assert config["data"]["init_args"]["resize"] == "pil_bilinear"
    assert config["data"]["init_args"]["batch_size"] == 8
    assert config["trainer"]["gradient_clip_val"] == 0.1
    assert config["data"]["init_args"]["image_size"] == 64
    assert config["trainer"]["max_epochs"] == 2  # given, so not the recipe's 1000


def test_explicit_arguments_win_over_the_recipe(project):
    project.fit("--data.init_args.batch_size=4", "--trainer.gradient_clip_val=0.5", "--trainer.max_epochs=1")
    config = yaml.safe_load(project.record().config_text)
    assert config["data"]["init_args"]["batch_size"] == 4
    assert config["trainer"]["gradient_clip_val"] == 0.5
    assert project.record().history.step.tolist() == [3]


def test_checkpoints_hold_no_tensor_of_the_backbone(trained):
    names = list(trained.weights())
    assert names
    assert not [name for name in names if name.startswith("extractor.")]


def test_a_finished_run_is_not_replaced_unless_asked_for(finished):
    with pytest.raises(SystemExit, match="already a finished run"):
        finished.run()
    record = finished.fit("--trainer.max_epochs=1", "--run.overwrite=true", "--seed_everything=3")
    assert record.record.seed == 3


def test_a_run_is_a_function_of_its_seed(project, trained):
    project.fit(name="same")
    project.fit("--seed_everything=1", name="other")
    assert project.losses("same") == trained.losses()
    assert project.losses("other") != trained.losses()


def test_the_curve_has_one_point_per_interval_and_leaves_the_training_as_it_is(project):
    plain = project.fit("--trainer.max_epochs=3", name="plain")
    watched = project.fit("--trainer.max_epochs=3", "--run.curve_every=2", name="watched")
    curve = watched.history[watched.history.metric == "curve/image_auroc"]
    assert curve.epoch.tolist() == [1, 2]  # every second epoch, and the last
    assert {"curve/image_auroc", "curve/pixel_auroc"} <= set(watched.history.metric)
    assert project.losses("watched") == project.losses("plain")
    final = (
        watched.metrics[(watched.metrics.scope == "mean") & (watched.metrics.dataset == "")].set_index("metric").value
    )
    assert curve.value.iloc[-1] == pytest.approx(final["image_auroc"], abs=1e-9)
    assert plain.record.protocol == "clean"


def test_as_released_ends_with_the_best_epochs_weights_and_says_so(project):
    record = project.fit(
        "--run.protocol=as_released",
        "--run.curve_every=1",
        "--trainer.max_epochs=4",
        "--model.init_args.optimizer.lr=0.05",
    )
    curve = record.history[record.history.metric == "curve/pixel_auroc"]
    assert len(curve) == 4
    final = record.metrics[(record.metrics.scope == "mean") & (record.metrics.dataset == "")].set_index("metric").value
    assert final["pixel_auroc"] == pytest.approx(curve.value.max(), abs=1e-9)
    assert record.record.protocol == "as_released"


def test_images_without_masks_give_reasons_instead_of_zeros(tmp_path, write_data, make_project):
    project = make_project(tmp_path, write_data(tmp_path / "data", masks=False), reader="folder")
    metrics = project.fit("--trainer.max_epochs=1").metrics
    pixel = metrics[metrics.metric.str.startswith("pixel_") & (metrics.scope == "category")]
    assert len(pixel)
    assert pixel.value.isna().all()
    assert pixel.reason.str.contains("no mask").all()
    image = metrics[(metrics.metric == "image_auroc") & (metrics.scope == "category")]
    assert image.value.notna().all()


def test_a_non_finite_loss_stops_the_run_and_names_step_categories_and_files(project):
    with pytest.raises(SystemExit, match=r"(?s)loss is (nan|inf) at step \d+.*bolt: .*\.png") as caught:
        project.run("--model.init_args.optimizer.lr=1e30", "--trainer.max_epochs=4", "--trainer.gradient_clip_val=1e30")
    assert "disc: " in str(caught.value)
    assert not (project.results / "runs" / "single" / "first").exists()


def test_progress_for_the_sweep_runner_follows_the_epochs(trained):
    state = json.loads((trained.results / "work" / "single" / "first" / "progress.json").read_text())
    assert (state["epoch"], state["epochs"]) == (2, 2)
    assert state["metrics"]["train/loss"] == trained.losses()[-1]


def test_a_checkpoint_refuses_the_features_of_another_backbone(trained):
    with pytest.raises((SystemExit, ValueError), match="was trained on the features of test_efficientnet"):
        trained.run(
            f"--ckpt_path={trained.checkpoint()}",
            "--model.init_args.backbone.seed=1",
            command="test",
            name="other",
        )


def test_test_on_a_checkpoint_writes_the_same_numbers(trained):
    trained.run(f"--ckpt_path={trained.checkpoint()}", command="test", name="again")
    first, again = trained.record("first").metrics, trained.record("again").metrics
    pd.testing.assert_frame_equal(first, again)
    assert trained.record("again").record.provenance["epochs"] == 2
    torch.manual_seed(0)


def test_without_a_terminal_a_line_tells_how_far_the_training_is(project, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    project.fit("--trainer.max_epochs=3", name="lines")
    lines = [record.message for record in caplog.records if record.message.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1 of 3", "epoch 3 of 3"]
    assert "train/loss" in lines[0]
    assert lines[0].endswith(" s left")
    assert "left" not in lines[1]


def test_time_left_is_told_in_minutes(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    times = iter((1000.0, 1163.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    trainer = SimpleNamespace(current_epoch=0, max_epochs=4, callback_metrics={})
    lines = progress.PlainProgress()
    lines.on_train_start(trainer, None)
    lines.on_train_epoch_end(trainer, None)
    assert caplog.messages == ["epoch 1 of 4  about 8 min 09 s left"]


def test_maps_too_large_for_memory_wait_in_a_file_and_give_the_same_numbers(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "MAPS_IN_MEMORY", 0)
    trained.run(f"--ckpt_path={trained.checkpoint()}", command="test", name="from_file")
    pd.testing.assert_frame_equal(trained.record("from_file").metrics, trained.record().metrics)
    work = trained.results / "work" / "single" / "from_file"
    assert [file for file in work.rglob("*") if file.is_file()] == []
