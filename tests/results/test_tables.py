"""Tables from run records: order, spread, marks, gaps, and everything that must be refused."""

import csv
import io
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from results.__main__ import main
from results.aggregator import render
from results.aggregator.build import category_tables, paper_table, sweep_table
from results.aggregator.scores import ConflictError, newest
from results.aggregator.spec import Entry, Spec, SpecError, find_spec, read_spec
from results.aggregator.sweep_cells import canonical, read_sweep

SIZE, PLACE = "model.init_args.neighbor_size", "model.init_args.mask_places"
SWEEP = f"""
name: mask
method: grid
parameters:
  {SIZE}: {{values: [7, 1]}}
  {PLACE}: {{values: [[encoder], [encoder, decoder1]]}}
  seed_everything: {{values: [0, 1]}}
command: [x]
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "mask.yaml").write_text(SWEEP)
    return read_sweep(tmp_path / "mask.yaml")


def spec(**changes):
    columns = tuple(Entry((m,), where={"metric": m}) for m in ("image_auroc", "pixel_auroc"))
    values = {"default": {SIZE: 7, PLACE: ["encoder"]}, "columns": columns, "sweep": "mask"}
    return Spec("mask", "Mask", **{**values, **changes})


def fill(runs, seeds=(0, 1), skip=()):
    """Scores that differ by cell, seed and category."""
    for size in (7, 1):
        for places in (["encoder"], ["encoder", "decoder1"]):
            for seed in seeds:
                if (size, len(places), seed) in skip:
                    continue
                base = 0.9 + 0.01 * (size == 7) - 0.02 * (len(places) - 1) + 0.004 * seed
                values = {("", c, m): base + 0.01 * i for i, c in enumerate(("bolt", "gear", "tile")) for m in
                          ("image_auroc", "pixel_auroc")}  # fmt: skip
                runs.add("mask", {SIZE: size, PLACE: places}, seed, values=values)


def test_rows_follow_the_sweep_file_and_numbers_are_mean_and_std_of_seed_means(runs, sweep):
    fill(runs)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert [row.labels for row in table.rows] == [
        ("7", "{encoder}"), ("7", "{encoder, decoder1}"), ("1", "{encoder}"), ("1", "{encoder, decoder1}"),
    ]  # fmt: skip
    assert table.row_headers == ("neighbor size", "mask places")
    value = table.cells[0][0].runs
    expected = [100 * (0.91 + 0.01), 100 * (0.914 + 0.01)]  # means over three categories, seeds 0 and 1
    assert value.mean == pytest.approx(statistics.fmean(expected))
    assert value.std == pytest.approx(statistics.stdev(expected))
    assert value.n == 2
    assert [row.default for row in table.rows] == [True, False, False, False]
    assert table.cells[1][0].runs.gap == pytest.approx(-2.0)
    assert table.cells[0][0].runs.gap is None
    assert [line[0].runs.mark for line in table.cells] == ["best", "", "second", ""]
    assert table.missing == []


def test_the_terminal_and_markdown_show_mean_std_gap_and_marks(runs, sweep):
    fill(runs)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    text = render.markdown(table)
    assert "| 7 ★ | {encoder} | **92.2 ± 0.3** |" in text
    assert "| 1 | {encoder} | <u>91.2 ± 0.3 (−1.0)</u> |" in text
    shown = render.terminal(table)
    assert "\x1b[1m92.2 ± 0.3\x1b[0m" in shown
    assert "\x1b[4m91.2 ± 0.3 (−1.0)\x1b[0m" in shown


def _made_with(torch, timm="1.0.9"):
    return {"provenance": {"git_commit": "c0ffee" * 6, "versions": {"torch": torch, "timm": timm, "numpy": "2.1"}}}


def test_a_table_tells_which_rows_were_run_with_which_torch_and_timm(runs, sweep):
    for size, torch in ((7, "2.6.0"), (1, "2.7.1")):
        for places in (["encoder"], ["encoder", "decoder1"]):
            runs.add("mask", {SIZE: size, PLACE: places}, **_made_with(torch))
    table = sweep_table(spec(), runs.read("mask"), sweep)
    (note,) = table.notes
    assert "torch 2.6.0, timm 1.0.9: 7 / {encoder}, 7 / {encoder, decoder1};" in note
    assert "torch 2.7.1, timm 1.0.9: 1 / {encoder}, 1 / {encoder, decoder1}." in note
    for form in ("markdown", "latex", "html"):
        assert "2.7.1" in render.render(table, form)


def test_seeds_of_one_row_with_different_timm_are_told_and_still_averaged(runs, sweep):
    for seed, timm in ((0, "1.0.9"), (1, "1.0.15")):
        runs.add("mask", {SIZE: 7, PLACE: ["encoder"]}, seed, **_made_with("2.6.0", timm))
    records = runs.read("mask")
    table = sweep_table(spec(), records, sweep)
    assert table.cells[0][0].runs.n == 2, "versions are not part of a cell's identity"
    assert "timm 1.0.15: 7 / {encoder};" in table.notes[0]
    assert "timm 1.0.9: 7 / {encoder}." in table.notes[0]
    assert any("timm 1.0.15" in note for table in category_tables(spec(), records, sweep) for note in table.notes)


def test_equal_versions_stand_once_in_the_caption(runs, sweep):
    for size in (7, 1):
        runs.add("mask", {SIZE: size, PLACE: ["encoder"]}, **_made_with("2.6.0"))
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert table.notes == []
    assert table.caption.count("torch 2.6.0, timm 1.0.9") == 1


def test_the_caption_states_protocol_profile_seeds_backbone_weights_data_and_commit(runs, sweep):
    fill(runs)
    caption = sweep_table(spec(), runs.read("mask"), sweep).caption
    parts = ["clean", "profile demo", "seeds 0, 1 (n = 2 unless stated)", "backbone tiny", "weights imagenet", "64x64"]
    parts += ["synthetic (3 categories, fingerprint f00df00df0)", "Metrics version 1", "commit c0ffeec0ff"]
    for part in parts:
        assert part in caption, caption


@pytest.mark.parametrize(
    "note",
    [
        "NOTHING WAS TRAINED: the network is as it was initialised, and no number says anything of the method",
        "DATA CHANGED DURING THE RUN: the images are not those that the training began with",
        "TRAINED ON TEST IMAGES, 1 test image of 8: the very same file is trained on",
    ],
)
def test_a_run_that_did_not_train_or_measure_what_its_table_says_is_shouted_above_it(runs, sweep, note):
    for seed in (0, 1):
        runs.add("mask", {SIZE: 7, PLACE: ["encoder"]}, seed, notes=[note, "backbone: a plain note"])
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert f"{note}." in table.warnings
    assert not any("plain note" in warning for warning in table.warnings)


def test_random_weights_and_released_protocol_are_shouted(runs, sweep):
    for seed in (0, 1):
        runs.add(
            "mask",
            {SIZE: 7, PLACE: ["encoder"]},
            seed,
            protocol="as_released",
            backbone={"name": "t", "weights": "random"},
        )
    table = sweep_table(spec(), runs.read("mask"), sweep)
    for form in ("terminal", "markdown", "latex", "html"):
        text = " ".join(render.render(table, form).split()).replace("\\_", "_")
        assert "RANDOM BACKBONE WEIGHTS" in text, form
        assert "PROTOCOL as_released" in text, form
    assert "RANDOM weights" in table.caption


def test_one_seed_has_no_spread_and_says_so(runs, sweep):
    fill(runs, seeds=(0,))
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert table.cells[0][0].runs.std is None
    assert "one seed (0), so no spread" in table.caption
    assert "±" not in render.csv_text(table)


def test_a_missing_category_gives_a_dash_and_its_name_never_a_mean_over_fewer(runs, sweep):
    cell = {SIZE: 7, PLACE: ["encoder"]}
    runs.add("mask", cell, 0, drop={("", "gear", "image_auroc")})
    runs.add("mask", cell, 1)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert table.cells[0][0].runs.mean is None
    assert table.cells[0][1].runs.mean is not None
    assert any("image_auroc of gear is missing in mask/" in line and "seed0" in line for line in table.missing)
    assert "| 7 ★ | {encoder} | – |" in render.markdown(table)


def test_an_undefined_metric_is_a_dash_with_its_reason(runs, sweep):
    runs.add("mask", {SIZE: 7, PLACE: ["encoder"]}, 0, undefined={("", "tile", "pixel_auroc")})
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert any("pixel_auroc of tile is undefined in mask/" in line and "no masks" in line for line in table.missing)


def test_a_missing_cell_and_a_missing_seed_are_listed(runs, sweep):
    fill(runs, skip={(1, 2, 0), (1, 2, 1), (1, 1, 1)})
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert "no run of 1 / {encoder, decoder1}" in table.missing
    assert any("mask_places={encoder}: seed 1 is missing (there: 0)" in line for line in table.missing)
    text = render.markdown(table)
    assert "91.0 (−1.2) [n=1]" in text, "a number from fewer seeds than the others says so"
    assert "[n=2]" not in text


def test_runs_of_cells_that_the_sweep_file_does_not_have_are_named_not_shown(runs, sweep):
    fill(runs)
    runs.add("mask", {SIZE: 3, PLACE: ["encoder"]}, 0)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert len(table.rows) == 4
    assert any("not in the sweep file" in note and "neighbor_size=3" in note for note in table.notes)


def test_a_sweep_without_a_file_shows_the_cells_that_were_run(runs):
    fill(runs)
    table = sweep_table(spec(), runs.read("mask"), None)
    assert len(table.rows) == 4


@pytest.mark.parametrize(
    ("changes", "axis", "value"),
    [
        ({"protocol": "as_released"}, "protocol", "as_released"),
        ({"profile": "paper"}, "profile", "paper"),
        ({"image_size": (128, 128)}, "image size", "128x128"),
        ({"resize": "pil_lanczos"}, "resize", "pil_lanczos"),
        ({"backbone": {"name": "other", "weights": "imagenet"}}, "backbone", "other"),
        ({"backbone": {"name": "tiny", "weights": "random"}}, "random weights", "random backbone weights"),
        ({"metrics": {"version": "2"}}, "metric version", "2"),
        (
            {"datasets": [{"name": "synthetic", "fingerprint": "beef", "categories": ["bolt", "gear", "tile"]}]},
            "data",
            "beef",
        ),
    ],
)
def test_records_that_are_not_comparable_never_meet_and_are_named(runs, sweep, changes, axis, value):
    fill(runs, skip={(1, 1, 0)})
    runs.add("mask", {SIZE: 1, PLACE: ["encoder"]}, 0, **changes)
    with pytest.raises(ConflictError) as raised:
        sweep_table(spec(), runs.read("mask"), sweep)
    message = str(raised.value)
    assert f"{axis} differs:" in message
    assert value in message
    assert "mask/neighbor_size=1-mask_places=__encoder__-seed0" in message
    choice = f"--{axis}={value}" if axis == "profile" else "--protocol=clean" if axis == "protocol" else "--newest"
    assert f"ARGS={choice})" in message, "what make is given is a choice that helps"


def test_a_sweep_over_backbones_may_mix_backbones_and_nothing_else(runs, tmp_path):
    key = "model.init_args.backbone.name"
    (tmp_path / "b.yaml").write_text(f"name: b\nmethod: grid\nparameters: {{{key}: {{values: [one, two]}}}}")
    for name in ("one", "two"):
        runs.add("b", {key: name}, backbone={"name": name, "weights": "imagenet"})
    table = sweep_table(spec(sweep="b", default={}), runs.read("b"), read_sweep(tmp_path / "b.yaml"))
    assert all(line[0].runs.mean is not None for line in table.cells)


def test_seeds_of_one_cell_with_another_configuration_are_refused_with_the_key(runs, sweep):
    cell = {SIZE: 7, PLACE: ["encoder"]}
    runs.add("mask", cell, 0, config="trainer:\n  max_epochs: 3\ndata:\n  init_args:\n    num_workers: 1\n")
    runs.add("mask", cell, 1, config="trainer:\n  max_epochs: 5\ndata:\n  init_args:\n    num_workers: 2\n")
    with pytest.raises(ConflictError, match=r"configuration trainer\.max_epochs differs"):
        sweep_table(spec(), runs.read("mask"), sweep)


def test_workers_and_names_may_differ_between_seeds(runs, sweep):
    cell = {SIZE: 7, PLACE: ["encoder"]}
    for seed in (0, 1):
        runs.add("mask", cell, seed, config=f"data:\n  init_args:\n    num_workers: {seed}\n")
    assert sweep_table(spec(), runs.read("mask"), sweep).cells[0][0].runs.n == 2


def test_the_same_seed_twice_is_not_two_observations(runs, sweep):
    cell = {SIZE: 7, PLACE: ["encoder"]}
    runs.add("mask", cell, 0, run="first")
    runs.add("mask", cell, 0, run="again")
    with pytest.raises(ConflictError, match="the run of seed 0 differs"):
        sweep_table(spec(), runs.read("mask"), sweep)


def test_one_model_per_category_is_put_together_and_must_be_complete(runs):
    def add(category, seed):
        data = [{"name": "btad", "fingerprint": f"{category}{seed * 0}", "categories": [category]}]
        values = {("", category, "image_auroc"): float(f"0.9{category[-1]}")}
        runs.add(run=f"{category}-{seed}", seed=seed, categories=(category,), dataset="btad", setting="per_category",
                 datasets=data, method="ulsad", values=values)  # fmt: skip

    for category in ("01", "02"):
        for seed in (0, 1):
            add(category, seed)
    table = paper_table(find_spec("ulsad_15"), "runs", runs.read())
    last = [column.label for column in table.columns].index("ULSAD")
    shown = [line[last].runs.mean for line in table.cells]
    assert shown[:2] == [pytest.approx(91.0), pytest.approx(92.0)]
    assert shown[2:] == [None, None]
    assert any(line.startswith("Mean: ULSAD: image_auroc of 03 is missing") for line in table.missing)
    for seed in (0, 1):
        add("03", seed)
    table = paper_table(find_spec("ulsad_15"), "runs", runs.read())
    assert table.cells[3][last].runs.mean == pytest.approx(92.0)
    assert "one model per category" in table.caption


def test_ours_beside_the_papers_with_the_difference(runs):
    from results.aggregator.names import DATASET_CATEGORIES

    for seed in (0, 1, 2):
        runs.add(seed=seed, dataset="mvtec_ad", categories=DATASET_CATEGORIES["mvtec_ad"], value=0.97 + 0.001 * seed)
    table = paper_table(find_spec("uniad_1"), "both", runs.read())
    text = render.markdown(table)
    assert (
        "96.5 ± 0.08 \\| **97.1 ± 0.1** (+0.6)" in text.replace("**96.5 ± 0.08**", "96.5 ± 0.08")
        or "97.1 ± 0.1" in text
    )
    j = next(i for i, c in enumerate(table.columns) if (c.group, c.label) == ("UniAD", "unified"))
    assert table.cells[-1][j].difference == pytest.approx(97.1 - 96.5)
    assert table.cells[0][j].runs.mean == pytest.approx(97.1)
    assert len(table.missing) == 2
    assert table.missing[1] == "UniAD separate: no run with setting per_category (unified is there)"
    objects = [row.labels[0] for row in table.rows].index("Mean of objects")
    assert table.cells[objects][j].runs.mean == pytest.approx(97.1)


def test_runs_of_sweeps_do_not_slip_into_a_papers_table(runs):
    from results.aggregator.names import DATASET_CATEGORIES

    runs.add("mask", {SIZE: 1}, dataset="mvtec_ad", categories=DATASET_CATEGORIES["mvtec_ad"])
    table = paper_table(find_spec("uniad_1"), "runs", runs.read())
    assert all(cell.runs.mean is None for line in table.cells for cell in line)


def methods_run(runs, method, setting, value, **more):
    cell = {"method": method, "compare": "recipe", "data.init_args.setting": setting}
    runs.add("methods", cell, method=method, setting=setting, value=value, **more)


def test_a_papers_table_on_other_data_has_its_categories_and_never_subtracts(runs):
    methods_run(runs, "padim", "unified", 0.7)
    methods_run(runs, "padim", "per_category", 0.8)
    methods_run(runs, "uniad", "unified", 0.9)
    runs.add("sizes", {SIZE: 1}, value=0.1)
    table = paper_table(find_spec("uniad_1"), "both", runs.read(), dataset="synthetic")
    assert [row.labels[0] for row in table.rows] == ["bolt", "gear", "tile", "Mean", "Mean, printed, MVTec AD"]
    places = [f"{column.group} {column.label}" for column in table.columns]
    ours, printed = table.cells[3], table.cells[4]
    means = {place: cell.runs.mean for place, cell in zip(places, ours, strict=True) if cell.runs.mean is not None}
    assert means == {name: pytest.approx(number) for name, number in
                     (("PaDiM unified", 70), ("PaDiM separate", 80), ("UniAD unified", 90))}  # fmt: skip
    assert printed[places.index("UniAD unified")].published.mean == 96.5
    assert all(cell.published is None or cell.runs is None for line in table.cells for cell in line)
    assert "UniAD separate: no run with setting per_category (unified is there)" in table.missing
    assert "ours minus printed" not in table.caption


def test_a_table_of_means_has_a_column_of_other_data_before_the_printed_ones(runs):
    methods_run(runs, "ulsad", "per_category", 0.6)
    table = paper_table(find_spec("ulsad_1"), "both", runs.read(), dataset="synthetic")
    assert [(column.group, column.label) for column in table.columns[:2]] == [("", "synthetic"), ("Printed", "BTAD")]
    row = [row.labels[0] for row in table.rows].index("ULSAD")
    assert table.cells[row][0].runs.mean == pytest.approx(60)
    assert table.cells[row][1].published.mean == 96.17
    assert table.cells[row][1].runs is None


def test_two_metrics_of_other_data_keep_their_names_under_one_heading(runs):
    methods_run(runs, "ulsad", "per_category", 0.6, scored=("pixel_auroc", "pixel_aupro"))
    table = paper_table(find_spec("ulsad_2"), "both", runs.read(), dataset="synthetic")
    places = [(column.group, column.label) for column in table.columns]
    assert places[:3] == [("synthetic", "P-AUROC"), ("synthetic", "AUPRO"), ("BTAD, printed", "P-AUROC")]
    assert len(places) == 12
    assert [cell.runs.mean for cell in table.cells[-1][:2]] == pytest.approx([60, 60])
    assert table.cells[-1][2].published.mean == 96.73


def test_the_papers_own_data_are_no_other_data(runs):
    methods_run(runs, "ulsad", "per_category", 0.6, dataset="mvtec_loco")
    for name in ("ulsad_1", "ulsad_9"):
        with pytest.raises(SpecError, match=f"{name} is of MVTec LOCO already"):
            paper_table(find_spec(name), "both", runs.read(), dataset="mvtec_loco")


def test_other_data_must_be_there_and_belong_to_no_sweep(runs):
    methods_run(runs, "uniad", "unified", 0.9)
    with pytest.raises(SpecError, match="no run is of the data set 'mvtec'; runs are of synthetic"):
        paper_table(find_spec("uniad_1"), "both", runs.read(), dataset="mvtec")
    with pytest.raises(SpecError, match="made from the sweep fusion"):
        paper_table(find_spec("rlr_1"), "both", runs.read(), dataset="synthetic")
    runs.add(run="mine", dataset="mine", categories=("bolt", "mean"))
    with pytest.raises(SpecError, match="mine has a category called mean"):
        paper_table(find_spec("uniad_1"), "both", runs.read(), dataset="mine")


def test_rows_may_be_variants_of_one_run_beside_the_printed_rows(runs):
    variants = [f"levels={text}" for text in ("4", "3", "2", "1", "4+3", "4+1", "4+3+2", "4+3+2+1")]
    values = {(v, c, "dsc"): 0.5 + 0.01 * i for i, v in enumerate(variants) for c in ("bolt", "gear", "tile")}
    for seed in (0, 1):
        runs.add("feature_levels", {"model.init_args.levels": [4, 3, 2, 1]}, seed, variants=variants, values=values,
                 scored=("pixel_ap", "dsc", "pixel_auroc"), method="unias")  # fmt: skip
    levels = find_spec("unias_4")
    table = sweep_table(levels, runs.read("feature_levels"), None)
    assert [line[1].runs.mean for line in table.cells] == [pytest.approx(50.0 + i) for i in range(8)]
    assert table.cells[0][1].runs.gap == pytest.approx(-7.0)
    assert [column.group for column in table.columns] == [""] * 3 + ["printed, MVTec AD"] * 3
    assert table.cells[7][4].published.mean == 59.33


def test_a_papers_table_of_backbones_is_filled_from_the_sweep_over_them(runs):
    from results.aggregator.names import DATASET_CATEGORIES

    categories = DATASET_CATEGORIES["mvtec_loco"]
    for value, name in ((0.8, "resnet50.a1_in1k"), (0.85, "wide_resnet50_2.racm_in1k")):
        runs.add("backbones", {"model.init_args.backbone.name": name}, value=value, dataset="mvtec_loco", method="ulsad",
                 categories=categories, backbone={"name": name, "weights": "imagenet"},
                 scored=("image_auroc", "pixel_auroc", "pixel_aupro"), setting="per_category")  # fmt: skip
    table = paper_table(find_spec("ulsad_23"), "both", runs.read())
    assert table.cells[5][0].difference == pytest.approx(80.0 - 81.79)
    assert table.cells[0][3].runs is None, "the unnamed fourth number has no counterpart"
    assert table.missing == ["ResNet152 I-AUROC, ResNet152 P-AUROC, ResNet152 AUPRO, WideResNet101-2 I-AUROC, "
                             "WideResNet101-2 P-AUROC, WideResNet101-2 AUPRO: no run"]  # fmt: skip


def test_runs_of_the_other_setting_are_not_taken_and_their_existence_is_told(runs):
    runs.add(dataset="btad", categories=("01", "02", "03"), method="ulsad")
    table = paper_table(find_spec("ulsad_15"), "runs", runs.read())
    assert "ULSAD: no run with setting per_category (unified is there)" in table.missing


def test_costs_come_from_the_records(runs, tmp_path):
    sweep = read_sweep(Path(__file__).parents[2] / "sweeps" / "k_references.yaml")
    for cell in sweep.cells():
        for seed in (0, 2):
            references = cell["model.init_args"]["references"]
            runs.add("k_references", cell, seed, method="rlr", parameters={"trainable": references * 1_000_000})
    table = sweep_table(find_spec("rlr_2"), runs.read("k_references"), sweep)
    labels = [column.label for column in table.columns[:5]]
    assert labels[2:] == ["Parameters [M]", "Time per epoch [s]", "Peak memory [MiB]"]
    assert [line[2].runs.mean for line in table.cells] == [1.0, *[2.0] * 4, *[3.0] * 4], "a cell without its row"
    assert all(line[2].runs.mark == "" and line[2].runs.gap is None for line in table.cells)


def test_several_data_sets_get_a_group_of_columns_each(runs, sweep):
    data = [
        {"name": name, "fingerprint": name, "categories": ["bolt", "gear", "tile"]} for name in ("synthetic", "btad")
    ]
    cell = {SIZE: 7, PLACE: ["encoder"]}
    path = runs.add("mask", cell, 0, datasets=data)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert [column.group for column in table.columns] == ["synthetic"] * 2 + ["BTAD"] * 2
    assert table.cells[0][0].runs.mean is not None
    assert table.cells[0][2].runs.mean is None, path
    assert any("BTAD" in line and "is missing" in line for line in table.missing)


def test_a_threshold_is_a_score_not_a_percentage_and_has_no_mean(runs, sweep):
    values = {("", category, "dsc_threshold"): 12.5 for category in ("bolt", "gear", "tile")}
    runs.add("mask", {SIZE: 7, PLACE: ["encoder"]}, 0, scored=("dsc_threshold",), values=values)
    columns = (Entry(("t",), where={"metric": "dsc_threshold"}),)
    table = category_tables(spec(columns=columns), runs.read("mask"), sweep)[0]
    assert [line[0].runs.mean for line in table.cells] == [12.5, 12.5, 12.5, None]


def test_pooled_scores_of_the_data_set_win_over_those_of_everything(runs):
    from results.aggregator.records import METRIC_COLUMNS, RunRecord, write_record
    from results.aggregator.scores import Pool, Query

    runs.add()
    stored = runs.read()[0]
    extra = [
        ("", "pooled", dataset, "", "image_auroc", value, 30, "") for dataset, value in (("", 0.5), ("synthetic", 0.6))
    ]
    metrics = pd.concat([stored.metrics, pd.DataFrame(extra, columns=list(METRIC_COLUMNS))])
    record = RunRecord(**{**vars(stored.record), "run": "pooled", "sweep": "other"})
    write_record(runs.root, record, metrics, stored.history, "")
    value = Pool(runs.read("other")).value(Query("image_auroc", "synthetic", "pooled"))
    assert value.mean == pytest.approx(60.0)


def test_each_cell_has_a_table_per_category(runs, sweep):
    fill(runs)
    tables = category_tables(spec(), runs.read("mask"), sweep)
    assert len(tables) == 4
    assert tables[0].title == "Mask: neighbor size: 7, mask places: {encoder} (default)"
    assert [row.labels[0] for row in tables[0].rows] == ["bolt", "gear", "tile", "Mean"]
    means = [line[0].runs.mean for line in tables[0].cells]
    assert means[3] == pytest.approx(statistics.fmean(means[:3]))
    assert tables[0].cells[1][0].runs.mean == pytest.approx(100 * (0.912 + 0.01))


def test_the_spread_of_a_mean_row_can_be_the_papers_rms(runs, sweep):
    cell = {SIZE: 7, PLACE: ["encoder"]}
    for seed, bolt in enumerate((0.90, 0.94)):
        runs.add("mask", cell, seed, values={("", "bolt", "image_auroc"): bolt})
    own = sweep_table(spec(), runs.read("mask"), sweep).cells[0][0].runs.std
    rms = sweep_table(spec(), runs.read("mask"), sweep, rms_std=True).cells[0][0].runs.std
    bolt = 100 * statistics.stdev((0.90, 0.94))
    assert own == pytest.approx(bolt / 3)
    assert rms == pytest.approx(bolt / 3**0.5)


def test_ties_at_the_printed_precision_share_the_mark(runs, sweep):
    fill(runs, seeds=(0,), skip={(1, 1, 0)})
    values = {("", c, m): 0.91 + 0.01 * i + 1e-5 for i, c in enumerate(("bolt", "gear", "tile")) for m in
              ("image_auroc", "pixel_auroc")}  # fmt: skip
    runs.add("mask", {SIZE: 1, PLACE: ["encoder"]}, 0, values=values)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    assert [line[0].runs.mark for line in table.cells] == ["best", "second", "best", ""]


def test_labels_for_a_parameter_that_the_sweep_does_not_have_are_an_error(runs, sweep):
    fill(runs)
    with pytest.raises(SpecError, match=r"no parameter 'neighbour_size'\. Did you mean"):
        sweep_table(spec(parameters={"neighbour_size": {"label": "Size"}}), runs.read("mask"), sweep)


def test_the_last_part_of_a_key_is_enough_in_a_spec(runs, sweep):
    fill(runs)
    labels = {
        "mask_places": {"label": "Place", "values": {"[encoder]": "Enc"}},
        "neighbor_size": {"values": {7: "7×7"}},
    }
    table = sweep_table(spec(parameters=labels, default={"neighbor_size": 7}), runs.read("mask"), sweep)
    assert table.row_headers == ("Place", "neighbor size")
    assert [row.labels for row in table.rows][:2] == [("Enc", "7×7"), ("Enc", "1")]


def test_every_committed_spec_of_a_committed_sweep_fits_it():
    from pathlib import Path

    from results.aggregator.spec import FOLDER

    sweeps = Path(__file__).parents[2] / "sweeps"
    for path in sorted(FOLDER.glob("*.yaml")):
        table = read_spec(path)
        file = sweeps / f"{table.sweep}.yaml"
        if table.sweep is None or not file.is_file():
            continue
        sweep = read_sweep(file)
        for key in (
            *table.parameters,
            *table.default,
            *(k for r in table.rows or () for k in r.runs.get("cell") or {}),
        ):
            assert any(known == key or known.endswith(f".{key}") for known in sweep.values), (path.name, key)
        for row in table.rows or ():
            for key, value in (row.runs.get("cell") or {}).items():
                known = next(k for k in sweep.values if k == key or k.endswith(f".{key}"))
                allowed = [canonical(v) for v in sweep.values[known] or [value]]
                assert canonical(value) in allowed, (path.name, key, value)
        if table.default and table.rows is None:
            defaults = sum(
                all(canonical(v) == canonical(next(cell[k] for k in cell if k == key or k.endswith(f".{key}")))
                    for key, v in table.default.items())
                for cell in sweep.cells() or []
            )  # fmt: skip
            assert defaults == 1, f"{path.name}: {defaults} default rows"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True), (True, 1, False), ([4, 3], (4, 3), True), ("null", None, True), ("[4, 3]", [4, 3], True),
        ("1e-4", 0.0001, True), ("none", None, False), ("7", 7, True), ("layerwise", "layerwise", True),
    ],
)  # fmt: skip
def test_two_spellings_of_one_value_are_one_cell(one, other, same):
    assert (canonical(one) == canonical(other)) is same


def test_a_csv_table_holds_every_digit_and_the_records_behind_it(runs, sweep):
    fill(runs)
    table = sweep_table(spec(), runs.read("mask"), sweep)
    lines = list(csv.DictReader(io.StringIO(render.csv_text(table))))
    assert len(lines) == 8
    assert float(lines[0]["value"]) == pytest.approx(92.2)
    assert lines[0]["records"].split() == list(table.cells[0][0].runs.records)
    assert lines[0]["default"] == "yes"


def test_a_sweeps_table_may_be_asked_for_by_the_sweeps_name(runs, tmp_path, capsys):
    cell = {"references": 1, "diversity_weight": 0.0, "key_reference": "last"}
    runs.add("k_references", {"model.init_args": cell}, 0, value=0.8125, method="rlr")
    runs.add("my_own", {SIZE: 7}, 0, value=0.7125)
    arguments = ["--root", str(runs.root), "--out", str(tmp_path), "--format", "csv"]
    assert main(["table", "k_references", *arguments]) == 0
    assert "81.25" in capsys.readouterr().out, "the paper's table rlr_2 is of MVTec AD alone"
    runs.add("fusion", {"model.init_args.fusion": "alpha"}, 0, value=0.6125, method="rlr")
    assert main(["table", "fusion", *arguments]) == 0
    assert "61.25" in capsys.readouterr().out, "the paper's table of the same name is of MVTec AD alone"
    assert main(["table", "fusion", "--source", "both", *arguments]) == 0
    assert "98.6" in capsys.readouterr().out
    assert main(["table", "my_own", *arguments]) == 0
    assert "71.25" in capsys.readouterr().out
    assert main(["table", "k_references", "--source", "published", *arguments]) == 2
    assert "TABLE=rlr_2" in capsys.readouterr().err.replace("\n", " ")
    assert main(["table", "k_reference", *arguments]) == 2
    assert "Did you mean 'k_references'?" in capsys.readouterr().err.replace("\n", " ")


def test_runs_of_two_profiles_are_two_tables(runs, tmp_path):
    (tmp_path / "mask.yaml").write_text(SWEEP)
    fill(runs)
    runs.add("mask", {SIZE: 7, PLACE: ["encoder"]}, 0, value=0.5, run="long", profile="paper")
    out = tmp_path / "out"
    arguments = ["--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(out)]
    assert main(["sweep", "mask", *arguments]) == 0
    values = {
        kind: {line["value"] for line in csv.DictReader((out / f"mask.{kind}.clean.csv").open()) if line["value"]}
        for kind in ("demo", "paper")
    }
    assert {float(value) for value in values["paper"]} == {50.0}
    assert 50.0 not in {float(value) for value in values["demo"]}
    shown = {path.name: path.read_text() for path in out.iterdir() if "categories" not in path.name}
    assert main(["tables", *arguments]) == 0
    assert {name: (out / name).read_text() for name in shown} == shown, "one table by either command has one name"
    assert not (out / "mask.csv").exists()
    assert main(["sweep", "mask", *arguments, "--profile", "paper"]) == 0
    assert (out / "mask.csv").exists()


def test_the_command_line_prints_writes_and_names_damaged_records(runs, tmp_path, capsys):
    (tmp_path / "mask.yaml").write_text(SWEEP)
    fill(runs)
    damaged = next((runs.root / "mask").iterdir()) / "metrics.csv"
    damaged.write_bytes(damaged.read_bytes()[:40])
    arguments = ["sweep", "mask", "--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"mask{part}.{suffix}" for part in ("", ".categories") for suffix in ("md", "csv", "tex")
    }
    shown = capsys.readouterr()
    assert "damaged record, left out" in shown.err
    assert "Missing" in shown.out
    assert main([*arguments, "--strict"]) == 1
    assert main([*arguments, "--profile", "paper"]) == 2
    assert main([*arguments, "--runs", f"mask/{damaged.parent.name}", "--runs", "mask/*"]) == 1
    others = [name.name for name in (runs.root / "mask").iterdir() if name != damaged.parent]
    chosen = [word for name in others for word in ("--runs", f"mask/{name}")]
    assert main([*arguments, *chosen]) == 0, "the damaged one was not asked for"
    assert main(["sweep", "msk", "--root", str(runs.root)]) == 2
    assert "Did you mean 'mask'" in capsys.readouterr().err.replace("\n", " ")


def test_of_two_code_versions_the_refusal_names_both_and_the_newest_can_be_chosen(runs, tmp_path, capsys):
    (tmp_path / "mask.yaml").write_text(SWEEP)
    fill(runs)
    old = runs.read("mask")[0].record
    made = {"git_commit": "decade" * 6, "git_dirty": True, "started": "2026-01-02T03:04:05+00:00"}
    runs.add(
        "mask",
        {k: v for k, v in old.cell.items() if k != "seed_everything"},
        old.seed,
        0.25,
        run="again",
        provenance=made,
    )
    arguments = ["sweep", "mask", "--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    shown = capsys.readouterr().err.replace("\n", " ")
    assert "commit c0ffeec0ff" in shown
    assert "commit decadedeca with changes, started 2026-01-02T03:04:05" in shown
    assert "ARGS=--newest" in shown
    assert main([*arguments, "--newest"]) == 0
    kept = newest(runs.read("mask"))
    assert len(kept) == len(runs.read("mask")) - 1
    assert old.run not in [stored.record.run for stored in kept]


def test_before_the_first_run_a_papers_table_shows_what_is_printed(tmp_path, capsys):
    assert main(["table", "unias_4", "--source", "both", "--root", str(tmp_path / "runs"), "--format", "csv"]) == 0
    shown = capsys.readouterr().out
    published = paper_table(find_spec("unias_4"), "published")
    assert f"{published.cells[0][0].published.mean:.2f}" in shown


@pytest.mark.program
def test_tables_need_no_torch_so_that_a_laptop_rebuilds_them_at_once():
    code = "import sys, results.__main__, results.aggregator.report; print({'torch', 'lightning', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_sweep_of_many_cells_has_every_seed_of_every_cell_in_its_table(runs, tmp_path):
    values = list(range(24))
    (tmp_path / "many.yaml").write_text(
        f"name: many\nmethod: grid\nparameters: {{a.b: {{values: {values}}}, seed_everything: {{values: [0, 1]}}}}"
    )
    for value in values:
        for seed in range(5):
            runs.add("many", {"a.b": value}, seed, value=value / 100)
    table = sweep_table(spec(sweep="many", default={}), runs.read("many"), read_sweep(tmp_path / "many.yaml"))
    assert [row.labels for row in table.rows] == [(str(value),) for value in values]
    assert [line[0].runs.n for line in table.cells] == [5] * 24
    assert [line[0].runs.mean for line in table.cells] == pytest.approx(values)


def test_all_tables_are_written_without_a_damaged_record_and_the_exit_code_says_so(runs, tmp_path, capsys):
    (tmp_path / "mask.yaml").write_text(SWEEP)
    fill(runs)
    arguments = ["tables", "--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    whole = {path.name for path in (tmp_path / "out").iterdir()}
    damaged = next((runs.root / "mask").iterdir()) / "metrics.csv"
    damaged.write_bytes(damaged.read_bytes()[:40])
    capsys.readouterr()
    assert main(arguments) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == whole
    assert damaged.parent.name in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("name", ["methods", "hvq_components"], ids=["rows of the sweep", "rows of its own"])
def test_a_sweeps_own_table_takes_no_data_set_and_is_in_no_paper(runs, capsys, name):
    assert main(["table", name, "--dataset", "photos", "--root", str(runs.root)]) == 2
    assert "leave --dataset (DATASET=) out" in capsys.readouterr().err
    assert main(["table", name, "--source", "published", "--root", str(runs.root)]) == 2
    assert "leave --source (SOURCE=) out" in capsys.readouterr().err


def test_without_runs_a_sweeps_table_names_the_papers_of_that_name_where_there_is_one(runs, capsys):
    for options in ([], ["--dataset", "photos"]):
        for name, printed in (("fusion", True), ("sar", False)):
            assert main(["table", name, "--root", str(runs.root), *options]) == 2
            told = " ".join(capsys.readouterr().err.split())
            assert (told.endswith("--source both (SOURCE=both) shows the paper's table of that name.")) is printed


def test_a_sweeps_own_table_with_rows_of_its_own_is_the_sweeps(runs, tmp_path):
    for hierarchy in (0, 1):
        runs.add("hvq_components", {"model.init_args": {"hierarchy": hierarchy, "selector": "label"}})
    assert main(["table", "hvq_components", "--root", str(runs.root), "--out", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in (tmp_path / "hvq_components.md").read_text().splitlines()]
    ours = {row[0]: row[5].strip("*") for row in rows if len(row) > 5}
    assert (ours["| none"], ours["| 4"], ours["| all"]) == ("90.0", "90.0", "–")
