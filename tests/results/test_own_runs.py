"""The report's first section: one's own trainings, complete, and what a reader must know before using a number."""

import functools
from pathlib import Path

import pytest

from results.aggregator import report
from results.aggregator.history import fall
from results.aggregator.own_runs import decisions, overview, own, show
from results.aggregator.report import page

DECISIONS = """category,level,rule,alpha,threshold,rate,basis,normal_images,good,false_alarms,defects,misses
bolt,image,max,,9.5,0.0769,held-out,12,30,7,40,26
,image,max,,16.25,0.0526,held-out,18,44,0,72,51
bolt,pixel,p95_factor,,8.0,,training,12,30,9,40,20
"""


def losses(values):
    return [(epoch, epoch, "train/loss", value) for epoch, value in enumerate(values)]


def test_trainings_come_newest_first_and_sweeps_are_counted(runs):
    for run, day in (("old", 1), ("new", 3), ("middle", 2)):
        runs.add(run=run, provenance={"started": f"2026-01-0{day}T10:00:00"})
    for seed in (0, 1):
        runs.add("components", {"a.b": 1}, seed)
    singles, sweeps = own(runs.read())
    assert [stored.record.run for stored in singles] == ["new", "middle", "old"]
    assert sweeps == {"components": 2}
    assert [row.labels[0] for row in overview(singles).rows] == ["new", "middle", "old"]


def test_numbers_per_category_and_settings_are_those_of_the_record(runs):
    runs.add(run="mine", values={("", "bolt", "image_auroc"): 0.75}, undefined=[("", "gear", "pixel_auroc")])
    found = show(runs.read()[0])
    table = found.main
    assert [row.labels[0] for row in table.rows] == ["bolt", "gear", "tile"]
    assert [column.label for column in table.columns] == ["I-AUROC", "P-AUROC"]
    assert table.cells[0][0].runs.mean == pytest.approx(75)
    assert table.missing == ["gear: P-AUROC: no masks"]
    for part in (
        "UniAD",
        "synthetic (bolt, gear, tile)",
        "64x64 px",
        "tiny (imagenet weights)",
        "demo profile",
        "3 epochs",
    ):
        assert part in found.settings


def test_a_loss_that_falls_to_the_end_is_said_and_one_that_rests_is_not(runs):
    runs.add(run="falls", history=losses([1 / (epoch + 1) for epoch in range(20)]))
    runs.add(run="rests", history=losses([1.0] * 10 + [0.1] * 10))
    runs.add(run="short", history=losses([1.0, 0.5]))
    stored = {one.record.run: one for one in runs.read()}
    # Of 20 epochs a tenth are two: medians of 1/19, 1/20 and of 1/17, 1/18.
    assert fall(stored["falls"]) == pytest.approx(1 - (1 / 19 + 1 / 20) / (1 / 17 + 1 / 18))
    assert fall(stored["rests"]) == 0
    assert fall(stored["short"]) is None
    assert any("still falling" in remark for remark in show(stored["falls"]).remarks)
    assert show(stored["rests"]).remarks == []


def test_decisions_are_shown_by_the_runs_own_rule_and_the_others_apart(runs):
    runs.add(run="mine", attachments={"decisions.csv": DECISIONS})
    first, others = decisions(runs.read()[0])
    assert [row.labels for row in first.rows] == [("bolt", "held-out"), ("one threshold for all", "held-out")]
    shown = dict(zip((column.label for column in first.columns), first.cells[0], strict=True))
    assert shown["false alarms"].runs.mean == 7
    assert shown["misses"].runs.mean == 26
    assert shown["promised rate [%]"].runs.mean == pytest.approx(7.69)
    assert [row.group for row in others.rows] == ["p95_factor, pixel"]
    assert "optimistic" in others.caption


def test_the_first_section_has_every_training_and_the_papers_and_the_audit_come_last(runs):
    for run in ("a1", "b2", "c3", "d4"):
        runs.add(run=run, attachments={"decisions.csv": DECISIONS})
    text = page(runs.read(), Path("nowhere"))
    order = ("runs", "ablations", "methods", "gallery", "reading", "definitions", "records", "papers", "audit")
    places = [text.index(f'<h2 id="{name}"') for name in order]
    assert places == sorted(places)
    first = text[places[0] : places[1]]
    for run in ("a1", "b2", "c3", "d4"):
        assert f'id="run-single--{run}"' in first
    assert first.count("Decisions, rule max") == 4


def test_without_a_run_the_first_section_says_how_to_make_one():
    first = page([], Path("nowhere")).split('<h2 id="ablations"')[0]
    assert "make train METHOD=uniad" in first


def test_heat_maps_beyond_the_pages_size_are_named_with_their_folder(runs, monkeypatch):
    index = "dataset,category,rank,defect,image_score,file,caption\nsynthetic,bolt,worst,scratch,1.5,bolt.jpg,x\n"
    folder = runs.add(run="mine", attachments={"heatmaps/index.csv": index, "heatmaps/bolt.jpg": b"x" * 1000})
    monkeypatch.setattr(report, "_Pictures", functools.partial(report._Pictures, 10))
    assert f"single/mine: 1 pictures, in {folder / 'heatmaps'}" in page(runs.read(), Path("nowhere"))
