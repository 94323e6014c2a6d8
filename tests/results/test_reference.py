"""Reference records: tables before any training, never in the way of one's own runs, and nothing of the machine in them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from results.__main__ import main
from results.aggregator import reference
from results.aggregator.records import RecordError, read_record, read_records
from results.aggregator.scores import kinds
from results.aggregator.spec import Entry, Spec
from results.aggregator.verify import NOISE, PIXELS, compare, tolerance

CODE = {"hash": "0" * 64, "roots": ["models.uniad"]}
KEY = "model.init_args.query"


@pytest.fixture
def project(tmp_path, runs_at):
    """Folders of own and of reference records, and a command line that shows one sweep's table as CSV or Markdown."""

    class Project:
        own, reference = runs_at(tmp_path / "results" / "runs"), runs_at(tmp_path / "results" / "reference")

        def table(self, capsys, sweep="toy", form="markdown", *more):
            own = tmp_path / "results" / "runs"
            code = main(["sweep", sweep, "--root", str(own), "--sweeps", str(tmp_path), "--format", form, *more])
            captured = capsys.readouterr()
            assert code == 0, captured.err
            return captured.out

        def lines(self, capsys, sweep="toy"):
            """Number shown in the first column of every row, by the row's label."""
            rows = [line.split("|") for line in self.table(capsys, sweep).splitlines() if line.startswith("| ")][1:]
            return {row[1].strip(): row[2].strip() for row in rows}

    return Project()


def add(runs, query, seed=0, value=0.9, **more):
    return runs.add("toy", {KEY: query}, seed, value, **more)


def test_own_runs_take_the_place_of_the_references_of_their_cell_and_are_not_averaged_with_them(project, capsys):
    for seed in (0, 1, 2):
        add(project.reference, "none", seed, 0.5)
        add(project.reference, "first", seed, 0.6)
    assert all("†" in number for number in project.lines(capsys).values())
    add(project.own, "none", 7, 0.9)
    shown = project.lines(capsys)
    assert shown["none"].replace("*", "").startswith("90.0")
    assert "†" not in shown["none"]
    assert "60.0 ± 0.0" in shown["first"]
    assert "†" in shown["first"]


def test_a_table_without_own_runs_says_whose_numbers_it_shows_and_that_their_code_is_older(project, capsys):
    add(project.reference, "none", provenance={"git_commit": "c0ffee" * 6, reference.CODE: CODE})
    text = project.table(capsys)
    assert "† Reference records, which come with the project" in text
    assert "All reference records here are older than the code that runs now (commit c0ffeec0ff)" in text


def test_a_record_of_the_code_that_runs_is_not_called_older(project, capsys):
    now = {**CODE, "hash": reference._code_now(("models.uniad",))}
    add(project.reference, "none", provenance={"git_commit": "c0ffee" * 6, reference.CODE: now})
    assert "older" not in project.table(capsys)


@pytest.mark.parametrize(
    "other",
    [
        {"metrics": {"version": "2"}},
        {"backbone": {"name": "tiny", "weights": "random"}},
        {"image_size": (96, 96)},
        {"datasets": [{"name": "synthetic", "fingerprint": "beef" * 16, "categories": ["bolt", "gear", "tile"]}]},
    ],
)
def test_own_runs_under_other_conditions_are_never_refused_for_the_sake_of_a_reference(project, capsys, other):
    add(project.reference, "none", value=0.5)
    add(project.own, "first", value=0.9, **other)
    add(project.own, "layerwise", value=0.8, **other)
    shown = project.lines(capsys)
    assert set(shown) == {"first", "layerwise"}
    assert "†" not in "".join(shown.values())


def test_one_experiment_over_methods_is_not_refused_for_the_references_of_another(project, capsys):
    for runs, experiment in ((project.reference, "recipe"), (project.own, "matched")):
        for method in ("padim", "uniad"):
            cell = {"method": method, "compare": experiment, "data.init_args.setting": "per_category"}
            runs.add("methods", cell, run=f"{method}-{experiment}", method=method, setting="per_category")
    text = project.table(capsys, "methods", "markdown", "--sweeps", "sweeps")
    assert "90.0" in text
    assert "†" not in text


def test_experiments_over_methods_have_a_table_each_the_unified_one_first(project, capsys):
    for setting in ("per_category", "unified"):
        for method in ("padim", "uniad"):
            cell = {"method": method, "compare": "recipe", "data.init_args.setting": setting}
            project.reference.add("methods", cell, run=f"{method}-{setting}", method=method, setting=setting)
    text = project.table(capsys, "methods", "markdown", "--sweeps", "sweeps")
    titles = [
        line for line in text.splitlines() if line.startswith("**") and "one model" in line and "against" not in line
    ]
    assert [title.rpartition(", ")[2] for title in titles] == [
        "one model for all categories**",
        "one model per category**",
    ]


