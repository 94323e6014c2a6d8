"""The same sweep files with W&B's real client, against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sweeps.runner import checked_sweep, cluster, command
from sweeps.runner.errors import SweepError


@pytest.mark.program
def test_two_agents_share_a_grid_and_run_each_cell_once_with_the_runners_command(
    online: Any, server: Any, communicate: Callable[..., str]
) -> None:
    online.sweep({"model.size": [1, 2, 3], "model.places": [["a", "b"], ["a"]], "model.nap": 0.5})
    code, output = online.run("register", "toy", "--profile", "demo")
    assert code == 0, output
    assert "make agents SWEEP=local/unirecon/sweep000" in output
    output = communicate(online.start("agents", "local/unirecon/sweep000", "--gpus", "0,3"))
    assert server.unknown == []
    records = online.records()
    assert len(records) == len(online.starts()) == 6, output
    assert {record["environment"]["CUDA_VISIBLE_DEVICES"] for record in records.values()} == {"0", "3"}
    assert {run.starts for run in server.runs.values()} == {1}
    of_agents = sorted(record["arguments"] for record in records.values())
    sweep = checked_sweep.load(str(online.folder / "sweeps" / "toy.yaml"))
    of_runner = [
        command.expand(sweep.command, cell.parameters, "python", {"PROFILE": "demo"}) for cell in sweep.cells()
    ]
    assert of_agents == sorted(words[words.index("program.py") + 1 :] for words in of_runner)
    parameters = [yaml.safe_load(record["sweep_parameters"]) for record in records.values()]
    shutil.rmtree(online.folder / "results")
    assert online.run("run", "toy", "--no-table", "--gpus", "0,3")[0] == 0
    locally = [yaml.safe_load(record["sweep_parameters"]) for record in online.records().values()]
    assert sorted(map(str, locally)) == sorted(map(str, parameters))


@pytest.mark.program
def test_preempted_cell_is_handed_out_again_and_goes_on_from_its_checkpoint(
    online: Any, server: Any, wait_for: Callable[..., None], communicate: Callable[..., str]
) -> None:
    online.sweep({"model.wandb": True, "model.epochs": 4, "model.nap": 1.0})
    assert online.run("register", "toy")[0] == 0
    first = online.start("agents", "local/unirecon/sweep000", "--gpus", "none")
    wait_for(lambda: any(online.folder.glob("results/work/toy/*/checkpoints/last.json")), limit=120)
    first.send_signal(signal.SIGTERM)
    output = communicate(first)
    (run,) = server.runs.values()
    assert run.state == "preempted", output
    assert online.records() == {}
    output = communicate(online.start("agents", "local/unirecon/sweep000", "--gpus", "none"))
    (record,) = online.records().values()
    assert record["run"] == run.name
    assert record["history"] == ["0/0", "0/1", "0/2", "0/3"]
    assert run.starts == 2, output
    assert run.state == "finished"
    assert [line.split('"epoch":')[1][0] for line in run.history] == ["0", "1", "2", "3"], "history goes on"
    starts = (online.folder / "results" / "work" / "toy" / run.name / "starts.txt").read_text().split()
    assert len(starts) == 2


@pytest.mark.program
@pytest.mark.parametrize("name", checked_sweep.names())
def test_wandb_accepts_every_shipped_sweep_file(name: str, server: Any, tmp_path: Path) -> None:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    outcome = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", str(Path("sweeps", f"{name}.yaml").resolve())],
        env={**variables, **server.environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "violation" not in outcome.stderr.lower()
    (content,) = server.sweeps.values()
    assert content["name"] == name
    cells = checked_sweep.load(name).cells()
    handed_out = [{key: entry["value"] for key, entry in run.args.items()} for run in server.runs.values()]
    assert handed_out == [cell.parameters for cell in cells]


@pytest.mark.program
def test_offline_run_that_is_synced_later_keeps_its_group_its_parameters_and_its_curve(
    online: Any, server: Any
) -> None:
    online.sweep({"model.size": 2, "model.wandb": True})
    code, output = online.run("run", "toy", "--no-table", limit=120)
    assert code == 0, output
    assert server.requests == [], "nothing is sent without being asked"
    (log,) = (online.folder / "results" / "work" / "toy" / "wandb").glob("offline-run-*")
    outcome = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(log)],
        env=online.environment,
        cwd=online.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 0, outcome.stderr
    (run,) = server.runs.values()
    assert (run.name, run.group) == (f"toy-{next(iter(online.records()))}", "toy")
    assert run.config["model.size"]["value"] == 2
    assert len(run.history) == 3


def test_slurm_script_runs_one_agent_program_per_task(tmp_path: Path) -> None:
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\necho "srun $@"\n')
    fake.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SWEEP": "me/unirecon/abc"}
    outcome = subprocess.run(["bash", "sweeps/slurm.sh"], env=variables, capture_output=True, text=True)
    assert outcome.stdout == "srun .venv/bin/python -m sweeps agents me/unirecon/abc\n", outcome.stderr
    del variables["SWEEP"]
    outcome = subprocess.run(["bash", "sweeps/slurm.sh"], env=variables, capture_output=True, text=True)
    assert outcome.returncode != 0
    assert "SWEEP=entity/project/sweep" in outcome.stderr


def test_sweep_id_without_its_project_is_refused(project: Any) -> None:
    code, output = project.run("agents", "abc")
    assert code == 2
    assert "entity/project/sweep" in output


class Artifact:
    """What W&B's client offers of an artifact."""

    def __init__(self, files: dict[str, str], kind: str = "run-record") -> None:
        self.type = kind
        self._files = files

    def download(self, root: str) -> None:
        Path(root).mkdir(parents=True)
        for name, text in self._files.items():
            (Path(root) / name).write_text(text)


