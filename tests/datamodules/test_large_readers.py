"""MVTec AD 2, Real-IAD and Real-IAD Variety are read as they are downloaded and as their authors split them."""

from __future__ import annotations

import json
import shutil

import pytest

from datamodules import DatasetConfig, UnifiedDataModule
from datamodules.check import check
from datamodules.errors import DataError
from datamodules.readers import base, get_reader, list_dataset


def counts(table):
    anomalous = table["label"] == 1
    splits = table["split"].value_counts().to_dict()
    return splits, int(anomalous.sum()), int((table["mask_paths"].map(len) > 0).sum())


def test_ad_2_reads_the_public_test_set_and_keeps_its_validation_folder(make, tmp_path):
    listing = list_dataset("mvtec_ad_2", make.mvtec_ad_2(tmp_path))
    assert counts(listing.table) == ({"test": 6, "train": 3, "val": 1}, 3, 3)
    assert not any("private" in path for path in listing.table["image_path"])
    assert listing.problems == ()


def test_ad_2_is_found_in_its_unpacked_folder_and_one_level_deeper(make, tmp_path):
    make.mvtec_ad_2(tmp_path / "mvtec_ad_2")
    make.mvtec_ad_2(tmp_path / "mvtec_ad_2" / "vial", "vial")  # an archive of one category, in a folder of its own
    listing = list_dataset("mvtec_ad_2", tmp_path)
    assert sorted(listing.table["category"].unique()) == ["can", "vial"]
    assert set(listing.table["category"].value_counts()) == {10}


def test_ad_2_without_a_mask_or_with_a_foreign_folder_says_so(make, tmp_path):
    root = make.mvtec_ad_2(tmp_path)
    (root / "can/test_public/ground_truth/bad/000_regular_mask.png").unlink()
    (root / "can" / "extra").mkdir()
    kinds = {(problem.severity, problem.kind) for problem in list_dataset("mvtec_ad_2", root).problems}
    assert kinds == {("error", "missing mask"), ("warning", "not read")}


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("000_regular.png", "light=regular"),
        ("012_overexposed.png", "light=shifted"),
        ("012_shift_2.png", "light=shifted"),
        ("012.png", ""),
    ],
)
def test_ad_2_tells_the_light_by_the_name(name, condition):
    assert get_reader("mvtec_ad_2").condition(f"/data_regular/x/{name}") == condition


def test_a_data_module_knows_the_lights_and_the_limits_of_its_readers(make, tmp_path):
    configs = [
        DatasetConfig("mvtec_ad_2", str(make.mvtec_ad_2(tmp_path / "two"))),
        DatasetConfig("mvtec_ad", str(make.mvtec(tmp_path / "one"))),
    ]
    data = UnifiedDataModule(configs, image_size=16, resize="pil_bilinear", batch_size=2, num_workers=0)
    data.setup()
    paths = data.table["image_path"]
    conditions = data.conditions()
    assert sorted(conditions.values()) == ["light=regular"] * 2 + ["light=shifted"] * 4
    assert all(("_regular" in paths[i]) == (condition == "light=regular") for i, condition in conditions.items())
    assert data.fpr_limits() == (0.05, 0.3)
    alone = UnifiedDataModule(configs[1:], image_size=16, resize="pil_bilinear", batch_size=2, num_workers=0)
    alone.setup()
    assert (alone.fpr_limits(), alone.conditions()) == ((0.3,), {})


@pytest.mark.parametrize("root", ["", "realiad_256"])
def test_real_iad_follows_the_authors_split_from_either_root(make, tmp_path, root):
    make.real_iad(tmp_path)
    listing = list_dataset("real_iad", tmp_path / root)
    assert counts(listing.table) == ({"train": 4, "test": 4}, 2, 1)
    assert set(listing.table["defect"]) == {"good", "scratch"}
    (problem,) = listing.problems
    assert (problem.severity, problem.kind) == ("warning", "missing mask")


def test_real_iad_names_a_category_without_its_split_file_and_masks_of_normal_views(make, tmp_path):
    make.real_iad(tmp_path)
    make.image(tmp_path / "realiad_256/vase/OK/S0001/vase_0001_OK_C1_20230101.jpg")
    file = tmp_path / "realiad_jsons/realiad_jsons/toy.json"
    content = json.loads(file.read_text())
    normal = next(entry for entry in content["test"] if entry["anomaly_class"] == "OK")
    normal["mask_path"] = next(entry["mask_path"] for entry in content["test"] if entry["mask_path"])
    file.write_text(json.dumps(content))
    problems = {problem.kind: problem for problem in list_dataset("real_iad", tmp_path).problems}
    assert problems["no split file"].category == "vase"
    assert "vase.json" in problems["no split file"].message
    assert "1 view" in problems["mask of a normal image"].message
    assert "no split file" not in {p.kind for p in list_dataset("real_iad", tmp_path, ["toy"]).problems}


