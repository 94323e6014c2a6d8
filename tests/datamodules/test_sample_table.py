"""The sample table: what holds for every dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.readers import list_dataset
from datamodules.sample_table import (
    COLUMNS,
    Sample,
    build_table,
    category_keys,
    concatenate,
    fingerprint,
    hold_out,
    validate,
)


def normal(number: int, category: str = "c", split: str = "train") -> Sample:
    return Sample(category, split, "good", "good", f"/x/{category}/{split}/{number:03d}.png")


def print_of(listing) -> str:
    return fingerprint(listing.table, {listing.reader.name: listing.root})


def test_columns_and_types_are_the_agreed_ones(make, tmp_path):
    table = list_dataset("mvtec_ad", make.mvtec(tmp_path)).table
    assert tuple(table.columns) == COLUMNS
    assert str(table["id"].dtype) == str(table["label"].dtype) == "int64"
    assert all(isinstance(masks, tuple) for masks in table["mask_paths"])


def test_fingerprint_is_the_same_wherever_the_data_lies(make, tmp_path):
    first = list_dataset("mvtec_ad", make.mvtec(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "else")
    second = list_dataset("mvtec_ad", tmp_path / "there" / "else")
    assert print_of(first) == print_of(second)
    assert len(print_of(first)) == 64


@pytest.mark.parametrize("change", ["rename", "other size", "other mask", "fewer"])
def test_fingerprint_changes_with_the_data(make, tmp_path, change):
    root = make.mvtec(tmp_path)
    before = print_of(list_dataset("folder", root))
    image = root / "bottle" / "train" / "good" / "000.png"
    if change == "rename":
        image.rename(image.with_name("999.png"))
    elif change == "other size":
        make.image(image, size=(40, 40), seed=3)
    elif change == "other mask":
        (root / "bottle" / "ground_truth" / "broken" / "000_mask.png").unlink()
    else:
        image.unlink()
    assert print_of(list_dataset("folder", root)) != before


def test_holdout_depends_on_names_only_and_leaves_every_category_something():
    table = build_table("d", [normal(i, c) for c, n in (("a", 20), ("b", 3)) for i in range(n)])
    held = hold_out(table, 0.1)
    assert held[held["split"] == "val"]["category"].value_counts().to_dict() == {"a": 2, "b": 1}
    moved = build_table(
        "d",
        [
            Sample(s.category, "train", "good", "good", f"/y{s.image_path}")
            for s in [normal(i, c) for c, n in (("a", 20), ("b", 3)) for i in range(n)]
        ],
    )
    names = [sorted(Path(p).name for p in t[t["split"] == "val"]["image_path"]) for t in (held, hold_out(moved, 0.1))]
    assert names[0] == names[1]
    assert (hold_out(table, 0.9)["split"] == "train").groupby(table["category"]).sum().min() >= 1
    assert (hold_out(table, 0.0)["split"] == "train").all()
    assert (table["split"] == "train").all(), "the argument must stay as it is"


def test_each_datasets_own_share_is_held_out_only_where_that_makes_enough_images():
    samples = [normal(k, c) for c, n in (("a", 23), ("b", 22)) for k in range(n)]
    table = build_table("folder", samples)
    held = hold_out(table, None, {"folder": 0.2})
    assert (held["split"] == "val").groupby(held["category"]).sum().to_dict() == {"a": 5, "b": 0}
    assert (hold_out(table, None)["split"] == "train").all()
    assert (hold_out(table, 0.1, {"folder": 0.5})["split"] == "val").sum() == 4


def test_holdout_leaves_a_validation_folder_alone():
    table = build_table("d", [normal(i) for i in range(10)] + [normal(i, split="val") for i in range(2)])
    assert (hold_out(table, 0.5)["split"] == "val").sum() == 2


def test_categories_of_several_datasets_do_not_collide():
    joined = concatenate([build_table("first", [normal(0)]), build_table("second", [normal(1)])])
    assert category_keys(joined) == ["first/c", "second/c"]
    assert joined["id"].tolist() == [0, 1]
    assert category_keys(build_table("first", [normal(0)])) == ["c"]
    with pytest.raises(DataError, match="label"):
        concatenate([build_table("first", [normal(0)]), build_table("first", [normal(1)])])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 1, "contradicts"),
        ("label", 2, "label is 2"),
        ("split", "dev", "split is dev"),
        ("anomaly_type", "bad", "anomaly_type is bad"),
        ("id", 7, "count 0"),
    ],
)
def test_a_table_that_breaks_the_schema_is_refused(column, value, message):
    table = build_table("d", [normal(0), normal(1)])
    table.loc[1, column] = value
    with pytest.raises(DataError, match=message):
        validate(table)


def test_anomalous_training_images_and_repeated_files_are_refused():
    with pytest.raises(DataError, match="only test may hold them"):
        build_table("d", [Sample("c", "train", "cut", "structural", "/x/1.png")])
    with pytest.raises(DataError, match="listed twice"):
        build_table("d", [normal(0), normal(0)])
