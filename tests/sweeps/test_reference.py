"""`make reference` trains what the plan lists, once, and its records never count as finished for `make sweep`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from results.aggregator import reference
from results.aggregator.records import read_records
from results.aggregator.spec import spec_names
from sweeps.runner import checked_sweep
from sweeps.runner.errors import SweepError
from sweeps.runner.reference import LARGEST, Entry, plan, read_plan

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, sys
from pathlib import Path
import pandas as pd, yaml
from results.aggregator.records import HISTORY_COLUMNS, METRIC_COLUMNS, RunRecord, write_record
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
cell = {k: v["value"] for k, v in yaml.safe_load(open(os.environ["WANDB_SWEEP_PARAM_PATH"])).items() if isinstance(v, dict)}
record = RunRecord(
    run=words["run.name"], sweep=words["run.sweep"], cell=cell, method="uniad", profile="demo", protocol="clean",
    setting="unified", seed=cell["seed_everything"], image_size=(64, 64), resize="pil_bilinear",
    backbone={"name": "tiny", "weights": cell.get("model.weights", "packaged")},
    datasets=[{"name": "photos", "fingerprint": "f00d", "categories": ["cookie"]}], metrics={"version": "1"},
    provenance={"wall_seconds": 90.0, "command": f"python {os.getcwd()}/program.py"})
rows = [("", "category", "photos", "cookie", "image_auroc", 0.9, 10, "")]
score = os.environ.get("SCORE", "1.0")
scores = f"id,category,anomaly_type,label,image_score,path\\n0,cookie,good,0,{score},cookie/test/good/0.jpg\\n"
root = Path(words.get("run.results", "results")) / "runs"
with open("trained.txt", "a") as trained:
    trained.write(words["run.name"] + "\\n")
write_record(root, record, pd.DataFrame(rows, columns=list(METRIC_COLUMNS)), pd.DataFrame(columns=list(HISTORY_COLUMNS)),
             "x: 1\\n", {"image_scores.csv": scores})
"""


@pytest.fixture
def planned(project: Any) -> Any:
    """A project whose sweep has two cells and whose plan lists them, and the sweep `verify` with one."""
    (project.folder / "program.py").write_text(PROGRAM)
    profile = {"data": {"init_args": {"datasets": [{"name": "photos", "categories": ["cookie"]}]}}}
    (project.folder / "sweeps" / "profiles" / "demo" / "toy.yaml").write_text(yaml.safe_dump(profile))
    for name, values in (("toy", [1, 2]), ("verify", [1])):
        path = project.sweep({"model.x": values, "seed_everything": 0}, name)
        content = yaml.safe_load(path.read_text())
        del content["parameters"]["model.end"]
        path.write_text(yaml.safe_dump(content))
    plan = project.folder / reference.FOLDER / reference.PLAN
    plan.parent.mkdir(parents=True)
    plan.write_text("- {sweep: verify}\n- {sweep: toy, seeds: [0, 1], minutes: 2}\n")
    project.trained = lambda: len((project.folder / "trained.txt").read_text().splitlines())
    return project


@pytest.mark.program
def test_what_the_plan_lists_is_trained_once_and_never_counts_as_finished(planned: Any) -> None:
    code, output = planned.run("reference", "--only", "toy", "--dry-run")
    assert code == 0, output
    assert "toy: 4 cells, 0 there or not asked for, 4 to train, about 8 min 00 s of one worker" in output
    code, output = planned.run("reference", "--only", "toy")
    assert code == 0, output
    records = read_records(planned.folder / reference.FOLDER)
    assert {(stored.record.cell["model.x"], stored.record.seed) for stored in records} == {
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    }
    assert {stored.record.provenance["command"] for stored in records} == {"python program.py"}
    shutil.rmtree(planned.folder / "results" / "runs")
    code, output = planned.run("reference", "--only", "toy")
    assert (code, planned.trained()) == (0, 4), output
    assert "4 cells, 4 there" in output
    code, output = planned.run("run", "toy", "--no-table")
    assert (code, planned.trained()) == (0, 6), "reference records count as finished"


