"""Paired comparison: right numbers, honest n, and refusal where a comparison would mean nothing."""

import numpy as np
import pytest
from scipy import stats

from results.__main__ import main
from results.aggregator.compare import choose, compare, paired, report
from results.aggregator.scores import ConflictError

CATEGORIES = tuple(f"c{i}" for i in range(8))


def add(runs, method, shift, seeds=(0, 1, 2), **changes):
    generator = np.random.default_rng(5)
    table = 0.8 + 0.1 * generator.random((3, len(CATEGORIES)))
    noise = np.random.default_rng(7 if shift else 6).normal(0, 0.003, table.shape)
    grid = np.clip(table + shift + noise, 0, 1)
    for seed in seeds:
        values = {("", c, "image_auroc"): float(grid[seed, i]) for i, c in enumerate(CATEGORIES)}
        runs.add(seed=seed, method=method, run=f"{method}-{seed}", values=values, categories=CATEGORIES, **changes)
    return grid


def test_both_tests_are_scipys_on_the_right_differences(runs):
    a, b = add(runs, "unias", 0.02), add(runs, "uniad", 0.0)
    records = runs.read()
    result = compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")
    difference = 100 * (a - b)
    over = result.over_categories
    assert over.n == 8
    assert over.difference == pytest.approx(difference.mean())
    assert over.p_t == pytest.approx(stats.ttest_rel(100 * a.mean(axis=0), 100 * b.mean(axis=0)).pvalue)
    assert over.p_wilcoxon == pytest.approx(stats.wilcoxon(difference.mean(axis=0), method="exact").pvalue)
    assert over.effect == pytest.approx(difference.mean(axis=0).mean() / difference.mean(axis=0).std(ddof=1))
    low, high = stats.ttest_1samp(difference.mean(axis=0), 0).confidence_interval(0.95)
    assert over.interval == (pytest.approx(low), pytest.approx(high))
    assert result.over_seeds.n == 3
    assert result.over_seeds.p_t == pytest.approx(stats.ttest_rel(100 * a.mean(axis=1), 100 * b.mean(axis=1)).pvalue)
    assert (over.wins, over.losses) == (8, 0)
    assert over.rank == 1.0


def test_repeats_are_not_sold_as_independent_observations(runs):
    add(runs, "unias", 0.02)
    add(runs, "uniad", 0.0)
    records = runs.read()
    text = report(compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad"))
    assert "8 categories x 3 seeds are not 24 independent observations" in text
    assert "With n = 3 the Wilcoxon test over seeds cannot give p below 0.25" in text
    assert "| categories | 8 |" in text


@pytest.mark.parametrize(("other", "said"), [("1.0.15", 1), ("1.0.9", 0)])
def test_a_difference_between_library_versions_is_told_beside_the_result(runs, other, said):
    for method, shift, timm in (("unias", 0.02, "1.0.9"), ("uniad", 0.0, other)):
        add(runs, method, shift, provenance={"versions": {"torch": "2.6.0", "timm": timm}})
    records = runs.read()
    result = compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")
    note = f"A was run with torch 2.6.0, timm 1.0.9, B with torch 2.6.0, timm {other}."
    assert result.notes.count(note) == said


def test_one_seed_gives_no_seed_test_and_says_so(runs):
    add(runs, "unias", 0.02, seeds=(0,))
    add(runs, "uniad", 0.0)
    records = runs.read()
    result = compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")
    assert result.over_seeds.n == 1
    assert result.over_seeds.p_t is None
    assert result.over_seeds.p_wilcoxon is None
    assert any("One seed allows no test over seeds" in note for note in result.notes)
    assert any("Seeds without a partner, left out: 1, 2" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        ({"protocol": "as_released"}, "protocol"),
        ({"profile": "paper"}, "profile"),
        ({"metrics": {"version": "9"}}, "metric"),
    ],
)
def test_runs_under_another_protocol_are_not_compared(runs, changes, axis):
    add(runs, "unias", 0.02)
    add(runs, "uniad", 0.0, **changes)
    records = runs.read()
    with pytest.raises(ConflictError, match=axis):
        compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")


