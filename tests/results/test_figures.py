"""Curves and figures: the right epochs and numbers, drawn from the right runs."""

import dataclasses
import math

import pytest

from results.__main__ import main
from results.aggregator import figures, render
from results.aggregator.build import paper_table, sweep_table
from results.aggregator.curves import Curve, curve_table, read_curve
from results.aggregator.spec import Entry, Spec, find_spec
from results.aggregator.sweep_cells import read_sweep
from results.aggregator.table import Cell

KEY = "model.init_args.network"
IMAGE = [0.70, 0.92, 0.85, 0.80]
PIXEL = [0.90, 0.95, 0.96, 0.94]


def shortcut(runs, networks=("mlp", "uniad"), seeds=(0, 1), epochs=4, drop=()):
    for network in networks:
        for seed in seeds:
            history = []
            for epoch in range(epochs):
                history.append((epoch, epoch * 10, "train/loss", 10.0 ** -(epoch + 1)))
                if (network, seed) not in drop:
                    history.append((epoch, epoch * 10, "curve/image_auroc", IMAGE[epoch] + 0.01 * seed))
                    history.append((epoch, epoch * 10, "curve/pixel_auroc", PIXEL[epoch]))
            runs.add("identical_shortcut", {KEY: network}, seed, history=history, method="identical_shortcut")


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "identical_shortcut.yaml"
    path.write_text(f"name: identical_shortcut\nmethod: grid\nparameters: {{{KEY}: {{values: [mlp, uniad]}}}}")
    return read_sweep(path)


def test_peak_epoch_final_and_drop_are_read_off_the_curves(runs, sweep):
    shortcut(runs)
    table = curve_table(find_spec("identical_shortcut"), runs.read(), sweep)
    assert [row.labels for row in table.rows] == [("MLP",), ("UniAD",)]
    assert [f"{c.group} {c.label}" for c in table.columns] == [
        f"{group} {label}"
        for group, labels in (
            ("Loss", ("first", "final")),
            ("Image AUROC", ("peak", "epoch", "final", "drop")),
            ("Pixel AUROC", ("peak", "epoch", "final", "drop")),
        )
        for label in labels
    ]
    values = [cell.runs.mean for cell in table.cells[0]]
    assert values[:2] == [pytest.approx(0.1), pytest.approx(1e-4)]
    assert values[2:6] == [pytest.approx(92.5), 1, pytest.approx(80.5), pytest.approx(12.0)]
    assert values[6:] == [pytest.approx(96.0), 2, pytest.approx(94.0), pytest.approx(2.0)]
    assert table.cells[0][2].runs.std == pytest.approx(math.sqrt(0.5))
    text = render.markdown(table)
    assert "0.0001" in text
    assert "**" not in text.split("|---")[1], "curves are not ranked"


def test_a_run_without_a_curve_is_a_dash_and_named(runs, sweep):
    shortcut(runs, drop={("mlp", 1)})
    table = curve_table(find_spec("identical_shortcut"), runs.read(), sweep)
    assert table.cells[0][2].runs.mean is None
    assert any(
        "no curve/image_auroc in the history of identical_shortcut/network=mlp-seed1" in m for m in table.missing
    )


def test_runs_of_different_length_are_shouted(runs, sweep):
    shortcut(runs, networks=("mlp",))
    shortcut(runs, networks=("uniad",), epochs=3)
    table = curve_table(find_spec("identical_shortcut"), runs.read(), sweep)
    assert any("different length" in warning for warning in table.warnings)


def test_steps_of_one_epoch_are_averaged(runs):
    runs.add(history=[(0, 1, "train/loss", 1.0), (0, 2, "train/loss", 3.0), (2, 3, "train/loss", 1.0)])
    assert read_curve(runs.read()[0], "train/loss") == Curve((0, 2), (2.0, 1.0))
    assert read_curve(runs.read()[0], "curve/image_auroc") is None


def test_the_shortcut_figure_has_loss_in_blue_on_a_log_axis_localisation_red_detection_green(runs, sweep):
    shortcut(runs)
    figure = figures.curves_figure(find_spec("identical_shortcut"), runs.read(), sweep)
    loss, right = figure.axes[0], next(axis for axis in figure.axes if axis not in figure.axes[:2])
    assert loss.get_yscale() == "log"
    assert loss.get_title() == "MLP"
    assert {line.get_color() for line in loss.lines} == {figures.BLUE}
    assert [line.get_color() for line in right.lines if line.get_linewidth() > 1] == [figures.RED, figures.GREEN]
    green = [line for line in right.lines if line.get_linewidth() > 1][1]
    assert list(green.get_ydata()) == pytest.approx([100 * value + 0.5 for value in IMAGE])
    assert "<svg" in figures.svg(figure)


