"""UniAS's ablation tables: every cell of a sweep stands in its row, beside what the supplement printed."""

import pytest

from results.aggregator.build import category_tables, paper_table, sweep_table
from results.aggregator.spec import find_spec
from results.aggregator.sweep_cells import read_sweep

SCORED = (
    "pixel_ap", "dsc", "pixel_auroc", "dsc_threshold", "dsc_precision", "dsc_recall", "dsc_floor_nothing", "dsc_floor_all",
    "dsc_f1max", "dsc_anomalous",
)  # fmt: skip
VARIANTS = ("", *(f"levels={text}" for text in ("4", "3", "2", "1", "4+3", "4+1", "4+3+2", "4+3+2+1")))


def table_of(ablation: str, runs, variants=("",)):
    """The ablation's table from one run per cell; the nth cell's metrics are all 0.1 + 0.01 n."""
    sweep = read_sweep(f"sweeps/{ablation}.yaml")
    constants = {key: values[0] for key, values in sweep.values.items() if values and len(values) == 1}
    constants.pop("seed_everything")
    for number, cell in enumerate(sweep.cells()):
        values = {(v, c, m): 0.1 + 0.01 * number for v in variants for c in ("bolt", "gear", "tile") for m in SCORED}
        runs.add(
            ablation,
            cell | constants,
            method="unias",
            scored=SCORED,
            variants=variants,
            values=values,
            run=f"cell{number}",
        )
    return sweep_table(find_spec(ablation), runs.read(ablation), sweep)


@pytest.mark.parametrize(("ablation", "rows"), [("structural_components", 9), ("feature_filter", 4), ("sar", 4)])
def test_every_cell_fills_exactly_its_row_and_what_explains_dsc_stands_per_category(ablation, rows, runs):
    table = table_of(ablation, runs)
    assert table.missing == []
    labels = [column.label for column in table.columns if not column.group.startswith("printed")]
    assert [label for label in labels if not label.startswith("Param")] == ["P-AP", "DSC", "P-AUROC"]
    column = labels.index("DSC")
    assert [line[column].runs.mean for line in table.cells] == [pytest.approx(10 + n) for n in range(rows)]
    assert [row.default for row in table.rows].count(True) == 1
    detail = category_tables(find_spec(ablation), runs.read(ablation), read_sweep(f"sweeps/{ablation}.yaml"))[0]
    shown = [column.label for column in detail.columns]
    for label in ("P-AP", "DSC", "precision", "recall", "DSC at F1max", "DSC (anomalous)"):
        assert label in shown
    assert shown.count("DSC floor (nothing)") == shown.count("DSC floor (all)") == 1
    threshold = shown.index("threshold")
    assert detail.cells[0][threshold].runs.mean == pytest.approx(0.1)  # a score, not a percentage


def test_levels_selected_from_one_run_and_trained_by_themselves_stand_apart(runs):
    table = table_of("feature_levels", runs, VARIANTS)
    assert [row.group for row in table.rows] == ["Selected at test"] * 8 + ["Trained by itself"] * 8
    dsc = [line[1].runs for line in table.cells]
    assert {value.records for value in dsc[:8]} == {("feature_levels/cell7",)}
    assert [value.records for value in dsc[8:]] == [(f"feature_levels/cell{n}",) for n in range(8)]


def test_supplements_numbers_stand_in_the_same_rows(runs):
    for ablation, printed in (
        ("structural_components", [25.24, 39.06, 48.35, 49.27, 51.56, 52.70, 51.77, 54.26, 59.33]),
        ("feature_filter", [52.70, 51.77, 54.26, 59.33]),
        ("feature_levels", [36.88, 38.22, 37.47, 21.11, 45.55, 45.63, 55.03, 59.33] * 2),
    ):
        table = table_of(ablation, runs, VARIANTS if ablation == "feature_levels" else ("",))
        column = [(c.group, c.label) for c in table.columns].index(("printed, MVTec AD", "DSC"))
        assert [line[column].published.mean for line in table.cells] == printed


def test_papers_tables_3_and_4_take_our_runs_of_the_same_rows(runs):
    from results.aggregator.names import DATASET_CATEGORIES

    categories = DATASET_CATEGORIES["mvtec_ad"]
    for ablation, table_name, variants in (
        ("structural_components", "unias_3", ("",)),
        ("feature_levels", "unias_4", VARIANTS),
    ):
        sweep = read_sweep(f"sweeps/{ablation}.yaml")
        for number, cell in enumerate(sweep.cells()):
            runs.add(
                ablation, cell, method="unias", scored=SCORED, variants=variants, value=0.1 + 0.01 * number,
                dataset="mvtec_ad", categories=categories, run=f"cell{number}",
            )  # fmt: skip
        table = paper_table(find_spec(table_name), "both", runs.read(ablation))
        assert table.missing == []
        expected = [10 + n for n in range(9)] if ablation == "structural_components" else [17] * 8
        assert [line[1].runs.mean for line in table.cells] == [pytest.approx(value) for value in expected]