def test_another_recipe_may_be_compared_but_is_said(runs):
    add(runs, "unias", 0.02, image_size=(128, 128))
    add(runs, "uniad", 0.0)
    records = runs.read()
    result = compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")
    assert "A and B differ in method: A unias, B uniad; image size: A 128x128, B 64x64." in result.notes


def test_several_experiments_of_a_method_are_listed_with_how_to_choose_one(runs, capsys):
    add(runs, "unias", 0.02, seeds=(0,))
    values = {("", c, "image_auroc"): 0.8 + 0.01 * i for i, c in enumerate(CATEGORIES)}
    for n in range(10):
        provenance = {"git_commit": f"{n}abc" * 10, "started": f"2026-01-{n + 10}"}
        changes = {"profile": "paper", "image_size": (128, 96)} if n == 9 else {}
        runs.add(run=f"try{n}", values=values, categories=CATEGORIES, provenance=provenance, **changes)
    words = ["--metric", "image_auroc", "--root", str(runs.root)]
    assert main(["compare", "unias", "uniad", *words]) == 2
    told = capsys.readouterr().err
    assert "B=uniad takes all 10 runs of uniad" in told
    assert "  single/try9: profile paper, seed 0, image size 128x96, commit 9abc9abc9a\n  single/try8: " in told
    assert "single/try1:" not in told
    assert "  and 2 more\n" in told
    assert "such as B=single/try9" in told
    assert main(["compare", "unias", "single/try8", *words]) == 0


def test_a_category_that_one_side_lacks_is_named_not_dropped(runs):
    add(runs, "unias", 0.02, drop={("", "c3", "image_auroc")})
    add(runs, "uniad", 0.0)
    records = runs.read()
    with pytest.raises(ValueError, match="c3 is not there for every seed"):
        compare(choose(records, "unias"), choose(records, "uniad"), "unias", "uniad")


def test_cells_of_a_sweep_are_chosen_by_the_end_of_their_keys(runs):
    for levels in ([4], [4, 3]):
        for seed in (0, 1):
            cell = {"model.init_args.levels": levels, "model.init_args.sar": True}
            runs.add("s", cell, seed, values={("", c, "image_auroc"): 0.5 + 0.1 * len(levels) + 0.01 * seed for c in
                                              ("bolt", "gear", "tile")})  # fmt: skip
    records = runs.read()
    assert len(choose(records, "s:levels=[4, 3]")) == 2
    assert len(choose(records, "s:levels=[4],sar=true")) == 2
    assert len(choose(records, "s/*seed0")) == 2
    with pytest.raises(ValueError, match=r"no run with levels=\[3\]; there are \[4, 3\], \[4\]"):
        choose(records, "s:levels=[3]")
    with pytest.raises(ValueError, match="Did you mean"):
        choose(records, "s:level=[4]")


def test_equal_scores_give_no_p_value_instead_of_nan():
    result = paired("category", [("a", 0.0), ("b", 0.0), ("c", 0.0)])
    assert (result.p_t, result.p_wilcoxon, result.effect, result.rank) == (None, None, None, None)
    constant = paired("category", [("a", 1.0), ("b", 1.0), ("c", 1.0)])
    assert constant.p_t is None


def test_the_command_line_compares(runs, capsys):
    add(runs, "unias", 0.02)
    add(runs, "uniad", 0.0)
    assert main(["compare", "unias", "uniad", "--metric", "image_auroc", "--root", str(runs.root)]) == 0
    assert "A = unias, B = uniad" in capsys.readouterr().out
    assert main(["compare", "unias", "unias", "--metric", "image_auroc", "--root", str(runs.root)]) == 2
    assert "A and B share records" in capsys.readouterr().err


def test_a_data_set_chooses_among_the_runs_of_a_method(runs, capsys):
    for dataset in ("photos", "synthetic"):
        for method, value in (("unias", 0.9), ("uniad", 0.8)):
            runs.add(run=f"{method}-{dataset}", method=method, dataset=dataset, value=value)
    words = ["compare", "unias", "uniad", "--metric", "image_auroc", "--root", str(runs.root), "--dataset"]
    assert main([*words, "photos"]) == 0
    assert "on photos" in capsys.readouterr().out
    assert main([*words, "photo"]) == 2
    assert "no run is of the data set 'photo'; runs are of photos, synthetic" in capsys.readouterr().err
