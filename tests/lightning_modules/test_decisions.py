"""Decisions by a run's record: per category, with a reason where nothing can be told."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lightning_modules.decisions import CANNOT_TELL, DEFECT, GOOD, POOLED, Choice, Decider, categories, outcomes, pixels
from lightning_modules.metrics.thresholds import PixelCollector, RateError, p_values
from lightning_modules.pictures import heatmaps


def normals(split="val", counts=(("cookie", 20, 1.0), ("screw", 30, 10.0)), maps=True):
    """Good images of two products, of which one scores ten times as high."""
    rng = np.random.default_rng(0)
    rows = [(name, split, level + rng.random()) for name, count, level in counts for _ in range(count)]
    table = pd.DataFrame(rows, columns=["category", "split", "image_score"])
    return table.assign(map_max=table.image_score * 2) if maps else table


def test_each_category_is_judged_by_its_own_normal_images():
    """One threshold for all calls every good screw a defect, or no bad cookie."""
    decider = Decider(normals())
    cookie = normals().query("category == 'cookie'").image_score
    assert decider.threshold("cookie").value == cookie.max()
    assert decider.decide(cookie.max(), "cookie").verdict == GOOD
    bad = decider.decide(2.5, "cookie")
    assert (bad.verdict, bad.reason, bad.basis) == (DEFECT, "", "held-out")
    assert bad.p_value == pytest.approx(1 / 21)
    assert bad.threshold.rate == pytest.approx(1 / 21)
    assert bad.pixel_threshold.value == pytest.approx(2 * cookie.max())
    assert decider.decide(10.5, "screw").verdict == GOOD
    assert decider.decide(2.5, POOLED or "screw").verdict == GOOD
    assert decider.threshold(POOLED).value > 10
    expected = p_values(np.array([1.5]), cookie.to_numpy())[0]
    assert decider.decide(1.5, Choice("cookie", "folder")).p_value == expected


def test_another_alpha_needs_no_training_and_one_that_cannot_be_had_is_refused_by_name():
    table = normals()
    assert Decider(table, alpha=0.1).threshold("cookie").rate == pytest.approx(2 / 21)
    with pytest.raises(RateError, match=r"cookie: 20 normal images .* 1/21 = 0.0476; 0.04 needs 24"):
        Decider(table, alpha=0.04)
    assert Decider(table, alpha=0.04, given="screw").threshold("screw").n == 30  # the only one that is asked for
    with pytest.raises(RateError, match=r"cookie: .*scores of training images promise nothing"):
        Decider(normals("train"), alpha=0.2)


def test_training_images_are_optimistic_and_three_held_out_images_are_none():
    assert Decider(normals("train")).basis("cookie") == "training (optimistic)"
    both = pd.concat([normals("train"), normals(counts=(("cookie", 3, 3.0), ("screw", 6, 3.0)))])
    decider = Decider(both)
    assert decider.basis("cookie") == "training (optimistic)"
    assert decider.count("cookie") == 23
    assert (decider.basis("screw"), decider.count("screw")) == ("held-out", 6)
    said = decider.sentences()
    assert "unseen good images score higher" in said[0]
    assert "false alarms at most 0.143" in said[1]


def test_what_cannot_be_told_has_a_reason():
    decider = Decider(normals(counts=(("cookie", 20, 1.0), ("screw", 3, 10.0))))
    for score, choice, reason in (
        (math.nan, "cookie", "it has no score"),
        (99.0, "screw", "3 normal images of screw are too few"),
        (99.0, "nut", "keeps no normal image of nut"),
        (99.0, Choice("", "its category is not known"), "its category is not known"),
    ):
        decision = decider.decide(score, choice)
        assert decision.verdict == CANNOT_TELL
        assert reason in decision.reason


def test_training_images_that_a_memory_holds_make_no_threshold():
    table = normals("train").assign(image_score=0.0)
    decision = Decider(table).decide(3.0, "cookie")
    assert decision.verdict == CANNOT_TELL
    assert "remembers its training images" in decision.reason
    assert Decider(normals("train")).decide(3.0, "cookie").verdict == DEFECT


def test_records_of_earlier_versions_have_image_thresholds_and_no_pixel_threshold(tmp_path):
    assert Decider.of(tmp_path) is None
    normals(maps=False).assign(id=range(50), path="x.png").to_csv(tmp_path / "normal_scores.csv", index=False)
    decider = Decider.of(tmp_path)
    assert decider.names == ["cookie", "screw"]
    decision = decider.decide(2.5, "cookie")
    assert (decision.verdict, decision.pixel_threshold) == (DEFECT, None)
    assert decider.colour_scale("cookie") is None
    choice = decider.choose("/new/photos/1.png", np.zeros(4))
    assert choice.category == ""
    assert "CATEGORY=" in decider.decide(1.0, choice).reason


def test_a_category_is_the_one_given_else_the_folders_else_the_nearest():
    rng = np.random.default_rng(1)
    centres = {"data/cookie": rng.normal(size=6), "data/screw": rng.normal(size=6) + 3}
    names = [name for name in centres for _ in range(25)]
    seen = np.stack([centres[name] + 0.1 * rng.normal(size=6) for name in names])
    seen[:, 5] = 7.0  # a number that never varies
    kept = categories.exemplars(names, seen)
    assert kept.groupby("category").size().tolist() == [categories.EXEMPLARS] * 2
    known = categories.Categories(centres, kept)
    assert known.nearest(seen) == names
    assert known.choose("/x/cookie/new/1.png", seen[30]) == ("data/cookie", "folder")
    assert known.choose("/x/screw/cookie/1.png", seen[30]) == ("data/cookie", "folder")  # the innermost
    assert known.choose("/cookies/1.png", seen[30]) == ("data/screw", "nearest")
    assert known.choose("/x/cookie/1.png", seen[30], "data/screw") == ("data/screw", "CATEGORY")
    assert known.named("screw") == "data/screw"
    with pytest.raises(ValueError, match="'nut' is not a category of the run; it has data/cookie, data/screw"):
        known.named("nut")
    assert categories.Categories(["bolt"]).choose("/x/1.png", None) == ("bolt", "only one")


def test_outcomes_count_false_alarms_and_misses_per_category_and_under_one_threshold():
    table = normals()
    rules, refused = outcomes.deciders(table, {}, 0.01)
    assert "cookie" in refused["conformal"]
    scores = pd.DataFrame(
        [
            ("cookie", 0, 1.2),
            ("cookie", 0, 2.4),
            ("cookie", 1, 5.0),
            ("cookie", 1, 1.1),
            ("screw", 0, 10.2),
            ("screw", 1, 12.0),
        ],
        columns=["category", "label", "image_score"],
    )
    scores["map_max"] = [np.nan] * 6
    found = outcomes.outcomes(rules, scores)
    chosen = found[(found.rule == "max") & (found.level == "image")].set_index("category")
    columns = ["good", "false_alarms", "defects", "misses"]
    assert chosen.loc["cookie", columns].tolist() == [2, 1, 2, 1]
    assert chosen.loc["screw", columns].tolist() == [1, 0, 1, 0]
    assert chosen.loc[POOLED, columns].tolist() == [3, 0, 3, 2]
    assert not (found.level == "pixel").any()  # no map
    listed = outcomes.thresholds(rules)
    assert set(listed.level) == {"image", "pixel"}
    assert listed[listed.rule == "mean_3sd"].rate.isna().all()


def test_a_rule_that_cannot_be_had_of_negative_scores_leaves_the_others_alone():
    table = normals()
    table["map_max"] -= 100
    rules, refused = outcomes.deciders(table, {}, None)
    assert refused == {}
    collector = PixelCollector()
    collector.add(np.full((4, 4), -1.0))
    found = {"cookie": pixels.scaled(collector.statistics(), 0.0)}
    assert Decider(normals(), "p95_factor", normal_pixels=found).pixel_threshold("cookie") is None
    assert Decider(normals(), "mean_3sd", normal_pixels=found).pixel_threshold("cookie").value == -1.0
    assert (outcomes.thresholds(rules).query("level == 'pixel'")["rule"] == "max").any()
    table["image_score"] -= 100
    rules, refused = outcomes.deciders(table, {}, None)
    assert set(rules) == {"max", "mean_3sd"}
    assert "cookie: rule p95_factor multiplies" in refused["p95_factor"]
    with pytest.raises(ValueError, match="cookie: rule p95_factor multiplies a percentile"):
        Decider(table, "p95_factor")


def test_good_test_images_that_are_not_like_the_held_out_ones_are_said_to_be_so():
    rules, _ = outcomes.deciders(normals(), {}, 0.2)
    rng = np.random.default_rng(5)

    def said(shift):
        rows = [
            (name, 0, level + shift + rng.random()) for name, level in (("cookie", 1), ("screw", 10)) for _ in range(40)
        ]
        scores = pd.DataFrame(rows, columns=["category", "label", "image_score"])
        return [outcomes.unlike(outcomes.outcomes(rules, scores), rule) for rule in ("max", "conformal", "mean_3sd")]

    assert said(0.0) == [[], [], []]
    shifted = said(0.9)
    assert [len(sentences) for sentences in shifted] == [2, 2, 0]  # nothing is promised by the last
    assert "against a promised rate of 0.0476" in shifted[0][0]


def test_a_good_part_stays_dark_and_its_brightest_pixel_reaches_the_middle_at_most():
    rng = np.random.default_rng(2)
    collector = PixelCollector()
    good = rng.gamma(3, size=(12, 64, 64)).astype(np.float32)
    for one in good:
        collector.add(one)
    defect = good[0].copy()
    defect[20:30, 20:30] += 40
    found = pixels.scaled(collector.statistics(), float(defect.max()))
    grey = np.full((64, 64, 3), 128, np.uint8)
    dark = heatmaps.overlay(grey, np.full((64, 64), found.low), found.low, found.high)[0, 0]

    def coloured(anomaly_map):
        return (heatmaps.overlay(grey, anomaly_map, found.low, found.high) != dark).any(-1).mean()

    assert np.mean([coloured(one) for one in good]) <= 0.011  # the 99th percentile
    assert coloured(defect) >= 0.024  # its hundred pixels of 4096
    alone = pixels.scaled(collector.statistics(), -np.inf)  # nothing but good images
    reached = (collector.statistics().highest - alone.low) / (alone.high - alone.low)
    assert reached == pytest.approx(0.5)


def test_a_sheet_shows_the_median_good_image_beside_the_defects():
    scores = pd.DataFrame(
        {
            "id": range(9),
            "category": ["a"] * 6 + ["b"] * 3,
            "anomaly_type": ["good"] * 3 + ["structural"] * 3 + ["good"] * 3,
            "label": [0] * 3 + [1] * 3 + [0] * 3,
            "image_score": [0.3, 0.1, 0.2, 0.5, 0.6, 0.7, 0.1, 0.1, 0.1],
        }
    )
    chosen = heatmaps.choose(scores)
    assert heatmaps.beside(chosen, scores) == {**chosen, 2: "good"}  # none of b, which has no defect


def test_kept_tables_are_read_as_they_were_written(tmp_path):
    collector = PixelCollector()
    collector.add(np.arange(12.0).reshape(3, 4))
    found = {"": pixels.scaled(collector.statistics(), 20.0), "a": pixels.scaled(collector.statistics(), 30.0)}
    pixels.table(found).to_csv(tmp_path / pixels.FILE, index=False)
    assert pixels.read(tmp_path) == found


def test_a_map_of_another_size_is_laid_over_its_image():
    anomaly_map = np.zeros((10, 8), np.float32)
    anomaly_map[:5] = 1
    laid = heatmaps.overlay(np.full((48, 40, 3), 128, np.uint8), anomaly_map, 0.0, 1.0).astype(int).sum(-1)
    assert laid.shape == (48, 40)
    assert laid[:20].min() > laid[28:].max()
