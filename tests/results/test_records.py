"""Run records: complete or absent, checked at the door, damaged ones named."""

import dataclasses
import json
import multiprocessing
import os

import numpy as np
import pandas as pd
import pytest

from results.aggregator import records
from results.aggregator.records import (
    DamagedRecordWarning,
    RecordError,
    RunRecord,
    read_record,
    read_records,
    write_record,
)


def make_record(run="base-seed0", **changes):
    values = {
        "run": run, "sweep": "demo", "cell": {"model.init_args.neighbor_size": 7}, "method": "uniad", "profile": "demo",
        "protocol": "clean", "setting": "unified", "seed": 0, "image_size": (64, 48), "resize": "pil_bilinear",
        "backbone": {"name": "tf_efficientnet_b4.aa_in1k", "weights": "random"},
        "datasets": [{"name": "synthetic", "fingerprint": "f00d", "categories": ["tile", "bolt"]}],
        "metrics": {"version": "1", "definitions": {"image_auroc": "area"}},
    }  # fmt: skip
    return RunRecord(**{**values, **changes})


def make_metrics(value=0.9):
    rows = [("", "category", "synthetic", category, "image_auroc", value, 10, "") for category in ("tile", "bolt")]
    rows += [
        ("", "mean", "synthetic", "", "image_auroc", value, 2, ""),
        ("", "category", "synthetic", "tile", "pixel_ap", np.nan, 10, "no masks"),
    ]
    return pd.DataFrame(rows, columns=records.METRIC_COLUMNS)


HISTORY = pd.DataFrame([(0, 3, "train/loss", 0.5), (1, 6, "train/loss", 1e-7)], columns=records.HISTORY_COLUMNS)


def write(root, run="base-seed0", **changes):
    return write_record(root, make_record(run, **changes), make_metrics(), HISTORY, "seed_everything: 0\n")


def test_a_record_comes_back_exactly_as_it_was_written(tmp_path):
    record = make_record(cell={"a": np.int64(3), "b": [1, 2]}, notes=["one"])
    metrics = make_metrics(value=0.1 + 0.2)
    path = write_record(tmp_path, record, metrics, HISTORY, "a: 1\n", {"heatmaps/x.png": b"\x89PNG"})
    stored = read_record(path)
    assert stored.record == make_record(cell={"a": 3, "b": [1, 2]}, notes=["one"])
    assert stored.record.image_size == (64, 48)
    pd.testing.assert_frame_equal(stored.metrics, metrics, check_dtype=False)
    assert stored.metrics["value"][0] == 0.1 + 0.2, "values keep every digit"
    pd.testing.assert_frame_equal(stored.history, HISTORY, check_dtype=False)
    assert stored.config_text == "a: 1\n"
    assert (path / "heatmaps/x.png").read_bytes() == b"\x89PNG"
    assert [record.path for record in read_records(tmp_path)] == [path]


def test_a_writer_that_dies_leaves_no_half_record(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / "demo").iterdir()) == []
    (tmp_path / "demo" / ".base-seed0.host-1-abc.tmp").mkdir()  # what a killed process leaves
    assert len(read_records(tmp_path)) == 0
    assert read_records(tmp_path).damaged == ()


def _race(args):
    root, value = args
    try:
        write_record(root, make_record(), make_metrics(value), HISTORY, f"a: {value}\n")
        return True
    except FileExistsError:
        return False


def test_two_machines_finishing_the_same_run_cannot_mix_their_files(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        won = pool.map(_race, [(tmp_path, value / 10) for value in range(8)], chunksize=1)
    assert sum(won) == 1
    stored = read_record(tmp_path / "demo" / "base-seed0")
    assert stored.config_text == f"a: {stored.metrics['value'][0]}\n"
    assert [folder.name for folder in (tmp_path / "demo").iterdir()] == ["base-seed0"]


def test_overwriting_is_asked_for_by_name(tmp_path):
    write(tmp_path)
    with pytest.raises(FileExistsError, match="already a record"):
        write(tmp_path)
    write_record(tmp_path, make_record(), make_metrics(0.25), HISTORY, "", overwrite=True)
    assert read_record(tmp_path / "demo" / "base-seed0").metrics["value"][0] == 0.25
    assert [folder.name for folder in (tmp_path / "demo").iterdir()] == ["base-seed0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "claen"}, "Did you mean 'clean'"),
        ({"setting": "both"}, "per_category, unified"),
        ({"run": "../evil"}, "run is '../evil'"),
        ({"image_size": 224}, "height, width"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"backbone": {"name": "x"}}, "backbone has no weights"),
        ({"datasets": []}, "non-empty list"),
        ({"datasets": [{"name": "a", "fingerprint": "b"}]}, r"datasets\[0\] has no categories"),
        ({"schema": 2}, "schema is 2"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused_with_key_and_allowed_values(changes, message):
    with pytest.raises(RecordError, match=message):
        make_record(**changes)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("value", 97.3, r"image_auroc of synthetic/tile is 97.3; scores are fractions"),
        ("value", np.inf, "infinite"),
        ("value", np.nan, "neither a value nor a reason"),
        ("scope", "categry", "Did you mean 'category'"),
        ("category", "", "needs a dataset and a category"),
        ("category", "bolt", "two rows for"),
    ],
)
def test_a_metric_row_that_would_poison_a_table_is_refused(tmp_path, column, value, message):
    metrics = make_metrics()
    metrics.loc[0, column] = value
    with pytest.raises(RecordError, match=message):
        write_record(tmp_path, make_record(), metrics, HISTORY, "")
    assert not list(tmp_path.iterdir())


def test_thresholds_and_residuals_may_leave_the_unit_interval(tmp_path):
    metrics = make_metrics()
    metrics.loc[0, ["metric", "value"]] = ["dsc_threshold", 12.5]
    metrics.loc[1, ["metric", "value"]] = ["residual_normal", 40.0]
    write_record(tmp_path, make_record(), metrics, HISTORY, "")


def damage_cut(path):
    file = path / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-7])


def damage_json(path):
    (path / "record.json").write_text("{")


def damage_missing(path):
    (path / "history.csv").unlink()


def damage_unknown_key(path):
    raw = json.loads((path / "record.json").read_text())
    (path / "record.json").write_text(json.dumps({**raw, "sead": 1}))


def damage_renamed(path):
    path.rename(path.with_name("other"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "metrics.csv is not what the run wrote"),
        (damage_json, "not readable JSON"),
        (damage_missing, "no history.csv"),
        (damage_unknown_key, "unknown keys sead"),
        (damage_renamed, "record.json says demo/bad"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_still_read(tmp_path, damage, message):
    write(tmp_path, "good")
    damage(write(tmp_path, "bad"))
    with pytest.warns(DamagedRecordWarning, match=message):
        found = read_records(tmp_path)
    assert [stored.record.run for stored in found] == ["good"]
    assert len(found.damaged) == 1
    assert str(found.damaged[0].path).startswith(str(tmp_path / "demo"))


def test_a_mistyped_sweep_gets_the_nearest_name(tmp_path):
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match="Did you mean 'demo'"):
        read_records(tmp_path, "dmeo")


def test_records_sort_by_name_and_keep_random_weights_visible(tmp_path):
    for run in ("b", "a"):
        write(tmp_path, run)
    found = read_records(tmp_path, "demo")
    assert [stored.record.run for stored in found] == ["a", "b"]
    assert found[0].record.random_weights
    assert not dataclasses.replace(found[0].record, backbone={"name": "x", "weights": "imagenet"}).random_weights
    assert found[0].record.category_keys == [("synthetic", "tile"), ("synthetic", "bolt")]