def test_what_a_sweep_compares_on_purpose_may_differ_between_own_and_reference(runs_at, tmp_path):
    own, coming = runs_at(tmp_path / "a"), runs_at(tmp_path / "b")
    own.add("toy", {KEY: 1}, backbone={"name": "one", "weights": "imagenet"})
    coming.add("toy", {KEY: 2}, backbone={"name": "two", "weights": "imagenet"})
    both = [own.read(), [replace(stored, reference=True) for stored in coming.read()]]
    assert len(reference.complete(*both)) == 1
    assert len(reference.complete(*both, varies=lambda sweep: ("backbone", "weights"))) == 2


def test_references_on_two_layouts_of_one_data_set_stand_in_two_tables(runs_at, tmp_path):
    coming = runs_at(tmp_path / "reference")
    coming.add("toy", {KEY: 1})
    other = [{"name": "synthetic", "fingerprint": "beef" * 16, "categories": ["bolt", "gear", "tile"]}]
    coming.add("toy", {KEY: 1}, run="loco", datasets=other)
    records = list(reference.read_reference(tmp_path / "reference"))
    assert [name for name, _ in kinds(records)] == ["synthetic-beefbe", "synthetic-f00df0"]
    assert kinds([replace(stored, reference=False) for stored in records])[0][0] == ""


def test_references_whose_data_the_sweep_varies_stand_in_one_table(runs_at, tmp_path):
    coming = runs_at(tmp_path / "reference")
    for count in (1, 2):
        data = [{"name": "synthetic", "fingerprint": f"{count}" * 64, "categories": ["bolt", "gear"][:count]}]
        coming.add("toy", {"data.init_args.category_count": count}, datasets=data)
    records = list(reference.read_reference(tmp_path / "reference"))
    assert [(name, len(mine)) for name, mine in kinds(records)] == [("", 2)]


def test_make_tables_on_a_fresh_clone_writes_latex_from_references_beside_the_published_ones(project, tmp_path, capsys):
    add(project.reference, "none")
    folders = ["--root", str(tmp_path / "results" / "runs"), "--sweeps", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["tables", *folders]) == 0
    written = (tmp_path / "out" / "toy.tex").read_text()
    assert "90.0$^\\dagger$" in written
    assert "\\input{toy.tex}" in (tmp_path / "out" / "tables.tex").read_text()
    assert (tmp_path / "out" / "unias_1.published.tex").is_file()
    assert main(["report", *folders[:4], "--out", str(tmp_path / "report.html")]) == 0
    assert "90.0†" in (tmp_path / "report.html").read_text()


def test_controls_on_the_same_features_stand_below_every_table_and_are_not_ranked(project, capsys):
    add(project.own, "none", value=0.8)
    add(project.own, "first", value=0.7)
    control = {"sweep": "nearest_neighbours", "method": "nearest_neighbours"}
    project.reference.add(cell={"model.init_args.grid": 8}, value=0.95, **control)
    project.reference.add(cell={"model.init_args.grid": 16}, value=0.99, image_size=(96, 96), **control)
    shown = project.lines(capsys)
    assert shown["none"].startswith("**80.0**")
    assert shown["Nearest neighbours, grid 8×8"].startswith("95.0")
    assert not any("16×16" in label for label in shown), "other image size, other features"


# ---- publishing ----------------------------------------------------------------------------------------------------------


