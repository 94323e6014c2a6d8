"""A run that is asked to leave says so at every moment of its life, and nothing that it finished is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.running import per_category, preemption, tracking

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def reports(monkeypatch):
    """What would be told to W&B, in order."""
    told = []
    monkeypatch.setattr(tracking, "report_preemption", lambda: told.append("preempted"))
    monkeypatch.setattr(tracking, "open_run", lambda run, configuration: told.append(("open", run.name)))
    monkeypatch.setattr(
        tracking, "log_record", lambda folder, table, upload: told.append(("record", folder.name, len(table)))
    )
    return told


def test_sigterm_between_two_stages_is_reported_at_once_and_the_old_handler_comes_back(reports):
    def work():
        with preemption.reported():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            pytest.fail("the run went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        work()
    assert left.value.code == 143
    assert reports == ["preempted"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_during_the_imports_is_reported_after_them(reports):
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.watch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        with pytest.raises(SystemExit) as left, preemption.reported():
            pytest.fail("the run started")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert reports == ["preempted"]


@pytest.mark.program
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's list of caught signals")
def test_program_listens_before_its_slow_imports_and_leaves_without_a_trace(tmp_path):
    words = [sys.executable, "-m", "lightning_modules", "fit"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output


def test_data_loaders_worker_just_ends():
    reader, writer = os.pipe()
    with preemption.reported():
        child = os.fork()
        if child == 0:
            os.write(writer, b"!")  # Python forgets signals that come while it forks
            time.sleep(10)
            os._exit(1)
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


@pytest.mark.parametrize("more", [(), ("--data.init_args.setting=per_category",)], ids=["unified", "per_category"])
def test_finished_run_that_is_handed_out_again_is_reported_and_not_trained(trained, reports, monkeypatch, more):
    record = trained.record("first")
    written = (record.path / "record.json").stat().st_mtime_ns
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    with pytest.raises(SystemExit) as left:
        trained.run(*more)
    assert left.value.code == 0
    assert reports == [("open", "first"), ("record", "first", len(record.metrics))]
    assert (record.path / "record.json").stat().st_mtime_ns == written
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    with pytest.raises(SystemExit, match="already a finished run"):
        trained.run(*more)


@pytest.mark.program
def test_models_of_single_categories_share_one_wandb_run_with_curves_table_and_record(project, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    taken = []
    original = tracking._log_record
    monkeypatch.setattr(tracking, "_log_record", lambda *given: taken.append(given[1]) or original(*given))
    project.run("--data.init_args.setting=per_category", "--run.heatmaps=true", logger=True)
    import wandb

    summary = dict(wandb.run.summary)
    assert wandb.run.name == "first"
    assert wandb.run.config["cli"]["data"]["init_args"]["setting"] == "per_category"
    wandb.finish()
    assert {"bolt/train/loss", "disc/train/loss", "image_auroc", "categories", "heatmaps/bolt"} <= set(summary)
    assert taken == [project.record().path], "the parts' own records do not count as the run's"
    assert len(list((project.results / "work" / "single" / "first" / "wandb").glob("offline-run-*"))) == 1


def test_wandbs_failure_does_not_fail_a_run_whose_record_is_written(trained, monkeypatch):
    def fail(*given):
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "active_run", lambda: object())
    monkeypatch.setattr(tracking, "_log_record", fail)
    record = trained.record("first")
    with pytest.warns(UserWarning, match="no route.*complete in"):
        tracking.log_record(record.path, record.metrics)


def test_per_category_leaves_a_finished_run_of_its_own_alone(trained):
    with pytest.raises(SystemExit, match="already a finished run"):
        per_category.leave_finished(tracking.RunConfig(name="first", results=str(trained.results)), {})
