"""The local runner, with a program that takes milliseconds: what is finished stays finished, and nothing is lost."""

from __future__ import annotations

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

from sweeps.runner.errors import SweepError
from sweeps.runner.local import check_writable

pytestmark = pytest.mark.program

RUN = ("run", "toy", "--no-table")


def test_importing_the_runner_does_not_import_torch() -> None:
    code = "import sys, sweeps.__main__; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_cell_runs_once_and_a_second_run_finds_them_finished(project: Any) -> None:
    project.sweep({"model.size": [1, 2, 3], "seed_everything": [0, 1]})
    code, output = project.run(*RUN, "--workers", "3")
    assert code == 0, output
    records = project.records()
    assert len(records) == len(project.starts()) == 6
    sizes = sorted(word for record in records.values() for word in record["arguments"] if "model.size" in word)
    assert sizes == sorted(f"--model.size={size}" for size in (1, 2, 3) for _ in range(2))
    code, output = project.run(*RUN)
    assert code == 0
    assert "6 finished before" in output
    assert len(project.starts()) == 6


def test_cell_knows_its_group_its_run_and_its_parameters_as_under_an_agent(project: Any) -> None:
    project.sweep({"model.size": 3})
    project.run(*RUN, "--gpus", "5")
    ((run, record),) = project.records().items()
    assert record["environment"] == {
        "CUDA_VISIBLE_DEVICES": "5",
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": "toy",
        "WANDB_RUN_ID": f"toy-{run}",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "WEIGHTS": None,
    }
    assert record["arguments"][-3:] == ["--model.end=ok", "--model.size=3", f"--run.name={run}"]
    assert record["sweep_parameters"].startswith("wandb_version: 1\nmodel.end:\n  value: ok\n")


def test_wandb_is_online_only_when_asked_for(project: Any) -> None:
    project.sweep({})
    project.run(*RUN, WANDB="online")
    assert {record["environment"]["WANDB_MODE"] for record in project.records().values()} == {"online"}
    code, output = project.run(*RUN, WANDB="on")
    assert code == 2
    assert "Allowed: online, offline, disabled" in output


def test_two_gpus_work_on_one_cell_each_at_a_time(project: Any) -> None:
    project.sweep({"model.size": [1, 2, 3, 4], "model.nap": 0.1})
    project.run(*RUN, "--gpus", "0,3")
    used = [record["environment"]["CUDA_VISIBLE_DEVICES"] for record in project.records().values()]
    assert sorted(used) == ["0", "0", "3", "3"]


def test_failed_cell_is_reported_with_its_log_and_the_others_go_on(project: Any) -> None:
    project.sweep({"model.end": ["fail", "ok", "silent"]})
    code, output = project.run(*RUN, "--workers", "1")
    assert code == 1
    assert len(project.records()) == 1
    assert "ValueError: the loss is not finite" in output
    assert "wrote no results/runs/toy/" in output
    assert "2 of 3 cells have no result" in output
    assert "RETRY_FAILED=1" in output
    code, output = project.run(*RUN)
    assert code == 1
    assert "2 failed before" in output
    assert "the loss is not finite" in output
    assert len(project.starts()) == 3
    project.run(*RUN, "--retry-failed")
    assert len(project.starts()) == 5


def test_only_runs_the_chosen_cells(project: Any) -> None:
    project.sweep({"model.size": [1, 2, 3]})
    assert project.run(*RUN, "--only", "size=2")[0] == 0
    ((_, record),) = project.records().items()
    assert "--model.size=2" in record["arguments"]


def test_first_ctrl_c_stops_in_order_and_the_next_run_goes_on_from_the_checkpoint(
    project: Any, wait_for: Callable[..., None], alive: Callable[[int], bool]
) -> None:
    project.sweep({"model.end": ["leave"], "model.size": [1, 2, 3], "model.nap": 0.3, "model.epochs": 4})
    process = project.start(*RUN, "--workers", "2")
    wait_for(lambda: len(list(project.folder.glob("results/work/toy/*/checkpoints/last.json"))) == 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The same command goes on" in output
    assert not project.records()
    assert not any(alive(pid) for pid in project.starts())
    assert [json.loads((work / "state.json").read_text())["state"] for work in project.works()] == ["interrupted"] * 2
    code, output = project.run(*RUN)
    assert code == 0, output
    assert [record["history"] for record in project.records().values()] == [["0/0", "0/1", "0/2", "0/3"]] * 3
    log = project.works()[0] / "log.txt"
    resumed = [line for work in project.works() for line in (work / "log.txt").read_text().splitlines()]
    assert sum("starting at epoch 0" in line for line in resumed) == 3, log
    assert sum("starting at epoch 1" in line or "starting at epoch 2" in line for line in resumed) == 2


def test_second_ctrl_c_kills_cells_that_do_not_listen(
    project: Any, wait_for: Callable[..., None], alive: Callable[[int], bool]
) -> None:
    project.sweep({"model.end": "hang", "model.epochs": 1})
    process = project.start(*RUN)
    wait_for(lambda: len(list(project.folder.glob("results/work/toy/*/progress.json"))) == 1)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: process.poll() is None)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.7)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not any(alive(pid) for pid in project.starts())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death")
