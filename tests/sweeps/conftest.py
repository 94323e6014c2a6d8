"""A project folder of its own for each test, with a sweep whose cells take milliseconds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.runner.identity import OVERRIDES
from sweeps.runner.prepare import THREADS

REPOSITORY = Path(__file__).resolve().parents[2]


class Project:
    """A folder in which `python -m sweeps` runs the stand-in program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sweeps" / "profiles" / "demo").mkdir(parents=True)
        (folder / "sweeps" / "profiles" / "demo" / "toy.yaml").write_text("trainer: {max_epochs: 3}\n")
        shutil.copy(Path(__file__).with_name("program.py"), folder / "program.py")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "SLURM"))},
            "PYTHONPATH": str(REPOSITORY),
        }
        for name in (*OVERRIDES, *THREADS, "PROFILE", "CUDA_VISIBLE_DEVICES"):
            self.environment.pop(name, None)

    def sweep(self, parameters: dict[str, Any], name: str = "toy", **more: Any) -> Path:
        """Write a sweep file; parameters: lists are values, all else is one value."""
        content = {
            "name": name,
            "method": "grid",
            "parameters": {
                key: {"values": value} if isinstance(value, list) else {"value": value}
                for key, value in {"model.end": "ok", **parameters}.items()
            },
            "command": [
                "${env}", "-u", "SLURM_PROCID", "${interpreter}", "program.py", "--config",
                "sweeps/profiles/${envvar:PROFILE}/toy.yaml", f"--run.sweep={name}", "${args}",
            ],
            **more,
        }  # fmt: skip
        path = self.folder / "sweeps" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """Start `python -m sweeps` without waiting."""
        return subprocess.Popen(
            [sys.executable, "-m", "sweeps", *words],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, limit: float = 60, **variables: str) -> tuple[int, str]:
        """Run `python -m sweeps`; return the exit code and everything printed."""
        process = self.start(*words, **variables)
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output

    def records(self, name: str = "toy") -> dict[str, dict[str, Any]]:
        """All run records by run name."""
        return {
            path.parent.name: json.loads(path.read_text())
            for path in sorted((self.folder / "results" / "runs" / name).glob("*/record.json"))
        }

    def works(self, name: str = "toy") -> list[Path]:
        """The working folders of a sweep's cells."""
        return sorted(path.parent for path in (self.folder / "results" / "work" / name).glob("*/starts.txt"))

    def starts(self, name: str = "toy") -> list[int]:
        """Process ids of all started cells."""
        return [int(line) for work in self.works(name) for line in (work / "starts.txt").read_text().split()]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def server() -> Iterator[Any]:
    """A stand-in for W&B's server; on a failure its view of the runs and agents is printed."""
    spec = importlib.util.spec_from_file_location("loopback", Path(__file__).with_name("loopback.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["loopback"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    running = module.Server()
    yield running
    print(running.describe())
    running.stop()


@pytest.fixture
def online(project: Project, server: Any) -> Project:
    """The project with the server's address in its environment; W&B's own folders lie in it too."""
    folders = {
        f"WANDB_{kind}_DIR": str(project.folder / "wandb" / kind.lower()) for kind in ("CACHE", "DATA", "CONFIG")
    }
    # W&B's service has 30 seconds to start, which a loaded machine may exceed; an agent then dies.
    project.environment |= server.environment | folders | {"WANDB__SERVICE_WAIT": "200"}
    return project


@pytest.fixture(scope="session")
def communicate() -> Callable[..., str]:
    """Everything a process printed until its end; a failure shows what it printed until the limit."""

    def wait(process: subprocess.Popen, limit: float = 240) -> str:
        try:
            return process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            # Its agents and their cells get SIGTERM by its death; whoever holds the output still must not hold the test.
            process.kill()
            try:
                output = process.communicate(timeout=30)[0]
            except subprocess.TimeoutExpired as error:
                output = (error.output or b"").decode(errors="replace")
            pytest.fail(f"no end within {limit} s:\n{output}")

    return wait


@pytest.fixture(scope="session")
def make_project() -> Callable[[Path], Project]:
    """For projects that live longer than a test."""
    return Project


@pytest.fixture(scope="session")
def alive() -> Callable[[int], bool]:
    """Whether a process runs; one that ended and was not waited for does not."""

    def running(pid: int) -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except ProcessLookupError:
            return False
        except OSError:
            return not Path("/proc").is_dir()

    return running


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait until a condition holds, with a limit in seconds."""

    def wait(condition: Callable[[], bool], limit: float = 20.0) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, "the condition did not come true in time"
            time.sleep(0.02)

    return wait
