"""One model per category, for a user's own category names."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest
import yaml

from lightning_modules.running import per_category
from lightning_modules.running.command_line import main
from lightning_modules.running.per_category import run_names
from lightning_modules.running.printing import print_metrics


def test_names_of_runs_hold_plain_characters_and_stay_different():
    assert run_names(["bolt", "a b", "a/b", "-x", "M8 große"]) == ["bolt", "a_b-1", "a_b-2", "_x", "M8_gro_e"]


def test_categories_with_spaces_and_umlauts_are_trained_and_the_joint_table_is_printed(
    tmp_path, write_data, make_project, capsys
):
    root = write_data(tmp_path / "data")
    (root / "bolt").rename(root / "große Mutter")
    project = make_project(tmp_path, root, "folder")
    project.run("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    record = project.record()
    assert record.record.datasets[0]["categories"] == ["disc", "große Mutter"]
    printed = capsys.readouterr().out
    own = record.metrics[(record.metrics.scope == "mean") & (record.metrics.metric == "image_auroc")]
    last = printed[printed.rindex("┏") :]
    assert "disc" in last
    assert "große Mutter" in last
    assert f"{100 * own.value.iloc[0]:.2f}" in last


def test_predict_on_several_models_names_the_record_of_one(project, data_root):
    project.run("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test' / 'good'}"
    with pytest.raises(SystemExit) as refusal:
        project.run("--data.init_args.setting=per_category", images, command="predict")
    folder = str(refusal.value).partition("RUN=")[2].rstrip(").")
    main(["predict", f"--config={folder}/config.yaml", images, "--trainer.logger=false"])
    scores = project.results / "work/single/first/work/categories/bolt/predictions/scores.csv"
    before = pd.read_csv(scores)
    scores.unlink()
    joint = project.results / "runs/single/first"
    main(["predict", f"--run={joint}", "--category=bolt", f"--images={data_root / 'bolt' / 'test' / 'good'}"])
    pd.testing.assert_frame_equal(pd.read_csv(scores).drop(columns="category_by"), before.drop(columns="category_by"))


def test_categories_whose_names_look_like_numbers_or_nothing_stay_texts(tmp_path):
    names = ["01", "02", "NA", "null", "1e3", "bolt"]
    runs = per_category.run_names(names)
    assert len(set(runs)) == len(names)
    assert all(isinstance(yaml.safe_load(run), str) for run in runs), "the command line takes them for texts"
    folders = []
    for name, run in zip(names, runs, strict=True):
        folder = tmp_path / run
        folder.mkdir()
        (folder / "image_scores.csv").write_text(f"id,category,image_score,defect\n0,{name},0.10,\n")
        folders.append((run, folder))
    lines = per_category.join_attachments(folders)["image_scores.csv"].splitlines()
    assert lines[1:] == [f"0,{name},0.10," for name in names]


def test_a_category_that_two_data_sets_share_is_shown_with_its_data_set(capsys):
    rows = [("", "category", dataset, "wood", "image_auroc", 0.9, 4, "") for dataset in ("a", "b")]
    columns = ["variant", "scope", "dataset", "category", "metric", "value", "n", "reason"]
    print_metrics(pd.DataFrame(rows, columns=columns))
    printed = capsys.readouterr().out
    assert "a/wood" in printed
    assert "b/wood" in printed


def test_predict_needs_the_models_and_not_the_images_that_they_were_trained_on(
    tmp_path, write_data, make_project, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = write_data(tmp_path / "data")
    project = make_project(tmp_path, root)
    project.run("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    (tmp_path / "data" / "bolt" / "test" / "good").rename(tmp_path / "new")
    shutil.rmtree(root)
    images = f"--data.init_args.predict_root={tmp_path / 'new'}"
    joint = project.results / "runs" / "single" / "first" / "config.yaml"
    with pytest.raises(SystemExit, match=r"\(there are bolt, disc\)") as refusal:
        main(["predict", f"--config={joint}", images])
    folder = str(refusal.value).partition("RUN=")[2].rstrip(").")
    main(["predict", f"--config={folder}/config.yaml", images])
    assert (project.results / "work/single/first/work/categories/bolt/predictions/scores.csv").is_file()
