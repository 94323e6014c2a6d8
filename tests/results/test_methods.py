"""The table of all methods: families, who is told classes, costs, the control's intervals, and what ranks can tell."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from results.__main__ import main
from results.aggregator import figures, methods_table, names, render
from results.aggregator.build import paper_table, sweep_table
from results.aggregator.published import read_published
from results.aggregator.records import LABELS_AT_TEST, SEVEN
from results.aggregator.scores import Query, kinds, seed_means, select
from results.aggregator.spec import find_spec
from results.aggregator.sweep_cells import read_sweep
from results.common.methods import COMPARES

SPEC, SWEEP = find_spec("methods"), read_sweep("sweeps/methods.yaml")


def add(runs, method, compare="recipe", images=None, own=None, **changes):
    """A record of the sweep `methods`; images: category -> list of (label, score); own: its method, if not the profile."""
    setting = changes.get("setting", "unified")
    lines = ["id,category,anomaly_type,label,image_score,path"]
    for category, found in (images or {}).items():
        for number, (label, score) in enumerate(found):
            lines.append(f"{number},{category},good,{label},{score!r},{category}/{number}.png")
    attachments = {"image_scores.csv": "\n".join(lines) + "\n"} if images else None
    cell = {"method": method, "compare": compare, "data.init_args.setting": setting}
    options = {"method": own or method, "scored": SEVEN, "attachments": attachments, **changes}
    name = f"{method}-{compare}-{setting}-seed{changes.get('seed', 0)}"
    runs.add(sweep="methods", cell=cell, run=name, **options)


def labels(table, group=None):
    return [row.labels[0] for row in table.rows if group is None or row.group == group]


def cell(table, method, metric):
    row = next(i for i, r in enumerate(table.rows) if r.labels[0] == names.method_label(method))
    column = next(j for j, c in enumerate(table.columns) if c.metric == metric)
    return table.cells[row][column].runs


def test_methods_stand_in_families_and_those_that_were_not_run_stay_as_dashes(runs):
    for method in ("uniad", "padim", "rd4ad", "nearest_neighbours"):
        add(runs, method)
    table = sweep_table(SPEC, runs.read(), SWEEP)
    assert labels(table, "Memory bank, density")[:3] == ["Nearest neighbours", "PatchCore", "PaDiM"]
    assert "RD4AD" in labels(table, "Distillation")
    groups = list(dict.fromkeys(row.group for row in table.rows))
    assert groups == [group for group in names.FAMILIES if group in groups]
    assert cell(table, "patchcore", "image_auroc").reason == "no run"
    assert table.name == "methods.recipe.unified"
    assert "own backbone" in table.title


def test_the_mean_of_seven_is_the_mean_of_the_seven_columns(runs):
    values = {("", "bolt", metric): 0.1 * (n + 1) for n, metric in enumerate(SEVEN)}
    add(runs, "uniad", values=values, categories=("bolt",))
    table = sweep_table(SPEC, runs.read(), SWEEP)
    assert cell(table, "uniad", "mean_of_seven").mean == pytest.approx(40.0)
    shown = [cell(table, "uniad", metric).mean for metric in SEVEN]
    assert cell(table, "uniad", "mean_of_seven").mean == pytest.approx(np.mean(shown))


def test_a_mean_of_seven_with_a_metric_missing_is_a_dash(runs):
    add(runs, "uniad", scored=SEVEN[:-1])
    assert cell(sweep_table(SPEC, runs.read(), SWEEP), "uniad", "mean_of_seven").mean is None


def test_a_method_that_is_told_classes_stands_apart_without_a_rank(runs):
    add(runs, "uniad", value=0.8)
    add(runs, "padim", value=0.7)
    add(runs, "hvq_trans", value=0.99, notes=[f"{LABELS_AT_TEST}: codebooks are chosen by the true category"])
    add(runs, "patchcore", value=0.95, notes=["an equal share per category (training labels)"])
    table = sweep_table(SPEC, runs.read(), SWEEP)
    apart = {row.labels[0]: row.group for row in table.rows if row.apart}
    assert apart == {"HVQ-Trans": methods_table.APART["test"], "PatchCore": methods_table.APART["training"]}
    assert [row.apart for row in table.rows] == sorted(row.apart for row in table.rows)
    assert cell(table, "hvq_trans", "image_auroc").mark == cell(table, "patchcore", "image_auroc").mark == ""
    assert cell(table, "uniad", "image_auroc").mark == "best"
    assert any(LABELS_AT_TEST in warning for warning in table.warnings)


def test_the_experiments_and_the_two_settings_are_never_in_one_table(runs):
    for compare, setting in itertools.product(COMPARES, ("unified", "per_category")):
        add(runs, "uniad", compare, setting=setting)
    records = runs.read()
    names = [sweep_table(SPEC, mine, SWEEP).name for _, mine in kinds(records, compared=True)]
    assert names == [f"methods.{compare}.{setting}" for compare in COMPARES for setting in ("unified", "per_category")]
    with pytest.raises(ValueError, match="belong in one table"):
        sweep_table(SPEC, records, SWEEP)
    (one,) = select(records, compare="matched", setting="unified")
    assert one.record.cell["compare"] == "matched"


def test_figures_and_comparisons_keep_the_experiments_apart(runs, tmp_path, capsys):
    for compare, value in (("recipe", 0.7), ("longer", 0.9)):
        add(runs, "uniad", compare, value=value)
        add(runs, "padim", compare, value=value)
    where = ["--root", str(runs.root)]
    assert main(["figures", "methods", *where, "--out", str(tmp_path / "out")]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"methods.recipe.unified.png", "methods.longer.unified.png"} <= found
    assert not (tmp_path / "out" / "methods.png").exists()
    cells = ["compare", "methods:method=uniad", "methods:method=padim", *where]
    assert main(cells) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "compare differs: longer: " in told
    assert "cell differs" not in told
    assert "(make: ARGS=--compare=recipe)" in told
    assert main([*cells, "--compare", "longer"]) == 0


def test_costs_stand_beside_the_scores(runs):
    provenance = {"train_seconds": 12.5, "images_per_second": 33.0, "peak_memory_bytes": 2**20, "git_dirty": False}
    add(runs, "uniad", provenance=provenance)
    table = sweep_table(SPEC, runs.read(), SWEEP)
    assert [cell(table, "uniad", m).mean for m in ("train_seconds", "images_per_second", "peak_memory")] == [
        12.5,
        33,
        1,
    ]
    assert "Times are of each run's machine" in table.caption


def test_a_centre_crop_is_named_beside_the_image_size(runs):
    add(runs, "dinomaly", config="data:\n  init_args:\n    crop_from: 448\n", image_size=(392, 392))
    add(runs, "uniad", config="data:\n  init_args:\n    crop_from: null\n")
    table = sweep_table(SPEC, runs.read(), SWEEP)
    assert {row.labels[2] for row in table.rows} == {"392x392 of 448", "64x64", ""}


def scored(seed, gap, count=40):
    """Images of two categories, half of them anomalous, whose scores are `gap` apart."""
    rng = np.random.default_rng(seed)
    return {
        category: [(n % 2, round(float(rng.normal(gap * (n % 2))), 2)) for n in range(count)]
        for category in ("bolt", "gear")
    }


@pytest.mark.parametrize(("metric", "oracle"), [("image_auroc", roc_auc_score), ("image_ap", average_precision_score)])
def test_drawn_again_metrics_are_those_of_sklearn_with_repeated_images(metric, oracle):
    rng = np.random.default_rng(0)
    values, truth = rng.integers(0, 6, 30).astype(float), np.arange(30) % 3 == 0  # many ties
    weights = rng.integers(0, 4, (5, 30)).astype(float)
    weights[:, :3] = 1
    found = methods_table._weighted(values, truth, weights, metric)
    expected = [oracle(truth, values, sample_weight=line) for line in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_difference_is_that_of_the_table_and_its_interval_covers_it(runs):
    sides = {"uniad": scored(1, 2.0), "nearest_neighbours": scored(2, 1.0)}
    for method, images in sides.items():
        add(runs, method, images=images, categories=("bolt", "gear"))
    one, other = (methods_table.of_method(runs.read(), method) for method in sides)
    found = methods_table.bootstrap(one, other, "image_auroc")
    aurocs = [
        np.mean([roc_auc_score(*zip(*images[category], strict=True)) for category in images])
        for images in sides.values()
    ]
    assert found.difference == pytest.approx(100 * (aurocs[0] - aurocs[1]))
    assert found.low < found.difference < found.high
    assert (found.images, found.categories, found.seeds) == (80, 2, (0,))
    assert found == methods_table.bootstrap(one, other, "image_auroc")


def test_pairing_images_makes_the_interval_of_like_methods_narrow(runs):
    """Without pairing the same images on both sides, the difference of a method with itself would have a spread."""
    images = scored(1, 1.0)
    add(runs, "uniad", images=images, categories=("bolt", "gear"))
    add(runs, "nearest_neighbours", images=images, categories=("bolt", "gear"))
    records = runs.read()
    found = methods_table.bootstrap(
        *(methods_table.of_method(records, m) for m in ("uniad", "nearest_neighbours")), "image_auroc"
    )
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a good and an anomalous image in the right order, with equal scores as half."""
    further = scores[truth == 1][:, None] - scores[truth == 0]
    return float((np.sign(further) + 1).mean() / 2)


