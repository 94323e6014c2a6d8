"""A run's output speaks of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_prints_nothing_about_other_products_or_deprecations(project):
    words = [sys.executable, "-m", "lightning_modules", *project.arguments("--trainer.max_epochs=1", logger=True)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = done.stdout + done.stderr
    assert "epoch 1 of 1" in printed
    assert [line for line in printed.splitlines() if "arning" in line or "WARN" in line] == []
    for noise in ("Tip", "deprecat", "weights_only", "anonymous"):
        assert noise not in printed
