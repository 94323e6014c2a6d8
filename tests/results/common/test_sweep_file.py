"""The runner and the tables see the same sweep: what is run is what a table has rows for."""

from __future__ import annotations

from pathlib import Path

import pytest

from results.aggregator.sweep_cells import cell_key, read_sweep
from results.common.sweep_file import axis, read
from sweeps.runner import checked_sweep

SWEEPS = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_cells_that_run_are_the_rows_of_the_table(path):
    run, shown = checked_sweep.load(str(path)), read_sweep(path)
    if run.method != "grid":
        assert not shown.varying or shown.cells() is None
        return
    varying = set(shown.varying)
    cells = [{key: value for key, value in cell.parameters.items() if key in varying} for cell in run.cells()]
    assert {cell_key(cell) for cell in cells} == {cell_key(cell) for cell in shown.cells()}


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ({"value": 3}, [3]),
        ({"values": [2, 1]}, [2, 1]),
        ({"min": 1, "max": 3}, [1, 2, 3]),
        ({"min": 0.0, "max": 1.0}, None),
        ({"distribution": "uniform", "min": 1, "max": 3}, None),
        ({"mu": 0, "sigma": 1}, None),
    ],
)
def test_only_a_parameter_with_an_end_of_values_has_an_axis(entry, values):
    assert axis(entry) == values


@pytest.mark.parametrize(("text", "message"), [("a: [", "cannot be read as YAML"), ("[1]", "must be a mapping")])
def test_a_file_that_is_no_sweep_is_named(tmp_path, text, message):
    file = tmp_path / "toy.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"toy\.yaml .*{message}"):
        read(file)
