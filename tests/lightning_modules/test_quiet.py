"""A run's output speaks of the run."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.program


def test_predict_prints_where_its_weights_come_from_and_where_its_results_are(programs, trained, data_root):
    more = (f"--data.init_args.predict_root={data_root / 'bolt'}", "--trainer.accelerator=cpu")
    output = programs.run(trained.arguments(*more, command="predict", logger=True))
    printed = [line for line in output.splitlines() if "RANDOM WEIGHTS" not in line]
    begin = ["UniRecon", "Seed", "GPU", "Weights", "", "bolt: ", "11 images", "The page to send on: "]
    assert [line.startswith(word) for line, word in zip(printed, begin, strict=True)] == [True] * len(begin), printed
    assert "defect" in printed[4]


def test_a_run_prints_nothing_about_other_products_or_deprecations(programs, project):
    printed = programs.run(project.arguments("--trainer.max_epochs=1", logger=True))
    assert "epoch 1 of 1" in printed
    assert [line for line in printed.splitlines() if "arning" in line or "WARN" in line] == []
    for noise in ("Tip", "deprecat", "weights_only", "anonymous"):
        assert noise not in printed
