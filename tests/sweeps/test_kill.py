"""Kill the runner or a cell at random moments: after a restart the sweep equals an uninterrupted one, cell for cell."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.program

RUN = ("run", "toy", "--no-table", "--workers", "3")
PARAMETERS = {"model.size": [1, 2, 3, 4, 5], "model.nap": 0.25, "model.epochs": 4, "seed_everything": [0]}


def outcome(project: Any) -> dict[str, Any]:
    """What the records say about each cell; starts and process ids are not part of a result."""
    return {run: (record["history"], record["arguments"]) for run, record in project.records().items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Any]) -> dict[str, Any]:
    project = make_project(tmp_path_factory.mktemp("uninterrupted"))
    project.sweep(PARAMETERS)
    assert project.run(*RUN)[0] == 0
    return outcome(project)


@pytest.mark.parametrize("seed", range(20))
def test_killed_sweep_ends_like_an_uninterrupted_one(
    seed: int,
    project: Any,
    uninterrupted: dict[str, Any],
    alive: Callable[[int], bool],
    wait_for: Callable[..., None],
) -> None:
    chance, killed, begin = random.Random(seed), [], time.monotonic()
    project.sweep(PARAMETERS)
    for _ in range(chance.randint(1, 3)):
        process = project.start(*RUN)
        if chance.random() < 0.75:  # while cells run, however long the runner takes to start them
            wait_for(lambda p=process: p.poll() is not None or any(map(alive, project.starts())), 60)
            time.sleep(chance.uniform(0.0, 1.0))
        else:
            time.sleep(chance.uniform(0.2, 2.0))
        cells = [pid for pid in project.starts() if alive(pid)]
        victim = process.pid if not cells or chance.random() < 0.4 else chance.choice(cells)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed.append("runner" if victim == process.pid else "cell")
        if victim != process.pid and chance.random() < 0.5:
            process.kill()
            killed.append("runner")
        process.communicate(timeout=60)
    code, output = project.run(*RUN)
    seconds = time.monotonic() - begin
    print(f"seed {seed}: killed {killed}, {len(project.starts())} starts, {seconds:.0f} s")
    assert code == 0, output
    assert outcome(project) == uninterrupted
    for work in project.works():
        assert len((work / "log.txt").read_text()) > 0
    assert not list((project.folder / "results").rglob(".*.[0-9]*")), "no half-written files stay"
    assert seconds < 120, "bounded in time"
