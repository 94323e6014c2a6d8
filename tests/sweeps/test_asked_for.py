"""ARGS and METHOD of `make sweep` act or are refused; a missing W&B key is said at once; agents' cells are recognised."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from datamodules.reading import DatasetConfig, read_datasets
from results.common.environment import shell_line
from sweeps.runner import checked_sweep, cluster, prepare
from sweeps.runner.display import Display
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.identity import Dataset
from sweeps.runner.local import Job
from sweeps.runner.state import RUNNING
from sweeps.runner.taken_over import take_over


def asked(ablation: str, **variables: str) -> Any:
    return prepare.chosen(checked_sweep.load(ablation), variables)


def test_args_are_words_of_every_cells_command() -> None:
    sweep = asked("feature_levels", ARGS="--trainer.max_epochs=3 '--run_note=a b'")
    assert sweep.command[-2:] == ("--trainer.max_epochs=3", "--run_note=a b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--seed_everything=3", "sets it for each cell"),
        ("--run.name=mine", "names its runs"),
        ("--trainer.max_epochs", "in one word"),
        ("--x='", "cannot be split"),
    ],
)
def test_args_that_cannot_act_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SweepError, match=reason):
        asked("feature_levels", ARGS=text)


def test_method_chooses_cells_of_a_sweep_over_methods_and_is_refused_elsewhere() -> None:
    assert prepare.only(asked("methods"), ["a=b"], {"METHOD": "rlr"}) == ["a=b", "method=rlr"]
    assert prepare.only(asked("sar"), ["a=b"], {}) == ["a=b"]
    with pytest.raises(SweepError, match="no choice of methods"):
        prepare.only(asked("sar"), [], {"METHOD": "rlr"})


def test_a_missing_key_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    variables = {"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example"}
    with pytest.raises(SweepError, match=r"no API key for wandb\.example"):
        cluster._need_key(variables)
    file.write_text("machine wandb.example login user password secret\n")
    cluster._need_key(variables)
    cluster._need_key({"WANDB_API_KEY": "x"})


def test_a_records_command_holds_what_steers_the_run() -> None:
    variables = {"DATASET": "folder", "DATA_ROOT": "/my photos", "WEIGHTS": "random", "BACKBONE": "", "HOME": "/x"}
    line = shell_line(["python", "-m", "lightning_modules", "fit", "--x=[1, 2]"], variables)
    assert line == "DATASET=folder DATA_ROOT='/my photos' WEIGHTS=random python -m lightning_modules fit '--x=[1, 2]'"
    said = subprocess.run(
        ["bash", "-c", line.replace("python -m", "printenv DATA_ROOT #")], capture_output=True, text=True
    )
    assert said.stdout == "/my photos\n"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_live_view_shows_settings_progress_and_time_at_any_width(
    width: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"model.init_args.query": "layerwise", "model.init_args.neighbor_size": 7, "model.init_args.jitter": 1.0}
    job = Job(Cell(settings), "s", "r", [], {}, {}, state=RUNNING, started=time.time())
    job.work.mkdir(parents=True)
    (job.work / "progress.json").write_text(json.dumps({"epoch": 3, "epochs": 9, "metrics": {"train/loss": 0.25}}))
    console = Console(width=width, force_terminal=True, record=True, file=(tmp_path / "out").open("w"))
    display = Display(console, "s (demo)", tuple(settings), "image_auroc", 1)
    display._jobs = [job]
    console.print(display._render())
    text = console.export_text()
    for part in ("layerwise", "epoch 3/9", "train/loss 0.25", "0 of 1 done"):
        assert part in text
    assert all(len(line) <= width for line in text.splitlines())


@pytest.fixture
def by_agents(tmp_path: Path, monkeypatch: Any) -> Any:
    """A committed project with one cell of a sweep, and the record that an agent left of it."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        (tmp_path / f"data/bolt/{part}/good").mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/bolt/{part}/good/{number}.png")
    (tmp_path / "toy.py").write_text("x = 1\n")
    (tmp_path / "profile.yaml").write_text("model: {init_args: {backbone: {weights: packaged}}}\n")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.yaml").write_text(
        "name: s\nmethod: grid\nparameters: {a.b: {values: [1, 2]}, seed_everything: {value: 0}}\n"
        "command: [python, toy.py, --config, profile.yaml, '${args}']\n"
    )
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    sets = [Dataset("folder", Path("data"), None)]
    prints = read_datasets([DatasetConfig("folder", "data")]).fingerprints
    sweep, variables = checked_sweep.load("s"), {"PROFILE": "demo"}
    jobs = [Job(cell, "s", f"name{n}", [], {}, {}) for n, cell in enumerate(sweep.cells())]
    record = {
        "cell": {"a.b": 2, "seed_everything": 0},
        "profile": "demo",
        "backbone": {"name": "x", "weights": "packaged"},
        "datasets": [{"name": name, "fingerprint": text} for name, text in prints.items()],
        "provenance": {"git_commit": commit, "git_dirty": False},
    }

    def write() -> None:
        folder = tmp_path / "results" / "runs" / "s" / "agents1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text(json.dumps(record))

    write()
    return SimpleNamespace(
        take=lambda **more: [job.run for job in take_over(jobs, sweep, variables | more, sets)],
        jobs=jobs, record=record, write=write, folder=tmp_path,
    )  # fmt: skip


def test_a_cell_that_an_agent_finished_is_taken_over(by_agents: Any) -> None:
    assert by_agents.take() == ["agents1"]
    assert [job.finished() for job in by_agents.jobs] == [False, True]


def test_other_code_weights_data_or_profile_are_not_taken_over(by_agents: Any) -> None:
    assert by_agents.take(BACKBONE="other") == []
    assert by_agents.take(PROFILE="paper") == []
    for key, value in (
        ("provenance", {**by_agents.record["provenance"], "git_dirty": True}),
        ("backbone", {"name": "x", "weights": "random"}),
        ("datasets", [{"name": "folder", "fingerprint": "other"}]),
    ):
        kept = by_agents.record[key]
        by_agents.record[key] = value
        by_agents.write()
        assert by_agents.take() == [], key
        by_agents.record[key] = kept
    by_agents.write()
    (by_agents.folder / "toy.py").write_text("x = 2\n")
    assert by_agents.take() == []
