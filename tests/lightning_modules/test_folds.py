"""Thresholds by cross-validation: every normal image is scored by a model that has not seen it, and the run trains on all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from lightning_modules.decisions import Decider
from lightning_modules.metrics.thresholds import PixelCollector
from lightning_modules.running import folds
from lightning_modules.running.settings import RunConfig


def module(root, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    data = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], **chosen)
    data.setup()
    return data


def test_every_training_image_is_left_out_of_one_fold_and_seen_by_nothing_there(data_root):
    everything = module(data_root)
    left = []
    for number in (1, 2, 3, 4):
        data = module(data_root, fold=(number, 4))
        scored = [i for batch in data.normal_images() for i in batch["id"].tolist()]
        trained = [i for batch in data.train_images() for i in batch["id"].tolist()]
        assert not set(scored) & set(trained)
        assert set(scored) | set(trained) == set(everything.table[everything.table.split == "train"].id)
        assert (data.normal_split, data.val_dataloader()) == ("train", [])
        assert set(data.table["category"][scored]) == {"bolt", "disc"}
        left += scored
    assert sorted(left) == everything.table[everything.table.split == "train"].id.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fold": (0, 4)}, r"found \[0, 4\]"),
        ({"fold": (1, 1)}, r"at least 2"),
        ({"fold": (1, 4), "holdout": 0.2}, "leave holdout"),
        ({"fold": (1, 7)}, "bolt has 6 training images, fewer than 7 folds"),
    ],
)
def test_folds_that_cannot_be_are_refused(data_root, options, words):
    with pytest.raises(DataError, match=words):
        module(data_root, **options)


def test_statistics_of_folds_together_are_those_of_all_maps():
    rng = np.random.default_rng(0)
    maps = [[rng.gamma(2, 1 + part, (40, 50)) for _ in range(3 + part)] for part in range(3)]
    parts, whole = [], PixelCollector()
    for part in maps:
        one = PixelCollector()
        for each in part:
            one.add(each)
            whole.add(each)
        parts.append({"a": one.statistics()})
    found, expected = folds.joined(parts)["a"], whole.statistics()
    assert found.count == expected.count
    assert (found.mean, found.sd, found.highest) == pytest.approx((expected.mean, expected.sd, expected.highest))


def test_scores_of_folds_may_have_a_rate_but_promise_none():
    normal = pd.DataFrame({"category": "a", "split": "fold", "image_score": np.arange(39.0)})
    decider = Decider(normal, alpha=0.05)
    assert decider.basis("a") == "cross validation"
    assert decider.threshold("a").value == 37  # the second highest of 39
    (sentence,) = decider.sentences()
    assert "about 0.05" in sentence
    assert "no promise" in sentence


def test_a_run_with_folds_trains_on_all_images_and_its_thresholds_are_of_models_that_had_not_seen_them(project, capsys):
    options = ("--run.folds=2", "--trainer.max_epochs=1")
    project.run(*options)
    stored = project.record()
    kept = pd.read_csv(stored.path / "normal_scores.csv")
    assert len(kept) == 12
    assert set(kept["split"]) == {"fold"}
    parts = project.results / "work/single/first/runs/folds"
    first = pd.read_csv(parts / "fold1of2/normal_scores.csv").set_index("id")
    mine = kept.set_index("id").loc[first.index]
    assert (mine["image_score"] == first["image_score"]).all()
    thresholds = pd.read_csv(stored.path / "thresholds.csv")
    assert set(thresholds["basis"]) == {"cross validation"}
    highest = kept[kept.category == "bolt"]["image_score"].max()
    chosen = thresholds[(thresholds.category == "bolt") & (thresholds.level == "image") & (thresholds.rule == "max")]
    assert chosen["threshold"].item() == pytest.approx(highest)
    assert "~ 0.143" in capsys.readouterr().out  # one of seven
    # Cut off after the folds, it goes on with what it has; the number is the one of a run that held nothing out.
    times = {path: path.stat().st_mtime_ns for path in sorted(parts.glob("*/record.json"))}
    shutil.rmtree(stored.path)
    with pytest.raises(SystemExit, match=r"were trained otherwise:\n  trainer.max_epochs: 1 then, 2 now"):
        project.run("--run.folds=2", "--trainer.max_epochs=2")
    project.run(*options)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    plain = project.fit("--trainer.max_epochs=1", name="plain").metrics
    pd.testing.assert_frame_equal(project.record().metrics, plain)


def test_folds_of_other_data_are_not_gone_on_with(tmp_path):
    run = RunConfig(name="mine", results=str(tmp_path), folds=2)
    place = run.work / "runs/folds"
    for number, hashed in enumerate(("a", "b"), 1):
        (place / f"fold{number}of2").mkdir(parents=True)
        content = {"datasets": [{"name": "folder", "fingerprint": hashed}]}
        (place / f"fold{number}of2/record.json").write_text(json.dumps(content))
    second = RunConfig(name="fold2of2", sweep="folds", results=str(run.work))
    for of in (run, second):
        with pytest.raises(SystemExit, match=r"fold1of2 was trained before the data changed"):
            folds.check_data(of, {"folder": "b"})
    shutil.rmtree(place / "fold1of2")
    for of in (run, second):
        folds.check_data(of, {"folder": "b"})
    folds.check_data(RunConfig(name="other", results=str(tmp_path)), {"folder": "c"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--run.folds=1",), "run.folds is 1"),
        (("--run.folds=3", "--data.init_args.holdout=0.2"), "none is held out besides"),
        (("--run.folds=3", "--run.protocol=as_released"), "run.selection=last"),
        (("--run.folds=9",), "fewer than 9 folds"),
        (("--run.folds=3", "--run.alpha=0.1"), "needs 9 normal images of each category, and bolt has 6"),
    ],
)
def test_what_folds_cannot_go_together_with_is_refused(project, options, words):
    with pytest.raises(SystemExit, match=words):
        project.run(*options, "--trainer.max_epochs=1")