def bars(runs, tmp_path):
    for size in (1, 7):
        for seed in (0, 1):
            runs.add(
                "m",
                {"a.size": size},
                seed,
                value=0.8 + 0.01 * size + 0.002 * seed,
                parameters={"trainable": size * 10**6},
            )
    columns = (Entry(("I",), where={"metric": "image_auroc"}), Entry(("P",), where={"metric": "parameters"}))
    spec = Spec("m", "M", sweep="m", columns=columns, default={"a.size": 7})
    return sweep_table(spec, runs.read(), None), runs.read()


def test_ablation_bars_show_the_mean_and_every_seed_as_a_dot(runs, tmp_path):
    table, records = bars(runs, tmp_path)
    figure = figures.ablation_bars(table, records)
    assert len(figure.axes) == 1, "costs get no bars"
    assert [patch.get_width() for patch in figure.axes[0].patches] == pytest.approx([81.1, 87.1])
    assert list(figure.axes[0].lines[1].get_xdata()) == pytest.approx([87.0, 87.2])
    path = figures.save(figure, tmp_path / "bars.png")
    again = figures.save(figures.ablation_bars(table, records), tmp_path / "again.png")
    assert path.read_bytes() == again.read_bytes(), "the same table gives the same file"


def test_cost_against_quality_needs_two_rows_that_state_both(runs, tmp_path):
    table, records = bars(runs, tmp_path)
    figure = figures.cost_against_quality(table, records, "image_auroc", "parameters")
    assert figure.axes[0].get_xlabel() == "Parameters [M]"
    assert figures.cost_against_quality(table, records, "pixel_auroc", "parameters") is None


def test_rows_of_the_same_name_are_told_apart_by_their_groups(runs, tmp_path):
    table, records = bars(runs, tmp_path)
    alone = figures.ablation_bars(table, records).axes[0].get_yticklabels()
    assert not any(":" in label.get_text() for label in alone)
    table.rows = [dataclasses.replace(row, labels=("same",), group=f"group {n}") for n, row in enumerate(table.rows)]
    labels = [label.get_text() for label in figures.ablation_bars(table, records).axes[0].get_yticklabels()]
    assert [label.removesuffix(" ★") for label in labels] == [f"group {n}: same" for n in range(len(table.rows))]


def test_dots_against_published_pair_the_right_categories(runs):
    from results.aggregator.names import DATASET_CATEGORIES

    runs.add(dataset="mvtec_ad", categories=DATASET_CATEGORIES["mvtec_ad"], value=0.95)
    table = paper_table(find_spec("uniad_1"), "both", runs.read())
    axis = figures.against_published(table, "image_auroc").axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "bottle · UniAD unified"
    assert len(labels) == 18
    assert figures.against_published(paper_table(find_spec("uniad_2"), "both", []), "pixel_auroc") is None


def test_the_command_line_writes_the_curves_table_and_figure(runs, tmp_path, sweep):
    shortcut(runs)
    arguments = ["--root", str(runs.root), "--sweeps", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["sweep", "identical_shortcut", *arguments]) == 0
    assert (tmp_path / "out" / "identical_shortcut.png").stat().st_size > 10_000
    assert main(["figures", "uniad_1", *arguments]) == 2, "no run of MVTec AD: nothing to draw"
    assert main(["figures", "identical_shortcut", *arguments, "--suffix", "svg"]) == 0
    assert (tmp_path / "out" / "identical_shortcut.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(("name", "said"), [("shot", "Did you mean 'shots'?"), ("", "there is no sweep or table ''")])
def test_figures_of_nothing_are_refused_by_name_with_and_without_runs(runs, tmp_path, capsys, name, said):
    shortcut(runs)
    for root in (runs.root, tmp_path / "empty"):
        assert main(["figures", name, "--root", str(root), "--out", str(tmp_path / "out")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_dots_of_a_variants_row_are_the_variants_own(runs):
    for seed in (0, 1):
        keys = {("at test", c, "image_auroc"): 0.8 + seed / 100 for c in ("bolt", "gear", "tile")}
        runs.add("mask", {"model.size": 1}, seed, value=0.5, variants=("", "at test"), values=keys)
    records = runs.read("mask")
    cell = Cell(key={"metric": "image_auroc", "dataset": "synthetic"}, variant="at test")
    assert figures._seed_dots(records, cell) == pytest.approx([80.0, 81.0])