def test_the_interval_is_as_wide_as_that_of_an_independent_bootstrap(runs):
    sides = [scored(3, 1.5), scored(4, 1.0)]
    for method, images in zip(("uniad", "nearest_neighbours"), sides, strict=True):
        add(runs, method, images=images, categories=("bolt", "gear"))
    records = runs.read()
    found = methods_table.bootstrap(
        *(methods_table.of_method(records, m) for m in ("uniad", "nearest_neighbours")), "image_auroc"
    )
    rng, draws = np.random.default_rng(5), []
    for _ in range(600):
        difference = []
        for category in ("bolt", "gear"):
            truth = np.array([label for label, _ in sides[0][category]])
            picks = np.concatenate(
                [rng.choice(np.flatnonzero(truth == label), (truth == label).sum()) for label in (0, 1)]
            )
            a, b = (np.array([score for _, score in side[category]])[picks] for side in sides)
            difference.append(auroc(truth[picks], a) - auroc(truth[picks], b))
        draws.append(100 * np.mean(difference))
    # A bootstrap's 2.5 % quantile of 600 draws has a standard error of about 0.11 spreads, so 4 of them are 0.45.
    low, high = np.quantile(draws, (0.025, 0.975))
    assert abs(found.low - low) < 0.45 * np.std(draws)
    assert abs(found.high - high) < 0.45 * np.std(draws)