@pytest.mark.program
def test_verify_trains_anew_and_tells_other_numbers_from_the_same(planned: Any) -> None:
    code, output = planned.run("verify")
    assert code == 2
    assert "no reference record; `make reference ONLY=verify` makes it" in output
    assert planned.run("reference", "--only", "verify")[0] == 0
    code, output = planned.run("verify")
    assert (code, planned.trained()) == (0, 2), output
    assert "agrees; image scores differ by at most 0.0e+00" in output
    code, output = planned.run("verify", SCORE="1.1")
    assert code == 1
    assert "DIFFERS" in output


@pytest.mark.program
def test_a_random_backbone_is_left_out_with_the_reason(planned: Any) -> None:
    planned.sweep({"model.x": [1], "model.weights": "random", "seed_everything": 0}, "toy")
    code, output = planned.run("reference", "--only", "toy")
    assert code == 1
    assert "has a random backbone" in output
    assert not list((planned.folder / reference.FOLDER).glob("toy/*"))


@pytest.mark.program
def test_a_small_cell_that_came_with_the_project_gives_the_same_numbers_here(project: Any) -> None:
    for name in ("sweeps/profiles", "sweeps/comparisons", str(reference.FOLDER)):
        shutil.copytree(ROOT / name, project.folder / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "sweeps" / "verify.yaml", project.folder / "sweeps")
    code, output = project.run("verify", "--only", "method=uniad", limit=400)
    assert code == 0, output
    assert "1 of 1 agree." in output


def test_the_shipped_plan_can_be_read_and_names_sweeps_that_there_are() -> None:
    entries = read_plan(ROOT / reference.FOLDER / reference.PLAN)
    assert {entry.sweep for entry in entries} <= set(checked_sweep.names())
    seeds = {entry.sweep: entry.seeds for entry in entries}
    assert all(seeds[name] == (0, 1, 2) for name in ("feature_levels", "uniad_components", "k_references", "lambda"))
    methods = {*checked_sweep.load("methods").parameters["method"]["values"]}
    assert {*checked_sweep.load("verify").parameters["method"]["values"]} == methods
    assert methods == {path.stem for path in (ROOT / "sweeps" / "profiles" / "demo").glob("*.yaml")}
    assert spec_names()


def test_an_entry_takes_a_part_of_a_sweep_in_the_setting_that_it_names() -> None:
    entry = Entry("methods", dataset="photos", setting="per_category", only=("method=padim,patchcore",))
    planned = plan(entry, 1, lambda text: None)
    cells = [job.cell.parameters for job in planned.jobs]
    assert {cell["method"] for cell in cells} == {"padim", "patchcore"}
    assert {cell["data.init_args.setting"] for cell in cells} == {"per_category"}
    (job,) = plan(Entry("methods", compare="longer", only=("method=uniad",)), 1, lambda text: None).jobs
    assert job.cell.parameters["compare"] == "longer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep: toy\n", "must be a list"),
        ("- {seeds: [0]}\n", "needs a sweep"),
        ("- {sweep: toy, seed: 0}\n", "unknown key 'seed'.*seeds"),
        ("- {sweep: toy, pictures: some}\n", "allowed are default, all, none"),
        ("- {sweep: toy, seeds: []}\n", "list of whole numbers"),
        ("- {sweep: toy, only: method=uniad}\n", "list of conditions"),
    ],
)
def test_a_mistake_in_the_plan_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(SweepError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_records_that_come_with_the_project_are_whole_small_and_of_trained_backbones() -> None:
    folder = ROOT / reference.FOLDER
    records = reference.read_reference(folder)
    assert not records.damaged
    assert not [stored.name for stored in records if stored.record.random_weights]
    assert not [file for file in folder.rglob("*") if file.suffix == ".ckpt"]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LARGEST
