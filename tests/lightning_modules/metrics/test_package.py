"""`pip install .` gives the metrics alone, as `unirecon_metrics`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

REPOSITORY = Path(__file__).parents[3]
BLOCKED = (
    "lightning",
    "pytorch_lightning",
    "lightning_modules",
    "models",
    "datamodules",
    "results",
    "sweeps",
    "torchmetrics",
)
PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
import numpy as np
import unirecon_metrics
import unirecon_metrics.spro, unirecon_metrics.rendering, unirecon_metrics.folder, unirecon_metrics.__main__
arrays = np.load(sys.argv[1])
metrics = unirecon_metrics.AnomalyMetrics()
names = arrays["names"].tolist()
metrics.update(arrays["maps"], arrays["masks"], arrays["scores"], arrays["labels"], names, range(len(names)))
metrics.compute().table.to_pickle(sys.argv[2])
print(unirecon_metrics.__file__)
"""

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a copy of the sources was installed, without a network."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for source in sorted((REPOSITORY / "lightning_modules").glob("**/*.py")):
        target = folder / source.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", "installed"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "."], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "installed"


def run(installed, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=installed, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_the_metrics_are_installed(installed):
    assert [path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")] == ["unirecon_metrics"]
    sources = {path.name for path in (REPOSITORY / "lightning_modules" / "metrics").glob("*.py")}
    assert {path.name for path in (installed / "unirecon_metrics").glob("*.py")} == sources


def test_the_numbers_are_the_same_where_nothing_else_of_the_project_can_be_imported(installed, problem, tmp_path):
    p = problem(31, images=8, categories=2)
    arrays = {"maps": p.maps, "masks": p.masks, "scores": p.scores, "labels": p.labels, "names": np.array(p.categories)}
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "program.py").write_text(PROGRAM)
    place = run(installed, tmp_path / "program.py", tmp_path / "data.npz", tmp_path / "table.pkl")
    assert Path(place.strip()).is_relative_to(installed)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "table.pkl"), p.compute().table, check_exact=True)


def test_its_command_explains_itself_under_its_own_name(installed):
    assert "python -m unirecon_metrics" in run(installed, "-m", "unirecon_metrics", "--help")