def test_killed_runner_leaves_no_cell_behind_and_the_next_run_finishes(
    project: Any, wait_for: Callable[..., None], alive: Callable[[int], bool]
) -> None:
    project.sweep({"model.size": [1, 2], "model.nap": 0.4, "model.epochs": 3})
    process = project.start(*RUN, "--workers", "2")
    wait_for(lambda: len(project.starts()) == 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in project.starts()))
    code, output = project.run(*RUN)
    assert code == 0, output
    assert [record["history"] for record in project.records().values()] == [["0/0", "0/1", "0/2"]] * 2


def test_cell_killed_from_outside_is_taken_up_again_without_being_asked(project: Any) -> None:
    project.sweep({"model.end": "kill"})
    code, output = project.run(*RUN)
    assert code == 1
    assert "out of memory?" in output
    project.run(*RUN)
    assert len(project.starts()) == 2


def test_two_runners_share_one_sweep(project: Any) -> None:
    project.sweep({"model.size": list(range(8)), "model.nap": 0.1})
    runners = [project.start(*RUN, "--workers", "2") for _ in range(2)]
    outputs = [runner.communicate(timeout=60)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    assert len(project.records()) == len(project.starts()) == 8
    assert all("start " in output for output in outputs), "both runners take part"


def test_data_that_vanishes_stops_the_sweep_and_loses_nothing(project: Any, wait_for: Callable[..., None]) -> None:
    data = project.folder / "photos"
    (data / "train").mkdir(parents=True)
    (data / "1.png").write_text("x")
    project.sweep({"model.end": ["ok", "fail"], "model.size": [1, 2], "model.nap": 0.2})
    variables = {"DATASET": "folder", "DATA_ROOT": "photos"}
    process = project.start(*RUN, "--workers", "1", **variables)
    wait_for(lambda: len(project.records()) == 2)
    shutil.move(data, project.folder / "away")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "data folder photos is no longer there" in output
    shutil.move(project.folder / "away", data)
    starts = len(project.starts())
    project.run(*RUN, **variables)
    assert len(project.records()) == 2
    assert len(project.starts()) == starts + 2, "the interrupted cell and the one after it"


def test_missing_data_is_said_before_any_cell(project: Any) -> None:
    project.sweep({})
    code, output = project.run(*RUN, DATASET="mvtec_ad", DATA_ROOT="nowhere")
    assert code == 2
    assert "mvtec_ad" in output
    assert "nowhere" in output
    assert "DATA_ROOT" in output
    assert not project.starts()


def test_results_folder_that_cannot_be_written_is_said_before_any_cell(project: Any) -> None:
    project.sweep({})
    (project.folder / "results").write_text("a file where the folder should be")
    code, output = project.run(*RUN)
    assert code == 2
    assert "results" in output
    assert not project.starts()


def test_disk_too_full_for_a_run_is_said_before_any_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    with pytest.raises(SweepError, match=r"disk is full .*work"):
        check_writable(tmp_path / "work")


def test_cell_that_found_the_disk_full_stops_the_sweep_and_is_no_failure(project: Any) -> None:
    project.sweep({"model.end": ["full", "ok"]})
    code, output = project.run(*RUN, "--workers", "1")
    assert code == 130
    (work,) = project.works()
    assert f"The disk is full ({work.relative_to(project.folder)}/checkpoints/last.json)" in output
    assert "failed" not in output
    project.run(*RUN, "--workers", "1")
    assert len(project.starts()) == 2, "it is taken up again without being asked"


def test_unknown_profile_names_the_profiles_there_are(project: Any) -> None:
    project.sweep({})
    code, output = project.run(*RUN, "--profile", "papr")
    assert code == 2
    assert "sweeps/profiles/papr/toy.yaml" in output
    assert "sweeps/profiles/demo/toy.yaml" in output


def test_damaged_record_is_named_and_not_overwritten(project: Any) -> None:
    project.sweep({})
    project.run(*RUN)
    (record,) = project.folder.glob("results/runs/toy/*/record.json")
    record.write_text("{")
    code, output = project.run(*RUN)
    assert code == 2
    assert f"{record.relative_to(project.folder)} is damaged" in output
    assert record.read_text() == "{"


def test_a_record_whose_replacing_was_cut_off_counts_as_finished(project: Any) -> None:
    project.sweep({"seed_everything": [0, 1]})
    project.run(*RUN)
    record = next((project.folder / "results/runs/toy").iterdir())
    record.rename(record.with_name(f".{record.name}.host-1-abc.old"))
    code, output = project.run(*RUN)
    assert code == 0
    assert "2 finished before" in output
    assert (record / "record.json").is_file()
    assert len(project.starts()) == 2, "nothing is run again"
