"""Rows that a guess would reach too are named below the table."""

import numpy as np
import pytest

from results.aggregator import chance
from results.aggregator.build import category_tables, sweep_table
from results.aggregator.own_runs import show
from results.aggregator.spec import Entry, Spec

SPEC = Spec("s", "A sweep", sweep="s", columns=(Entry(("I-AUROC",), where={"metric": "image_auroc"}),))
CATEGORIES = ("bolt", "gear", "tile")


def scored(normal: int, anomalous: int) -> dict[str, str]:
    """An attachment with so many test images of each category."""
    lines = ["id,category,anomaly_type,label,image_score,path"]
    for category in CATEGORIES:
        lines += [f"0,{category},good,0,0.5,{category}/{k}.png" for k in range(normal)]
        lines += [f"0,{category},cut,1,0.5,{category}/cut/{k}.png" for k in range(anomalous)]
    return {"image_scores.csv": "\n".join(lines)}


@pytest.mark.parametrize(("normal", "anomalous"), [(12, 20), (6, 15)])
def test_the_limit_covers_guesses_as_it_says(runs, normal, anomalous):
    """Against means of three AUROCs of scores that say nothing: one in forty lies above."""
    runs.add("s", {"a.b": 1}, attachments=scored(normal, anomalous))
    limit = chance.limit(runs.read()[0], "synthetic")
    rng = np.random.default_rng(0)
    guesses = rng.random((4000, 3, normal + anomalous))
    above = guesses[..., normal:, None] > guesses[..., None, :normal]
    shares = above.mean((2, 3)).mean(1)
    assert (100 * shares > limit).mean() == pytest.approx(0.025, abs=0.01)  # four standard errors of the share


def test_rows_near_chance_and_below_are_named_and_others_are_not(runs):
    for number, value in enumerate((0.3, 0.52, 0.9), start=1):
        runs.add("s", {"a.b": number}, value=value, attachments=scored(10, 20))
    stored = runs.read()
    (note,) = (note for note in sweep_table(SPEC, stored).notes if note.startswith("Near chance"))
    assert note.endswith(": 1, 2.")
    remarks = {own.record.cell["a.b"]: show(own).remarks for own in stored}
    assert "image AUROC 52.0 on synthetic" in remarks[2][-1]
    assert remarks[3] == []


def test_a_category_alone_is_held_against_its_own_images(runs):
    values = {
        ("", category, "image_auroc"): value for category, value in zip(CATEGORIES, (0.6, 0.95, 0.97), strict=True)
    }
    runs.add("s", {"a.b": 1}, values=values, attachments=scored(10, 20))
    (table,) = category_tables(SPEC, runs.read())
    (note,) = (note for note in table.notes if note.startswith("Near chance"))
    assert note.endswith(": bolt.")


def test_without_scores_of_images_nothing_is_said(runs):
    runs.add("s", {"a.b": 1}, value=0.5)
    runs.add("s", {"a.b": 2}, value=0.5, attachments=scored(10, 0))
    assert not any("chance" in note for note in sweep_table(SPEC, runs.read()).notes)
