"""The real program under W&B's real agents, one of its runs pre-empted: trained once, recorded, logged, fetched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from results.aggregator.records import read_records

pytestmark = pytest.mark.program
REPOSITORY = Path(__file__).resolve().parents[2]
SWEEP = "local/unirecon/sweep000"
EPOCHS = 4
DATA = {
    "WEIGHTS": "random",
    "DATASET": "synthetic",
    "DATA_ROOT": "data/synthetic",
    "CATEGORIES": "bottle_cap,cable",
    "OMP_NUM_THREADS": "1",
}
# Asks all processes of the first run that comes to its third epoch to leave, as SLURM would.
CALLBACK = """
import os, signal
from pathlib import Path
import lightning as L

class Preempt(L.Callback):
    def on_train_batch_end(self, trainer, *rest):
        note = Path(f"preempted{trainer.global_rank or ''}")
        if trainer.current_epoch == 2 and not note.exists():
            note.write_text(os.environ["WANDB_RUN_ID"])
            os.kill(os.getpid(), signal.SIGTERM)
"""


def draw_benchmark(project: Any, train: int) -> None:
    """Two categories of the embedded benchmark, with `train` images each to train on."""
    words = ["--train", str(train), "--test", "2", "--defects", "1", "--size", "64", "--categories", "bottle_cap,cable"]
    subprocess.run(
        [sys.executable, "-m", "datamodules", "synthetic", "data/synthetic", *words],
        cwd=project.folder,
        env=project.environment,
        check=True,
    )


def prepare(project: Any, *more: str, heatmaps: Sequence[bool] = (True, False)) -> None:
    """Runs of UniAD that differ in nothing that decides the result, on a benchmark of two categories."""
    for name in ("profiles", "grids"):
        shutil.copytree(REPOSITORY / "sweeps" / name, project.folder / "sweeps" / name, dirs_exist_ok=True)
    content = yaml.safe_load((REPOSITORY / "sweeps" / "neighbor_mask.yaml").read_text())
    content["parameters"] = {
        "run.heatmaps": {"values": list(heatmaps)},
        "model.init_args.neighbor_size": {"value": 3},
        "seed_everything": {"value": 0},
    }
    content["command"][-1:] = [
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.callbacks=preempt.Preempt",
        "--trainer.accelerator=cpu",
        "--model.init_args.image_size=64",
        *more,
        "${args}",
    ]
    (project.folder / "sweeps" / "neighbor_mask.yaml").write_text(yaml.safe_dump(content))
    (project.folder / "preempt.py").write_text(CALLBACK)
    draw_benchmark(project, train=4)


def test_agents_share_a_grid_and_a_preempted_run_ends_like_the_other(
    online: Any, server: Any, communicate: Callable[..., str]
) -> None:
    prepare(online)
    online.environment |= DATA
    code, output = online.run("register", "neighbor_mask", limit=120)
    print(output)
    assert code == 0
    output = communicate(online.start("agents", SWEEP, "--gpus", "none", "--workers", "2"))
    print(output)
    assert server.unknown == []
    first = server.runs[(online.folder / "preempted").read_text()]
    (second,) = [run for run in server.runs.values() if run is not first]
    assert (first.starts, first.state, second.starts, second.state) == (2, "finished", 1, "finished")
    assert first.agent != second.agent or first.starts == 2
    assert f"results/work/neighbor_mask/{first.name}/checkpoints/last.ckpt" in output, "went on from its checkpoint"

    stored = {record.record.run: record for record in read_records(online.folder / "results" / "runs", "neighbor_mask")}
    assert set(stored) == set(server.runs)
    pd.testing.assert_frame_equal(stored[first.name].metrics, stored[second.name].metrics)
    pd.testing.assert_frame_equal(stored[first.name].history, stored[second.name].history)
    for run in (first, second):
        lines = [json.loads(line) for line in run.history]
        curve = [(line["epoch"], line["trainer/global_step"]) for line in lines if "train/loss" in line]
        assert curve == [(epoch, epoch) for epoch in range(EPOCHS)], "one step of each epoch"
        assert run.config["model.init_args.neighbor_size"]["value"] == 3
        assert run.config["cli"]["value"]["model"]["init_args"]["neighbor_size"] == 3
        assert run.summary["image_auroc"] == pytest.approx(mean(stored[run.name].metrics, "image_auroc"))
        assert "categories" in run.summary
    drawn = {run.name for run in server.runs.values() if "heatmaps/bottle_cap" in run.summary}
    assert drawn == {name for name, record in stored.items() if record.record.cell["run.heatmaps"]}

    before = {
        path: path.read_bytes() for path in online.folder.glob("results/runs/neighbor_mask/*/*") if path.is_file()
    }
    for folder in ("results/runs", "wandb"):
        shutil.rmtree(online.folder / folder)
    code, output = online.run("pull", SWEEP)
    print(output)
    assert code == 0
    assert "2 new" in output
    assert {path: path.read_bytes() for path in before} == before


def test_cell_of_two_processes_is_one_run_and_is_preempted_as_one(
    online: Any, server: Any, communicate: Callable[..., str]
) -> None:
    prepare(online, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=2", heatmaps=[False])
    online.environment |= DATA
    code, output = online.run("register", "neighbor_mask", limit=120)
    assert code == 0, output
    output = communicate(online.start("agents", SWEEP, "--gpus", "none"))
    print(output)
    (run,) = server.runs.values()
    assert (run.starts, run.state) == (2, "finished")
    assert {path.name for path in online.folder.glob("preempted*")} == {"preempted", "preempted1"}
    (stored,) = read_records(online.folder / "results" / "runs", "neighbor_mask")
    assert (stored.record.run, stored.record.provenance["world_size"]) == (run.name, 2)
    assert stored.record.cell["model.init_args.neighbor_size"] == 3
    curve = [line["epoch"] for line in map(json.loads, run.history) if "train/loss" in line]
    assert curve == list(range(EPOCHS))
    assert len(list(online.folder.glob("results/work/*/*/wandb/run-*"))) == run.starts


def mean(metrics: pd.DataFrame, name: str) -> float:
    """A metric's mean over all categories."""
    rows = metrics[(metrics.scope == "mean") & (metrics.dataset == "") & (metrics.metric == name)]
    return rows.value.item()


def test_agents_run_the_sweep_over_methods(online: Any, server: Any, communicate: Callable[..., str]) -> None:
    """A cell of the sweep `methods` is a profile: an agent trains each with its own recipe on the data that all share."""
    for name in ("profiles", "grids", "comparisons"):
        shutil.copytree(REPOSITORY / "sweeps" / name, online.folder / "sweeps" / name, dirs_exist_ok=True)
    content = yaml.safe_load((REPOSITORY / "sweeps" / "methods.yaml").read_text())
    content["parameters"]["method"] = {"values": ["nearest_neighbours", "padim"]}
    (online.folder / "sweeps" / "methods.yaml").write_text(yaml.safe_dump(content))
    draw_benchmark(online, train=6)
    online.environment |= {name: value for name, value in DATA.items() if name != "WEIGHTS"}
    code, output = online.run("register", "methods", limit=120)
    print(output)
    assert code == 0
    print(communicate(online.start("agents", SWEEP, "--gpus", "none", "--workers", "1")))
    assert {run.state for run in server.runs.values()} == {"finished"}
    stored = [record.record for record in read_records(online.folder / "results" / "runs", "methods")]
    assert {record.method for record in stored} == {"nearest_neighbours", "padim"}
    assert all(record.cell["compare"] == "recipe" for record in stored)
    assert len({str(record.datasets[0]["fingerprint"]) for record in stored}) == 1
