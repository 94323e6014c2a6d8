"""`test --config <finished record>` scores the weights again and says how the numbers compare; the record stays."""

from __future__ import annotations

import shutil

import pandas as pd

from lightning_modules.running import recording
from lightning_modules.running.command_line import main


def test_a_finished_run_is_scored_again_beside_its_record(trained, caplog):
    record = trained.results / "runs" / "single" / "first"
    before = {path.name: path.stat().st_mtime_ns for path in record.iterdir()}
    with caplog.at_level("INFO"):
        main(["test", f"--config={record / 'config.yaml'}"])
    assert "stays as it is" in caplog.text
    assert "that both have are the same" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in record.iterdir()} == before


def test_numbers_that_differ_are_counted_and_the_furthest_is_named(trained, tmp_path):
    record = shutil.copytree(trained.results / "runs" / "single" / "first", tmp_path / "runs" / "single" / "first")
    table = trained.record().metrics
    one = table.value.notna() & (table.scope == "category")
    changed = table.assign(value=table.value.where(~one, 1 - table.value))
    said = recording.compared(record, changed)
    assert "numbers that both have differ, the most" in said
    other = pd.DataFrame(table).assign(metric="another")
    assert "none of them" in recording.compared(record, other)
