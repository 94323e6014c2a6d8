"""Every layout that users download is read as its authors meant it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from datamodules import DatasetConfig
from datamodules.errors import DataError
from datamodules.images import read_mask
from datamodules.readers import get_reader, list_dataset, load_readers
from datamodules.readers.mvtec_loco import load_regions


def only(table, **equal):
    for column, value in equal.items():
        table = table[table[column] == value]
    return table


def kinds(listing):
    return sorted((problem.severity, problem.kind) for problem in listing.problems)


@pytest.mark.parametrize(
    ("name", "train", "val", "test_good", "structural", "logical"),
    [
        ("mvtec_ad", 3629, 0, 467, 1258, 0),
        ("mvtec_loco", 1772, 304, 575, 432, 561),
        ("btad", 1799, 0, 451, 290, 0),
        ("mpdd", 888, 0, 176, 282, 0),
        ("visa", 8659, 0, 962, 1200, 0),
    ],
)
def test_published_counts_add_up_to_the_published_totals(name, train, val, test_good, structural, logical):
    counts = get_reader(name).counts.values()
    totals = [sum(getattr(c, f) for c in counts) for f in ("train", "val", "test_good", "structural", "logical")]
    assert totals == [train, val, test_good, structural, logical]


def test_mvtec_ad_is_read_with_masks_types_and_order(make, tmp_path):
    make.mvtec(tmp_path, "bottle")
    make.mvtec(tmp_path, "cable", train=3)
    listing = list_dataset("mvtec_ad", tmp_path)
    table = listing.table
    assert listing.problems == ()
    assert table["category"].unique().tolist() == ["bottle", "cable"]
    assert len(only(table, category="cable", split="train")) == 3
    broken = only(table, category="bottle", defect="broken")
    assert broken["label"].tolist() == [1, 1]
    assert broken["anomaly_type"].unique().tolist() == ["structural"]
    for row in broken.itertuples():
        assert Path(row.mask_paths[0]).name == Path(row.image_path).stem + "_mask.png"
    assert table["id"].tolist() == list(range(len(table)))
    assert only(table, label=0)["mask_paths"].map(len).sum() == 0


def test_masks_are_paired_by_name_where_sorting_would_mix_them_up(make, tmp_path):
    names = ["1", "10", "2", "a-b", "a"]
    for number, name in enumerate(names):
        make.image(tmp_path / "c" / "test" / "cut" / f"{name}.png", seed=number)
        make.mask(tmp_path / "c" / "ground_truth" / "cut" / f"{name}_mask.png", rows=slice(number, number + 1))
    make.image(tmp_path / "c" / "train" / "good" / "0.png")
    table = list_dataset("mvtec_ad", tmp_path).table
    for row in only(table, defect="cut").itertuples():
        number = names.index(Path(row.image_path).stem)
        assert read_mask(row.mask_paths).any(axis=1).nonzero()[0].tolist() == [number]


def test_words_in_parent_folders_do_not_matter(make, tmp_path):
    root = make.loco(tmp_path / "test" / "my_train_data" / "ground_truth")
    listing = list_dataset("mvtec_loco", root)
    assert listing.problems == ()
    assert only(listing.table, label=1)["mask_paths"].map(len).tolist() == [2, 1]


def test_hidden_files_are_no_images(make, tmp_path):
    root = make.mvtec(tmp_path)
    for folder in ("train/good", "test/broken", "ground_truth/broken"):
        (root / "bottle" / folder / ".DS_Store").write_bytes(b"x")
        (root / "bottle" / folder / "._000.png").write_bytes(b"x")
    (root / ".cache" / "train").mkdir(parents=True)
    listing = list_dataset("mvtec_ad", root)
    assert listing.problems == ()
    assert len(listing.table) == 8
    assert listing.available == ("bottle",)


def test_loco_keeps_types_validation_folder_and_the_union_of_its_masks(make, tmp_path):
    table = list_dataset("mvtec_loco", make.loco(tmp_path)).table
    assert table["split"].value_counts().to_dict() == {"train": 3, "val": 2, "test": 3}
    logical = only(table, anomaly_type="logical").iloc[0]
    rows = read_mask(logical["mask_paths"]).any(axis=1).nonzero()[0].tolist()
    assert rows == [0, 1, 2, 10, 11, 12, 13, 14, 15]
    assert len(only(table, anomaly_type="structural")) == 1


def test_loco_regions_come_with_their_saturation(make, tmp_path):
    table = list_dataset("mvtec_loco", make.loco(tmp_path)).table
    first, second = load_regions(only(table, anomaly_type="logical").iloc[0]["mask_paths"])
    assert (first.defect.name, first.mask.sum(), first.saturation_area) == ("missing", 21, 10)
    assert (second.defect.name, second.mask.sum(), second.saturation_area) == ("extra", 42, 21)
    assert first.mask.shape == (40, 48)
    assert load_regions(()) == []


def test_loco_region_of_an_unknown_value_is_an_error(make, tmp_path):
    root = make.loco(tmp_path)
    path = make.mask(root / "pushpins" / "ground_truth" / "structural_anomalies" / "000" / "000.png", 99)
    with pytest.raises(DataError, match=r"pixel value 99 is not among \[1, 236, 237\]"):
        load_regions((str(path),))


def test_btad_reads_both_suffixes(make, tmp_path):
    for root in (make.btad(tmp_path), tmp_path / "BTech_Dataset_transformed"):
        listing = list_dataset("btad", root)
        assert listing.problems == ()
        assert len(listing.table) == 8
        masks = [Path(paths[0]).suffix for paths in only(listing.table, label=1)["mask_paths"]]
        assert masks == [".png", ".bmp"]
        assert only(listing.table, label=1)["defect"].tolist() == ["ko", "ko"]
        assert only(listing.table, category="01", split="test")["defect"].tolist() == ["good", "ko"]


def test_btad_converted_in_place_is_not_counted_twice(make, tmp_path):
    base = make.btad(tmp_path) / "BTech_Dataset_transformed" / "03"
    for bmp in list(base.rglob("*.bmp")):
        make.image(bmp.with_suffix(".png")) if "ground_truth" not in bmp.parts else make.mask(bmp.with_suffix(".png"))
    listing = list_dataset("btad", tmp_path, ["03"])
    assert len(listing.table) == 4
    assert {Path(p).suffix for p in listing.table["image_path"]} == {".png"}
    assert {severity for severity, _ in kinds(listing)} == {"warning"}


def test_mpdd_is_read_like_mvtec(make, tmp_path):
    make.mvtec(tmp_path, "tubes")
    assert len(list_dataset("mpdd", tmp_path, ["tubes"]).table) == 8


def test_visa_raw_follows_its_split_file(make, tmp_path):
    listing = list_dataset("visa", make.visa_raw(tmp_path))
    assert listing.problems == ()
    assert listing.table["split"].tolist() == ["train", "train", "test", "test"]
    anomalous = only(listing.table, label=1).iloc[0]
    assert read_mask(anomalous["mask_paths"]).sum() == 35  # stored as ones, which look black


def test_visa_converted_layout_and_its_parent_folder(make, tmp_path):
    base = tmp_path / "visa_pytorch" / "candle"
    make.image(base / "train" / "good" / "0001.JPG")
    make.image(base / "test" / "bad" / "000.JPG")
    make.mask(base / "ground_truth" / "bad" / "000.png")
    for root in (tmp_path, tmp_path / "visa_pytorch"):
        table = list_dataset("visa", root).table
        assert only(table, label=1)["mask_paths"].map(len).tolist() == [1]


def test_visa_file_named_in_the_split_but_absent_is_an_error(make, tmp_path):
    root = make.visa_raw(tmp_path)
    (root / "candle/Data/Images/Anomaly/000.JPG").unlink()
    assert ("error", "missing image") in kinds(list_dataset("visa", root))


def test_folder_takes_a_root_of_categories_or_one_category(make, tmp_path):
    root = make.mvtec(tmp_path / "parts", "nut")
    make.mvtec(root, "bolt")
    assert list_dataset("folder", root).available == ("bolt", "nut")
    assert list_dataset("folder", root / "nut").table["category"].unique().tolist() == ["nut"]


def test_folder_needs_no_masks(make, tmp_path):
    root = make.mvtec(tmp_path, "nut")
    shutil.rmtree(root / "nut" / "ground_truth")
    listing = list_dataset("folder", root)
    assert listing.problems == ()
    assert only(listing.table, label=1)["mask_paths"].map(len).tolist() == [0, 0]


def test_normal_images_may_lie_in_a_folder_with_a_capital(make, tmp_path):
    make.mvtec(tmp_path, "nut")
    for split, name in (("train", "Good"), ("test", "OK")):
        (tmp_path / "nut" / split / "good").rename(tmp_path / "nut" / split / name)
    listing = list_dataset("folder", tmp_path)
    assert listing.problems == ()
    assert only(listing.table, split="test")["defect"].tolist() == ["good", "good", "broken", "broken"]


def test_folder_accepts_the_three_ways_to_name_masks(make, tmp_path):
    make.image(tmp_path / "nut" / "train" / "0.jpg")
    make.image(tmp_path / "nut" / "test" / "good" / "0.jpg")
    for stem in ("a", "b", "c"):
        make.image(tmp_path / "nut" / "test" / "cut" / f"{stem}.jpg")
    truth = tmp_path / "nut" / "ground_truth" / "cut"
    make.mask(truth / "a_mask.png")
    make.mask(truth / "b.png")
    make.mask(truth / "c" / "000.png")
    make.mask(truth / "c" / "001.png", rows=slice(10, 12))
    listing = list_dataset("folder", tmp_path)
    assert listing.problems == ()
    assert only(listing.table, label=1)["mask_paths"].map(len).tolist() == [1, 1, 2]


def test_folder_with_some_masks_missing_warns_and_with_all_misnamed_stops(make, tmp_path):
    root = make.mvtec(tmp_path, "nut")
    truth = root / "nut" / "ground_truth" / "broken"
    (truth / "000_mask.png").rename(truth / "000_label.png")
    assert kinds(list_dataset("folder", root)) == [("warning", "missing mask"), ("warning", "orphan mask")]
    (truth / "001_mask.png").rename(truth / "001_label.png")
    assert ("error", "missing mask") in kinds(list_dataset("folder", root))


def test_folder_reads_logical_anomalies_from_the_folder_name(make, tmp_path):
    make.loco(tmp_path)
    table = list_dataset("folder", tmp_path).table
    assert table["anomaly_type"].value_counts().to_dict() == {"good": 6, "logical": 1, "structural": 1}


def test_missing_mask_of_a_public_dataset_is_an_error(make, tmp_path):
    root = make.mvtec(tmp_path)
    (root / "bottle" / "ground_truth" / "broken" / "001_mask.png").unlink()
    listing = list_dataset("mvtec_ad", root)
    assert kinds(listing) == [("error", "missing mask")]
    assert listing.problems[0].files[0].endswith("001.png")
    assert "leave" not in listing.problems[0].message
    assert listing.problems[0].message.endswith("read it with DATASET=folder, where masks are optional")
    shutil.rmtree(root / "bottle" / "ground_truth")
    assert kinds(list_dataset("mvtec_ad", root)) == [("error", "missing mask")]
    assert list_dataset("folder", root).problems == ()


def test_duplicate_stem_is_told(make, tmp_path):
    root = make.mvtec(tmp_path)
    make.image(root / "bottle" / "train" / "good" / "000.jpg")
    make.image(root / "bottle" / "test" / "broken" / "000.jpg")
    assert kinds(list_dataset("folder", root)) == [("error", "duplicate stem"), ("warning", "duplicate stem")]


def test_category_without_normals_is_told(make, tmp_path):
    root = make.mvtec(tmp_path)
    shutil.rmtree(root / "bottle" / "train" / "good")
    assert ("error", "category without normals") in kinds(list_dataset("mvtec_ad", root))


@pytest.mark.parametrize(
    ("name", "categories", "message"),
    [
        ("mvtec", None, "Did you mean 'mvtec_ad'"),
        ("mvtec_ad", ["botle"], "Did you mean 'bottle'"),
        ("mvtec_ad", [], "list of categories is empty"),
        ("mvtec_loco", ["Bottle"], "Did you mean 'bottle'"),
    ],
)
def test_wrong_names_get_the_nearest_one(make, tmp_path, name, categories, message):
    make.mvtec(tmp_path)
    with pytest.raises(DataError, match=message):
        list_dataset(name, tmp_path, categories)


def test_wrong_roots_say_what_is_there_and_what_should_be(make, tmp_path):
    make.mvtec(tmp_path / "mvtec")
    with pytest.raises(DataError, match=r"not a folder.*train/good"):
        list_dataset("mvtec_ad", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"did you mean .*mvtec\?"):
        list_dataset("mvtec_ad", tmp_path)
    with pytest.raises(DataError, match="categories=bottle"):
        list_dataset("mvtec_ad", tmp_path / "mvtec" / "bottle")
    with pytest.raises(DataError, match=r"synthetic\.json"):
        list_dataset("synthetic", tmp_path / "mvtec")


def test_a_new_dataset_is_one_new_file(make, tmp_path, monkeypatch):
    import datamodules.readers.base as base

    code = """
        from datamodules.readers import DatasetReader, register
        from datamodules.tree import read_tree

        @register
        class Mine(DatasetReader):
            name, layout = "mine", "like MVTec AD"

            def read_category(self, root, category, problems):
                return read_tree(category, root / category, problems)
    """
    package = tmp_path / "code"
    package.mkdir()
    (package / "my_own_reader.py").write_text(textwrap.dedent(code))
    monkeypatch.setattr(base, "__file__", str(package / "base.py"))
    monkeypatch.setattr(base, "__package__", "datamodules.readers")
    monkeypatch.setattr(sys.modules["datamodules.readers"], "__path__", [str(package)])
    monkeypatch.setattr(base, "READERS", dict(base.READERS))
    assert "mine" in load_readers()
    assert len(list_dataset("mine", make.mvtec(tmp_path / "data")).table) == 8
    sys.modules.pop("datamodules.readers.my_own_reader")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",", ";"), r"line 1: no column object, split, .*separated by commas"),
        (
            lambda text: text.replace("candle,train", "candle,Train", 1),
            r"line 2: split 'Train'; split is one of train, val",
        ),
        (lambda text: text.replace(",normal,", ",good,", 1), r"line 2: label 'good'; label is one of normal, anomaly"),
        (lambda text: text + "candle,test\n", r"line 6: only 2 cells, .*'candle', 'test'.*label is one of"),
        (lambda text: text + "candle,test,normal\n", r"line 6: 3 cells.*names its object, split, label and image"),
        (lambda text: text + ",test,normal,a.png,\n", r"line 6: 5 cells.*names its object"),
        (lambda text: "", r"line 1: no column object"),
        (
            lambda text: text + "candle,test,normal,../../a.png,\n",
            r"line 6: image '\.\./\.\./a\.png' leads out of the data",
        ),
        (
            lambda text: text + "candle,test,anomaly,a.png,/etc/passwd\n",
            r"line 6: mask '/etc/passwd' leads out of the data",
        ),
    ],
)
def test_a_wrong_row_of_visas_csv_is_named_with_its_line(make, tmp_path, change, message):
    file = make.visa_raw(tmp_path) / "split_csv" / "1cls.csv"
    file.write_text(change(file.read_text().replace("\r\n", "\n")))
    with pytest.raises(DataError, match=rf"1cls\.csv, {message}"):
        list_dataset("visa", tmp_path)


def test_visas_csv_may_have_a_byte_order_mark_blank_lines_and_any_name_of_an_object(make, tmp_path):
    file = make.visa_raw(tmp_path) / "split_csv" / "1cls.csv"
    text = file.read_text().replace("candle,", "null,") + "\n\n,,,,\n"
    file.write_text(text, encoding="utf-8-sig")
    listing = list_dataset("visa", tmp_path)
    assert listing.available == ("null",)
    assert set(listing.table["category"]) == {"null"}
    file.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        list_dataset("visa", tmp_path)


@pytest.mark.parametrize("category", ["01", "NA", "null", "1e3"])
def test_categories_that_look_like_numbers_or_nothing_stay_text(make, tmp_path, category):
    make.mvtec(tmp_path, category)
    for asked in (None, category, (category,)):
        config = DatasetConfig("folder", str(tmp_path), asked)
        table = list_dataset(config.name, config.root, config.categories).table
        assert set(table["category"]) == {category}