def test_masks_of_good_images_of_a_folder_are_told(make, tmp_path):
    make.mvtec(tmp_path, "bolt", train=2, normal=2, defects=1)
    make.mask(tmp_path / "bolt/ground_truth/good/000_mask.png")
    kinds = [problem.kind for problem in list_dataset("folder", tmp_path).problems]
    assert kinds.count("mask of a normal image") == 1


def test_real_iad_names_the_resolutions_when_there_are_several(make, tmp_path):
    make.real_iad(tmp_path)
    make.real_iad(tmp_path, images="realiad_512")
    with pytest.raises(DataError, match="realiad_256, realiad_512"):
        list_dataset("real_iad", tmp_path)
    table = list_dataset("real_iad", tmp_path / "realiad_512").table
    assert all("realiad_512" in path for path in table["image_path"])


def test_real_iad_split_files_may_lie_one_level_higher_and_images_one_deeper(make, tmp_path):
    make.real_iad(tmp_path, jsons="realiad_jsons")
    shutil.move(tmp_path / "realiad_256/toy", tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "realiad_256/toy/toy")
    assert counts(list_dataset("real_iad", tmp_path).table)[0] == {"train": 4, "test": 4}


def test_real_iad_single_view_is_a_dataset_of_its_own(make, tmp_path):
    make.real_iad(tmp_path)
    content = json.loads((tmp_path / "realiad_jsons/realiad_jsons/toy.json").read_text())
    for split in ("train", "test"):
        content[split] = [entry for entry in content[split] if "_C1_" in entry["image_path"]]
    folder = tmp_path / "realiad_jsons/realiad_jsons_sv"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps(content))
    assert counts(list_dataset("real_iad_sv", tmp_path).table) == ({"train": 2, "test": 2}, 1, 1)
    assert counts(list_dataset("real_iad", tmp_path).table)[0] == {"train": 4, "test": 4}


def test_variety_counts_a_view_without_a_visible_defect_as_normal(make, tmp_path):
    make.real_iad(tmp_path, images="realiadvariety_raw", jsons="realiadvariety_jsons/Real-IAD_Variety_jsons")
    listing = list_dataset("real_iad_variety", tmp_path)
    assert counts(listing.table) == ({"train": 4, "test": 4}, 1, 1)
    assert listing.problems == ()


def test_a_file_that_a_split_names_but_is_absent_stops_a_run(make, tmp_path):
    make.real_iad(tmp_path)
    gone = next((tmp_path / "realiad_256/toy/OK/S0001").iterdir())
    gone.unlink()
    problems = list_dataset("real_iad", tmp_path).problems
    (found,) = [problem for problem in problems if problem.severity == "error"]
    assert found.files == (str(gone),)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content.pop("test"), "lists train and test are missing"),
        (lambda content: content["test"].append({"image_path": "a.jpg"}), r"test\[4\]"),
        (lambda content: content["test"][0].update(image_path="../../etc/passwd"), "leads out of"),
    ],
)
def test_a_split_file_that_is_not_the_authors_is_named_with_its_place(make, tmp_path, change, told):
    make.real_iad(tmp_path)
    file = tmp_path / "realiad_jsons/realiad_jsons/toy.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        list_dataset("real_iad", tmp_path)


def test_defects_in_a_training_split_are_an_error(make, tmp_path):
    make.real_iad(tmp_path)
    file = tmp_path / "realiad_jsons/realiad_jsons/toy.json"
    content = json.loads(file.read_text())
    content["train"].append(content["test"].pop(2))
    file.write_text(json.dumps(content))
    errors = [problem.kind for problem in list_dataset("real_iad", tmp_path).problems if problem.severity == "error"]
    assert "anomalous training image" in errors


def test_check_data_compares_the_sum_with_the_published_totals(make, tmp_path, monkeypatch):
    make.real_iad(tmp_path)
    kind = type(get_reader("real_iad"))
    assert kind.totals[1].train + kind.totals[1].test_good + kind.totals[1].structural == 151050
    monkeypatch.setattr(kind, "totals", (1, base.Counts(train=4, test_good=2, structural=3)))
    (found,) = [p for p in check("real_iad", tmp_path).problems if p.kind == "other counts than published"]
    assert found.message == "all 1 categories: structural 2 instead of 3"


def test_a_folder_of_mvtec_ad_2_s_public_test_set_that_is_not_read_is_named(make, tmp_path):
    root = make.mvtec_ad_2(tmp_path)
    category = list_dataset("mvtec_ad_2", root).available[0]
    (root / category / "test_public" / "ugly").mkdir()
    problems = list_dataset("mvtec_ad_2", root).problems
    assert [problem.kind for problem in problems if "ugly/" in problem.message] == ["not read"]
