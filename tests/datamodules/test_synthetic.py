"""The embedded benchmark is the same everywhere and its masks are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodules.check import check
from datamodules.errors import DataError
from datamodules.readers import list_dataset
from datamodules.readers.mvtec_loco import load_regions
from datamodules.synthetic import Plan, contact_sheet, generate, render_defect, render_normal
from datamodules.synthetic.categories import CATEGORIES, LOGICAL
from datamodules.synthetic.defects import STRUCTURAL

SIZE = 96
TINY = Plan(size=64, train=2, test=1, defects=1, categories=("gasket", "wood"))


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("tiny") / "set", TINY, workers=1)


def test_it_offers_what_a_benchmark_needs():
    used = {defect for category in CATEGORIES.values() for defect in category.defects}
    assert len(CATEGORIES) >= 8
    assert len(used & set(STRUCTURAL)) >= 8
    assert used & set(STRUCTURAL) == set(STRUCTURAL), "every defect that can be drawn is used"
    assert used & set(LOGICAL) == set(LOGICAL)


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tiny, tmp_path):
    assert files(generate(tmp_path / "again", TINY, workers=2)) == files(tiny)


def test_another_seed_gives_other_pictures():
    assert not np.array_equal(render_normal("wood", 0, "train", 0, SIZE), render_normal("wood", 1, "train", 0, SIZE))


@pytest.mark.parametrize("category", CATEGORIES)
def test_normal_images_vary(category):
    first, second = (render_normal(category, 0, "train", index, SIZE).astype(int) for index in range(2))
    assert np.abs(first - second).mean() > 2


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_defect_changes_the_picture_inside_its_mask_and_nowhere_else(category):
    for defect in CATEGORIES[category].defects:
        for index, severity in enumerate((0.0, 1.0)):
            image, mask, twin = render_defect(category, 0, defect, index, SIZE, severity)
            changed = np.abs(image.astype(int) - twin).max(axis=2)
            assert mask.any(), (defect, severity)
            assert mask.mean() < 0.5, (defect, severity)
            assert changed[~mask].max() == 0, (defect, severity)
            assert (changed[mask] > 3).mean() > 0.4, (defect, severity)


@pytest.mark.parametrize(("category", "defect"), [("wood", "stain"), ("fabric", "hole"), ("steel_plate", "corrosion")])
def test_severe_defects_are_larger_or_stronger(category, defect):
    def strength(severity):
        total = 0.0
        for index in range(4):
            image, _, twin = render_defect(category, 0, defect, index, SIZE, severity)
            total += np.abs(image.astype(float) - twin).sum()
        return total

    assert strength(0.9) > 2 * strength(0.1)


def test_the_reader_finds_everything_and_knows_the_anomaly_types(tiny):
    table = list_dataset("synthetic", tiny).table
    gasket = table[table["category"] == "gasket"]
    types = dict(zip(gasket["defect"], gasket["anomaly_type"], strict=True))
    assert types == {
        "good": "good", "tear": "structural", "contamination": "structural", "chip": "structural",
        "missing_part": "logical", "extra_part": "logical", "misplaced_part": "logical",
    }  # fmt: skip
    report = check("synthetic", tiny)
    assert report.problems == ()
    assert report.masks["gasket"] == (6, 6)


def test_loco_layout_is_read_as_loco_with_its_regions(tmp_path):
    plan = Plan(size=64, train=2, test=1, defects=1, categories=("gasket",), layout="mvtec_loco")
    root = generate(tmp_path / "loco", plan, workers=1)
    table = list_dataset("mvtec_loco", root).table
    assert table["anomaly_type"].value_counts().to_dict() == {"good": 4, "structural": 3, "logical": 3}
    assert (table["split"] == "val").sum() == 1
    names = set()
    for masks in table.loc[table["label"] == 1, "mask_paths"]:
        (region,) = load_regions(masks)
        names.add(region.defect.name)
        assert 0 < region.saturation_area <= region.mask.sum()
    assert names == set(CATEGORIES["gasket"].defects)
    # Under its own name, so that no result of it can pass for one of MVTec LOCO.
    named = list_dataset("synthetic", root).table
    assert set(named["dataset"]) == {"synthetic"}
    assert named.drop(columns="dataset").equals(table.drop(columns="dataset"))


def test_a_complete_benchmark_is_kept_and_anything_else_is_not_overwritten(tiny, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*.png")}
    generate(tiny, TINY)
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*.png")} == before
    with pytest.raises(DataError, match="seed is 0, asked for is 1"):
        generate(tiny, replace(TINY, seed=1))
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="something other"):
        generate(tmp_path, TINY)
    assert json.loads((tiny / "synthetic.json").read_text())["version"] >= 1


def test_an_interrupted_generation_leaves_no_half_benchmark(tmp_path, monkeypatch):
    import datamodules.synthetic.writer as module

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "render_defect", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", TINY, workers=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert generate(tmp_path / "set", TINY, workers=1).is_dir()


@pytest.mark.parametrize("bad", [{"size": 8}, {"train": 0}, {"categories": ("woood",)}, {"layout": "coco"}])
def test_impossible_plans_are_refused(bad):
    with pytest.raises(DataError):
        Plan(**bad)


def test_contact_sheet_is_a_small_jpeg(tmp_path):
    path = contact_sheet(tmp_path / "sheet.jpg", tile=48, defects=2)
    assert path.read_bytes()[:2] == b"\xff\xd8"
    assert path.stat().st_size < 500_000
