"""Tables and figures of what methods need of their training data: shots, contamination, number of categories."""

from __future__ import annotations

from pathlib import Path

import pytest

from results.aggregator import figures
from results.aggregator.build import sweep_table
from results.aggregator.scores import ConflictError
from results.aggregator.spec import SpecError, find_spec, read_spec, spec_for_sweep
from results.aggregator.sweep_cells import read_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"
COUNT = "data.init_args.category_count"
NAMES = tuple("abcdefghij")


@pytest.fixture
def counted(runs):
    """Runs of 1, 2, 4, 7 and 10 categories; with every further category all scores are a hundredth lower.

    UniAD with fixed passes is 0.01 better than with fixed steps; nearest neighbours do not heed them.
    """
    sweep = read_sweep(SWEEPS / "category_count.yaml")
    for cell in sweep.cells():
        count = cell[COUNT]
        best = 0.8 if cell["method"] != "uniad" else 0.9 if cell["data.init_args.epoch_images"] == 160 else 0.91
        for seed in (0, 1):
            values = {
                ("", name, metric): best - 0.01 * count + 0.02 * NAMES.index(name) + 0.001 * seed
                for name in NAMES
                for metric in ("image_auroc", "pixel_auroc")
            }
            runs.add("category_count", cell, seed, categories=NAMES[:count], values=values, method=cell["method"])
    return sweep_table(find_spec("category_count"), runs.read(), sweep), runs.read(), sweep


def row(table, *labels):
    return next(line for line, row in zip(table.cells, table.rows, strict=True) if row.labels == labels)


def test_every_count_is_measured_on_the_same_categories(counted):
    table, _, _ = counted
    ten = row(table, "UniAD", "fixed steps", "10")
    # On the first category, and on the first four: their mean offset is (0 + 2 + 4 + 6) / 4 hundredths.
    assert ten[0].runs.mean == pytest.approx(100 * (0.9 - 0.1 + 0.0005))
    assert ten[2].runs.mean == pytest.approx(100 * (0.9 - 0.1 + 0.03 + 0.0005))
    assert ten[0].runs.n == 2
    two = row(table, "UniAD", "fixed passes", "2")
    assert two[0].runs.mean == pytest.approx(100 * (0.91 - 0.02 + 0.0005))
    assert two[2].runs.mean is None, "a mean over two of the four would look like one over all"


def test_the_figure_has_a_line_per_method_and_training_equal_ones_once_with_every_seed_as_a_dot(counted):
    table, records, _ = counted
    figure = figures.sweep_figure(find_spec("category_count"), table, records)
    panel = figure.axes[0]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "2", "4", "7", "10"]
    lines = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["Nearest neighbours", "UniAD, fixed steps", "UniAD, fixed passes"]
    assert lines["UniAD, fixed steps"].get_ydata() == pytest.approx(
        [100 * (0.9005 - 0.01 * n) for n in (1, 2, 4, 7, 10)]
    )
    dots = sorted(y for line in panel.lines if line.get_label().startswith("_") for y in line.get_ydata())
    assert len(dots) == 3 * 5 * 2
    assert dots[-1] == pytest.approx(100 * (0.91 - 0.01 + 0.001))


@pytest.mark.parametrize(("name", "key"), [("shots", "shots"), ("contamination", "contamination")])
def test_the_sweeps_table_and_figure_have_every_cell(runs, name, key):
    sweep = read_sweep(SWEEPS / f"{name}.yaml")
    for cell in sweep.cells():
        value = cell[f"data.init_args.{key}"]
        data = {"name": "synthetic", "fingerprint": "f00d", "categories": ["bolt", "gear", "tile"]}
        data |= {key: value} if value not in (0.0, "null") else {}
        runs.add(
            name, cell, method=cell["method"], scored=("image_auroc", "pixel_auroc", "pixel_aupro"), datasets=[data]
        )
    table = sweep_table(find_spec(name), runs.read(), sweep)
    assert all(cell.runs.mean is not None for line in table.cells for cell in line)
    assert "trained with" in table.caption
    assert sum(row.default for row in table.rows) == 1
    figure = figures.sweep_figure(find_spec(name), table, runs.read())
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == {"shots": ["1", "2", "4", "8", "16", "all"], "contamination": ["0 %", "2 %", "5 %", "10 %"]}[name]


def test_a_run_on_few_shots_never_stands_beside_one_on_all_images(runs):
    data = {"name": "synthetic", "fingerprint": "f00d", "categories": ["bolt", "gear", "tile"]}
    runs.add("mine", {"a.b": 1}, 0, datasets=[data])
    runs.add("mine", {"a.b": 1}, 1, datasets=[{**data, "shots": 4}])
    with pytest.raises(ConflictError, match="shots 4"):
        sweep_table(spec_for_sweep("mine"), runs.read(), None)


def test_lines_need_a_parameter_for_their_axis(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("title: x\nkind: lines\nsweep: mine\nrows: sweep\ncolumns: [image_auroc]\n")
    with pytest.raises(SpecError, match="needs x"):
        read_spec(file)