def jpeg(width):
    buffer = io.BytesIO()
    Image.effect_noise((width, width // 2), 60).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def finished(runs, tmp_path):
    """A finished run with what the program attaches."""
    index = "dataset,category,rank,defect,image_score,file,caption\nsynthetic,bolt,worst,cut,1.0,bolt.jpg,x\n"
    scores = (
        f"id,category,anomaly_type,label,image_score,path\n0,bolt,good,0,1.5,{tmp_path}/data/bolt/test/good/0.png\n"
    )
    attachments = {
        "heatmaps/bolt.jpg": jpeg(1200),
        "heatmaps/index.csv": index,
        "image_scores.csv": scores,
        "normal_scores.csv": "id\n",
    }
    runs.add(
        "toy", {KEY: "none"}, attachments=attachments, config=f"cache:\n  root: {tmp_path}/results/cache\n",
        provenance={"git_commit": "c0ffee" * 6, "git_dirty": True,
                    "command": f"python -m lightning_modules fit --x={tmp_path}/y"},
    )  # fmt: skip
    return runs.read()[0]


def test_a_published_record_is_whole_and_names_no_place_of_the_machine(finished, tmp_path):
    path = reference.publish(finished, CODE, True, tmp_path / "reference", tmp_path)
    stored = read_record(path, pictures=True)
    assert stored.scores == finished.scores
    text = "".join(file.read_text(errors="replace") for file in path.rglob("*.*") if file.suffix != ".jpg")
    assert str(tmp_path) not in text
    assert "data/bolt/test/good/0.png" in (path / "image_scores.csv").read_text()
    assert json.loads((path / "record.json").read_text())["provenance"][reference.CODE] == CODE
    assert not (path / "normal_scores.csv").exists()
    with Image.open(io.BytesIO(stored.picture("bolt.jpg"))) as picture:
        assert picture.width == reference.WIDTH
    assert not reference.publish(finished, CODE, False, tmp_path / "plain", tmp_path).joinpath("heatmaps").exists()


def test_changes_elsewhere_than_in_the_code_that_decides_are_no_changes(finished, tmp_path):
    for committed in (False, True):
        path = reference.publish(finished, CODE, False, tmp_path / "reference", tmp_path, committed=committed)
        assert read_record(path).record.provenance["git_dirty"] is not committed


def test_a_path_that_cannot_be_made_relative_is_refused_by_name(finished, tmp_path):
    with pytest.raises(RecordError, match=r"config\.yaml names a place on this machine"):
        reference.publish(finished, CODE, True, tmp_path / "reference", tmp_path / "elsewhere")
    assert not (tmp_path / "reference").exists()


def test_no_reference_record_has_a_random_backbone(runs, tmp_path):
    runs.add("toy", {KEY: 1}, backbone={"name": "tiny", "weights": "random"})
    with pytest.raises(RecordError, match="has a random backbone"):
        reference.publish(runs.read()[0], CODE, True, tmp_path / "reference")


def test_a_cell_that_was_trained_again_has_one_reference(runs, tmp_path):
    for name in ("old", "new"):
        runs.add("toy", {KEY: 1}, run=name)
    for stored in sorted(runs.read(), key=lambda stored: stored.name, reverse=True):
        reference.publish(stored, CODE, False, tmp_path / "reference", tmp_path)
    assert [stored.record.run for stored in read_records(tmp_path / "reference")] == ["new"]


def test_default_rows_are_found_by_short_keys_and_in_listed_rows(runs):
    runs.add("toy", {KEY: "layerwise", "model.init_args.levels": [4, 3]})
    stored = runs.read()[0]
    assert reference.is_default(stored, Spec("toy", "Toy", default={"query": "layerwise"}))
    assert not reference.is_default(stored, Spec("toy", "Toy", default={"query": "none"}))
    row = Entry(("x",), default=True, runs={"cell": {"levels": [4, 3]}})
    assert reference.is_default(stored, Spec("toy", "Toy", rows=(row,)))
    assert not reference.is_default(stored, Spec("toy", "Toy"))


# ---- verifying -----------------------------------------------------------------------------------------------------------


def scored(runs, run, scores, value=0.9):
    lines = [f"{n},bolt,good,{int(n >= 2)},{score},data/bolt/test/x/{n}.png" for n, score in enumerate(scores)]
    text = "\n".join(["id,category,anomaly_type,label,image_score,path", *lines]) + "\n"
    runs.add("verify", {KEY: 1}, run=run, value=value, categories=("bolt",), attachments={"image_scores.csv": text})
    return next(stored for stored in runs.read() if stored.record.run == run)


def test_rounding_agrees_and_another_network_does_not(runs):
    first = scored(runs, "first", [1.0, 1.2, 2.0, 3.0])
    assert compare(first, scored(runs, "rounding", [1.0 + NOISE / 2, 1.2, 2.0, 3.0])).agrees
    other = compare(first, scored(runs, "other", [1.1, 1.2, 2.0, 3.0]))
    assert not other.agrees
    assert "an image's score differs" in other.sentence
    moved = compare(first, scored(runs, "moved", [1.0, 1.2, 2.0, 3.0], value=0.9 - 2 * PIXELS))
    assert any("pixel_auroc of bolt: 90.00, now 89.80, allowed 0.10" in line for line in moved.problems)


def test_tolerance_counts_the_pairs_that_noise_could_swap():
    apart = [(1.0, False), (1.2, False), (2.0, True), (3.0, True)]
    assert tolerance("image_auroc", apart) == pytest.approx(0, abs=1e-8)
    close = [(1.0, False), (2.0 - NOISE, False), (2.0, True), (3.0, True)]
    assert tolerance("image_auroc", close) == pytest.approx(1 / 4)
    assert tolerance("image_ap", close) == pytest.approx(1 / 2)