def test_other_images_are_no_pair(runs):
    add(runs, "uniad", images=scored(1, 1.0), categories=("bolt", "gear"))
    add(runs, "nearest_neighbours", images=scored(1, 1.0, count=38), categories=("bolt", "gear"))
    records = runs.read()
    with pytest.raises(ValueError, match="bolt are not the same"):
        methods_table.bootstrap(
            *(methods_table.of_method(records, m) for m in ("uniad", "nearest_neighbours")), "image_auroc"
        )
    table = methods_table.control_table(SPEC, records, SWEEP)
    assert table.missing
    assert table.cells[0][0].runs.mean is None


def test_the_control_is_nearest_neighbours_or_else_uniad(runs):
    add(runs, "padim")
    assert methods_table.control(runs.read()) == ""
    assert methods_table.control_table(SPEC, runs.read(), SWEEP) is None
    add(runs, "uniad")
    assert methods_table.control(runs.read()) == "uniad"
    add(runs, "nearest_neighbours")
    assert methods_table.control(runs.read()) == "nearest_neighbours"


def ranked(runs, count, categories, reverse=0):
    """`count` methods whose order is the same in all categories."""
    every = [name for members in names.FAMILIES.values() for name in members][:count]
    places = tuple(f"c{n}" for n in range(categories))
    for n, method in enumerate(every):
        values = {("", place, "image_auroc"): 0.5 + 0.01 * n for place in places}
        add(runs, method, values=values, categories=places, scored=("image_auroc",))
    return methods_table.ranks(runs.read())


def test_critical_difference_is_that_of_demsars_table():
    # Demsar 2006, Table 5a: q of the Nemenyi test at 5 % for 2 to 10 classifiers, printed with three decimals.
    for k, q in zip(range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), strict=True):
        assert methods_table.critical_difference(k, 1) / np.sqrt(k * (k + 1) / 6) == pytest.approx(q, abs=1.1e-3)


def test_too_few_categories_give_a_sentence_and_no_figure(runs):
    found = ranked(runs, 4, 2)
    assert found.critical > 3
    assert "With 2 categories and 4 methods" in found.silent
    assert "3 categories are the least" in found.silent


def test_enough_categories_give_ranks_and_a_figure(runs, tmp_path):
    found = ranked(runs, 4, 6)
    assert found.silent == ""
    assert found.average == (1, 2, 3, 4)
    assert found.p == pytest.approx(stats.chi2.sf(6 * 3, 3))  # Friedman's statistic at its largest, n (k - 1)
    path = figures.save(figures.critical_difference(found), tmp_path / "ranks.png")
    assert path.stat().st_size > 5000


