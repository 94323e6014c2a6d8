"""One cell of a shipped sweep with the real program: trained, recorded, found again, tabulated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from results.aggregator.records import read_records

pytestmark = pytest.mark.program

ONLY = ("--only", "query=layerwise", "--only", "neighbor_size=7", "--only", "jitter_probability=1.0")


def test_cell_of_the_components_ablation_runs_and_is_found_finished(project: Any) -> None:
    root = Path(__file__).resolve().parents[2]
    shutil.copytree(root / "sweeps" / "profiles", project.folder / "sweeps" / "profiles", dirs_exist_ok=True)
    content = yaml.safe_load((root / "sweeps" / "uniad_components.yaml").read_text())
    content["command"][-1:] = ["--trainer.max_epochs=1", "--run.heatmaps=false", "${args}"]
    (project.folder / "sweeps" / "uniad_components.yaml").write_text(yaml.safe_dump(content))
    words = ["synthetic", "data/synthetic", "--train", "4", "--test", "2", "--defects", "1", "--size", "64"]
    subprocess.run(
        [sys.executable, "-m", "datamodules", *words], cwd=project.folder, env=project.environment, check=True
    )
    code, output = project.run("run", "uniad_components", *ONLY, WEIGHTS="random", limit=400)
    assert code == 0, output
    (stored,) = read_records(project.folder / "results" / "runs", "uniad_components")
    assert stored.record.cell == {
        "model.init_args.jitter_probability": 1.0,
        "model.init_args.neighbor_size": 7,
        "model.init_args.query": "layerwise",
        "seed_everything": 0,
    }
    assert (stored.record.sweep, stored.record.profile, stored.record.seed) == ("uniad_components", "demo", 0)
    assert (project.folder / "results" / "runs" / "uniad_components" / stored.record.run / "record.json").exists()
    assert "image_auroc" in output
    assert (project.folder / "results" / "tables").is_dir(), output
    code, output = project.run("run", "uniad_components", *ONLY, "--no-table", WEIGHTS="random")
    assert code == 0
    assert "1 finished before" in output
