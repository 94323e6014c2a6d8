"""What a score means without labels: how rare it is among normal images."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

from datamodules import unified
from lightning_modules.callbacks import normal_scores
from lightning_modules.callbacks.normal_scores import p_values


def test_a_p_value_counts_the_normal_images_that_score_at_least_as_high():
    rng = np.random.default_rng(0)
    normal = rng.integers(0, 9, 40) / 8  # ties
    scores = np.concatenate([normal[:10], [-1.0, 2.0, 0.3]])
    expected = [(1 + (normal >= score).sum()) / 41 for score in scores]
    np.testing.assert_allclose(p_values(scores, normal), expected, rtol=1e-15)


def test_a_normal_image_gets_one_of_at_most_p_with_probability_p_at_most():
    """The promise of a conformal p-value, over many draws of the normal images."""
    rng = np.random.default_rng(1)
    values = [p_values(rng.normal(size=1), rng.normal(size=19))[0] for _ in range(4000)]
    for level in (0.05, 0.25, 0.5):
        share = np.mean(np.array(values) <= level)
        assert share <= level + 4 * np.sqrt(level * (1 - level) / 4000)  # four standard errors


def stored(project, name: str) -> pd.DataFrame:
    return normal_scores.read(project.results / "runs" / "single" / name)


def test_held_out_images_are_what_a_score_is_compared_with(project, data_root):
    project.fit("--data.init_args.holdout=0.34", "--trainer.max_epochs=1", name="held")
    table = stored(project, "held")
    assert set(table.split) == {"val"}
    assert table.groupby("category").size().to_dict() == {"bolt": 2, "disc": 2}  # a third of six images each
    config = project.results / "runs" / "single" / "held" / "config.yaml"
    predict = f"--data.init_args.predict_root={data_root / 'bolt' / 'train' / 'good'}"
    project.run(f"--config={config}", predict, command="predict", name="held")
    predicted = pd.read_csv(project.results / "work" / "single" / "held" / "predictions" / "scores.csv")
    np.testing.assert_allclose(predicted.p_value, p_values(predicted.image_score, table.image_score.to_numpy()))
    again = predicted.set_index("image").image_score
    for row in table[table.category == "bolt"].itertuples():
        assert again[row.path] == pytest.approx(row.image_score, rel=1e-5)


def test_without_held_out_images_training_images_serve_and_the_output_says_so(trained, data_root, caplog):
    table = stored(trained, "first")
    assert set(table.split) == {"train"}
    assert len(table) == 12
    config = trained.results / "runs" / "single" / "first" / "config.yaml"
    predict = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    with caplog.at_level("INFO"):
        trained.run(f"--config={config}", predict, command="predict")
    assert "of the run's 12 training images" in caplog.text


def test_a_large_set_is_represented_by_images_picked_evenly(trained, monkeypatch):
    monkeypatch.setitem(unified.NORMAL, "train", 4)
    trained.run(f"--ckpt_path={trained.checkpoint()}", command="test", name="few")
    table = stored(trained, "few")
    assert len(table) == 4
    assert set(table.category) == {"bolt", "disc"}


def test_photographs_of_good_products_alone_are_enough_to_train_and_to_predict(
    tmp_path, write_data, make_project, caplog
):
    root = write_data(tmp_path / "data")
    photographs = tmp_path / "photographs"
    shutil.move(root / "bolt" / "test", photographs)
    shutil.rmtree(root / "disc" / "test")
    project = make_project(tmp_path, root, "folder")
    with caplog.at_level("INFO"):
        record = project.fit("--data.init_args.holdout=0.34")
    assert "nothing is measured" in caplog.text
    assert any("No test image" in note for note in record.record.notes)
    assert record.metrics.value.isna().all()
    assert set(record.metrics.reason[record.metrics.scope == "category"]) == {"no anomalous image"}
    config = project.results / "runs" / "single" / "first" / "config.yaml"
    project.run(f"--config={config}", f"--data.init_args.predict_root={photographs}", command="predict")
    predicted = pd.read_csv(project.results / "work" / "single" / "first" / "predictions" / "scores.csv")
    assert len(predicted) == 5
    assert predicted.p_value.between(1 / 5, 1).all()
