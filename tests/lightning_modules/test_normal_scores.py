"""What a score means without labels: how rare it is among normal images."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

from datamodules import unified
from lightning_modules.callbacks import normal_scores
from lightning_modules.callbacks.normal_scores import p_values
from lightning_modules.decisions import Decider


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


def test_held_out_images_are_what_a_score_is_compared_with(tmp_path, write_data, make_project, caplog, capsys):
    data_root = write_data(tmp_path / "data", train=16)
    project = make_project(tmp_path, data_root)
    caplog.set_level("INFO")
    project.fit(
        "--data.init_args.holdout=0.4", "--run.alpha=0.2", "--run.heatmaps=true", "--trainer.max_epochs=1", name="held"
    )
    table = stored(project, "held")
    assert set(table.split) == {"val"}
    assert table.groupby("category").size().to_dict() == {"bolt": 6, "disc": 6}
    assert (table.map_max > 0).all()
    check_decisions(project.record("held"), table, capsys.readouterr().out)
    config = project.results / "runs" / "single" / "held" / "config.yaml"
    predict = f"--data.init_args.predict_root={data_root / 'bolt' / 'train' / 'good'}"
    project.run(f"--config={config}", predict, command="predict", name="held")
    predicted = pd.read_csv(project.results / "work" / "single" / "held" / "predictions" / "scores.csv")
    own = table.image_score[table.category == "bolt"].to_numpy()
    # An image that was held out is scored in another batch, so its own score is met to the tolerance below.
    least, most = (p_values(predicted.image_score * factor, own) for factor in (1 + 1e-5, 1 - 1e-5))
    assert ((least - 1e-9 <= predicted.p_value) & (predicted.p_value <= most + 1e-9)).all()
    assert (most - least).max() <= 1 / (len(own) + 1) + 1e-9
    again = predicted.set_index("image").image_score
    for row in table[table.category == "bolt"].itertuples():
        assert again[row.path] == pytest.approx(row.image_score, rel=1e-5)


def check_decisions(record, table, printed):
    """The record says what each threshold would have done, and what the categories look like."""
    folder = record.path
    scores = pd.read_csv(folder / "image_scores.csv")
    found = pd.read_csv(folder / "decisions.csv", keep_default_na=False, na_values={"rate": [""], "alpha": [""]})
    chosen = found[(found.rule == "conformal") & (found.level == "image")].set_index("category")
    for category, mine in scores.groupby("category"):
        limit = np.sort(table[table.category == category].image_score)[-1]  # floor(0.2 * 7) = 1
        row = chosen.loc[category]
        assert row.threshold == pytest.approx(limit)
        assert row.rate == pytest.approx(1 / 7)
        assert row.false_alarms == (mine[mine.label == 0].image_score > limit).sum()
        assert row.misses == (mine[mine.label == 1].image_score <= limit).sum()
    assert set(found.rule) == {"max", "conformal", "mean_3sd", "p95_factor"}
    assert set(found.level) == {"image", "pixel"}
    assert "promised" in printed
    assert "misses" in printed
    assert any("category by the nearest normal features: right for" in note for note in record.record.notes)
    decider = Decider.of(folder)
    low, high = decider.colour_scale("bolt")
    assert low < table.map_max.max() < high
    assert decider.categories.can_compare
    assert set(record.heatmaps["rank"]) >= {"good", "worst", "best"}


def test_without_held_out_images_training_images_serve_and_the_output_says_so(trained, data_root, caplog):
    table = stored(trained, "first")
    assert set(table.split) == {"train"}
    assert len(table) == 12
    config = trained.results / "runs" / "single" / "first" / "config.yaml"
    predict = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    with caplog.at_level("INFO"):
        trained.run(f"--config={config}", predict, command="predict")
    assert "of 6 training (optimistic) normal images" in caplog.text


def test_a_large_set_is_represented_by_images_picked_evenly(trained, monkeypatch):
    monkeypatch.setitem(unified.NORMAL, "train", 3)
    trained.run(f"--ckpt_path={trained.checkpoint()}", command="test", name="few")
    table = stored(trained, "few")
    assert table.category.tolist() == ["bolt"] * 3 + ["disc"] * 3
    assert [int(path[-7:-4]) for path in table.path] == [0, 2, 5] * 2


def test_a_rate_that_the_held_out_images_cannot_promise_is_refused_before_the_training(project, monkeypatch):
    monkeypatch.setenv("ALPHA", "0.05")
    with pytest.raises(
        SystemExit, match=r"alpha 0.05 needs 19 held-out normal images of each category, and bolt has 0\. "
    ):
        project.run()
    assert not project.checkpoint().exists()
    monkeypatch.setenv("ALPHA", "5 %")
    with pytest.raises(SystemExit, match="ALPHA=5 % is no rate of false alarms"):
        project.run()


def test_own_folders_hold_a_fifth_out_and_say_so(tmp_path, write_data, make_project, caplog):
    project = make_project(tmp_path, write_data(tmp_path / "data", train=25), "folder")
    with caplog.at_level("INFO"):
        record = project.fit("--trainer.max_epochs=1")
    assert stored(project, "first").groupby(["category", "split"]).size().to_dict() == {
        ("bolt", "val"): 5,
        ("disc", "val"): 5,
    }
    assert "20 % of the normal training images are held out for thresholds (bolt 5, disc 5)" in caplog.text
    assert any(note.startswith("20 % of the normal") for note in record.record.notes)


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
    assert predicted.p_value.between(1 / 13, 1).all()  # of 2 + 4 images each, two held out: too few alone