def test_the_command_writes_table_control_categories_and_says_why_there_are_no_ranks(runs, tmp_path, capsys):
    for n, method in enumerate(("uniad", "padim", "nearest_neighbours")):
        provenance = {"train_seconds": 10.0 * (n + 1), "images_per_second": 5.0 + n, "peak_memory_bytes": 2**20}
        add(
            runs, method, images=scored(n, 1.0), categories=("bolt", "gear"), value=0.6 + 0.1 * n, provenance=provenance
        )
    words = ["sweep", "methods", "--root", str(runs.root), "--out", str(tmp_path), "--compare", "recipe"]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no difference of average ranks can be significant" in printed
    found = {path.name for path in tmp_path.iterdir()}
    assert {"methods.recipe.unified.md", "methods.recipe.unified.control.csv", "methods.recipe.unified.categories.md",
            "methods.recipe.unified.train_seconds.png"} <= found  # fmt: skip
    assert "methods.recipe.unified.ranks.png" not in found


def test_papers_tables_take_their_columns_from_the_sweep_where_a_run_has_the_right_setting(runs):
    categories = ("bottle", "cable")
    for method in ("patchcore", "rd4ad"):
        add(runs, method, dataset="mvtec_ad", categories=categories, scored=("pixel_ap", "dsc"), value=0.5)
    add(runs, "uniad", dataset="mvtec_ad", categories=categories, scored=("pixel_ap", "dsc"), setting="per_category")
    add(runs, "hvq_trans", "matched", dataset="mvtec_ad", categories=categories, scored=("pixel_ap", "dsc"))
    table = paper_table(find_spec("unias_2"), "both", runs.read())
    bottle = next(i for i, row in enumerate(table.rows) if row.labels == ("bottle",))
    shown = {c.key["method"]: c.runs for c in table.cells[bottle] if c.key["metric"] == "pixel_ap"}
    assert shown["patchcore"].mean == shown["rd4ad"].mean == 50.0
    assert shown["draem"].mean is None
    assert shown["uniad"].mean is None  # another setting
    assert shown["hvq_trans"].mean is None  # another experiment


def test_a_control_is_not_taken_for_the_method_that_it_is_built_of(runs):
    add(runs, "nearest_neighbours", own="patchcore", dataset="mvtec_ad", categories=("bottle",), scored=("pixel_ap",))
    (stored,) = runs.read()
    assert stored.methods == {"nearest_neighbours"}


@pytest.mark.parametrize(
    ("method", "backbone", "published"),
    [
        ("dinomaly", "vit_base_patch14_reg4_dinov2.lvd142m", "dinomaly_b"),
        ("dinomaly", "vit_large_patch16_dinov3.lvd1689m", "dinomaly_l_dinov3"),
        ("rad", "vit_base_patch16_dinov3.lvd1689m", "rad_training_free_dinov3"),
        ("rad", "tf_efficientnet_lite0.in1k", "rad"),
        ("dinomaly2", "vit_base_patch14_reg4_dinov2.lvd142m", "dinomaly2"),
        ("uniad", "tf_efficientnet_b4.aa_in1k", "uniad"),
    ],
)
def test_a_run_and_a_printed_number_meet_under_one_name(method, backbone, published):
    assert names.published_name(method, backbone) == published
    assert any(key[4] == published for key in read_published()) or published == method


def test_a_number_far_from_its_methods_own_paper_has_a_footnote_and_a_column():
    table = paper_table(find_spec("ulsad_1"), "both")
    assert [c.label for c in table.columns if "own paper" in (c.label + c.group)] == ["MVTec AD"]
    (note,) = [note for note in table.notes if note.startswith("Far from")]
    assert "RD4AD, I-AUROC: 79.65 here, 98.5" in note
    assert "DRAEM, I-AUROC: 75.26 here, 98" in note
    assert "PatchCore" not in note
    assert "own paper" not in render.markdown(paper_table(find_spec("ulsad_1"), "published"))


def test_mean_over_seeds_of_a_category_is_what_ranks_use(runs):
    add(runs, "uniad", value=0.8)
    add(runs, "uniad", value=0.6, seed=1)
    assert set(seed_means(runs.read(), Query("mean_of_seven", "synthetic"))) == {0, 1}


@pytest.mark.parametrize("profile", ["demo", "paper"])
def test_the_default_row_of_patchcores_table_is_what_its_profiles_run(profile):
    content = yaml.safe_load(Path(f"sweeps/profiles/{profile}/patchcore.yaml").read_text())["model"]["init_args"]
    default = find_spec("patchcore").default
    assert default["model.init_args.coreset.ratio"] == content["coreset"]["ratio"]
    assert default["model.init_args.backbone.levels"] == content["backbone"]["levels"]
