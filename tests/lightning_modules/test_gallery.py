"""Methods side by side: the same images for all, one scale per column, and the files that paper and report need."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from lightning_modules.pictures import gallery
from lightning_modules.pictures.reconstructions import trained as load
from results.aggregator.records import read_records
from results.aggregator.report import page


@pytest.fixture(scope="module")
def two(trained):
    """Two runs of the same data."""
    trained.run("--trainer.max_epochs=1", "--model.init_args.d_model=8", name="second")
    return trained


def folders(project):
    return [str(project.results / "runs" / "single" / name) for name in ("first", "second")]


def test_runs_stand_side_by_side_on_the_images_of_the_first(two):
    out = two.folder / "pictures"
    gallery.main(["--runs", folders(two)[0], "second", f"--results={two.results}", f"--out={out}"])
    content = json.loads((out / "gallery.json").read_text())
    index = two.record().heatmaps
    shown = sorted((image["category"], image["rank"]) for image in content["images"])
    assert shown == sorted(
        (row.category, row.rank) for row in index.itertuples() if row.rank in ("worst", "median", "best")
    )
    assert content["runs"] == ["single/first", "single/second"]
    assert content["reference"] == "single/first"
    width, height = Image.open(out / "gallery.png").size
    assert 0.5 < width / height < 0.9  # four columns, six rows
    tex = (out / "gallery.tex").read_text()
    assert r"\includegraphics[width=\textwidth]{gallery.png}" in tex
    assert not re.search(r"(?<!\\)[_%]", tex.partition(r"\caption")[2]), "LaTeX would stop at it"
    assert 'alt="Methods side by side"' in page(read_records(two.results / "runs"), out, out)


def test_without_a_folder_the_picture_goes_among_the_figures(two, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "write", lambda folders, reference, out: out)
    gallery.main(["--runs", "first", f"--results={two.results}"])
    assert capsys.readouterr().out.split()[-1] == str(two.results / "figures")


def test_a_columns_scale_begins_at_the_99th_percentile_of_its_normal_pixels(two):
    module, data = load(two.results / "runs" / "single" / "first")
    data.normalise(module.extractor.mean, module.extractor.std)
    maps = np.concatenate([module.evaluate(batch)[""].maps.detach().numpy() for batch in data.normal_images()])
    low, high = gallery.colour_scale(module, data, 0.0)
    assert low == pytest.approx(np.percentile(maps, 99), rel=1e-5)
    assert (low + high) / 2 == pytest.approx(maps.max())  # a good image is never brighter than half
    assert gallery.colour_scale(module, data, 10 * high) == pytest.approx((low, 10 * high))


def test_a_method_stands_for_its_newest_run_with_a_checkpoint(two):
    assert [folder.name for folder in gallery.of_methods(["uniad"], two.results / "runs")] == ["second"]
    with pytest.raises(ValueError, match=r"of rlr in .*; there are runs of: uniad"):
        gallery.of_methods(["uniad", "rlr"], two.results / "runs")


def test_runs_of_other_test_images_are_refused(two, tmp_path, write_data, make_project):
    other = make_project(tmp_path, write_data(tmp_path / "data"))
    other.run("--trainer.max_epochs=1", "--data.init_args.contamination=0.2", name="dirty")
    with pytest.raises(SystemExit, match="is not one of its test images"):
        gallery.main(
            ["--runs", folders(two)[0], str(other.results / "runs" / "single" / "dirty"), f"--results={tmp_path}"]
        )