def run_with(*artifacts: Artifact) -> Any:
    return SimpleNamespace(name="r1", logged_artifacts=lambda: list(artifacts))


def test_pull_files_a_record_under_the_names_it_bears_and_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_with(
        Artifact({}, "model"), Artifact({"record.json": '{"sweep": "toy", "run": "a1", "x": 1}', "m.csv": ""})
    )
    assert cluster._fetch(run) == "new"
    assert sorted(path.name for path in Path("results/runs/toy/a1").iterdir()) == ["m.csv", "record.json"]
    other = run_with(Artifact({"record.json": '{"sweep": "toy", "run": "a1", "x": 2}'}))
    assert cluster._fetch(other) == "here already"
    assert '"x": 1' in Path("results/runs/toy/a1/record.json").read_text()
    assert cluster._fetch(run_with(Artifact({}, "model"))) == "without a record"
    assert [path.name for path in Path("results/runs").iterdir()] == ["toy"], "nothing half-made stays"


def test_pull_brings_the_other_runs_when_some_are_broken_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    import wandb
    from rich.console import Console

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    def lost() -> list[Artifact]:
        raise OSError("gone [/]")

    def record(name: str) -> str:
        return json.dumps({"sweep": "toy", "run": name, "files": {"metrics.csv": hashlib.sha256(b"a").hexdigest()}})

    runs = [
        SimpleNamespace(
            name="misnamed", logged_artifacts=lambda: [Artifact({"record.json": '{"sweep": "..", "run": "a"}'})]
        ),
        SimpleNamespace(
            name="cut", logged_artifacts=lambda: [Artifact({"record.json": record("cut"), "metrics.csv": "b"})]
        ),
        SimpleNamespace(name="lost", logged_artifacts=lost),
        SimpleNamespace(
            name="good", logged_artifacts=lambda: [Artifact({"record.json": record("good"), "metrics.csv": "a"})]
        ),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(sweep=lambda name: SimpleNamespace(runs=runs)))
    output = io.StringIO()
    assert cluster.pull(SimpleNamespace(sweep="me/p/s"), Console(file=output, width=300)) == 1
    assert [path.name for path in Path("results/runs/toy").iterdir()] == ["good"]
    said = output.getvalue()
    assert "1 new" in said
    assert "3 broken" in said
    assert "gone [/]" in said
    for name in ("misnamed", "cut", "lost"):
        assert f"broken: {name}" in said


@pytest.mark.parametrize("record", ['{"sweep": "..", "run": "a"}', '{"sweep": "toy", "run": "a/b"}', "{}", "{"])
def test_pull_refuses_a_record_that_would_land_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError, match="W&B run r1"):
        cluster._fetch(run_with(Artifact({"record.json": record})))
