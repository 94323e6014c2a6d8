"""Kill W&B's agents at random moments: after a restart the sweep equals an uninterrupted one, cell for cell."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.program

SWEEP = "local/unirecon/sweep000"
SIZES = [1, 2, 3]
KILLS = 3


def children(pid: int) -> list[int]:
    """Processes that a process started and that are still there."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("seed", [0])  # a minute each; any number does
def test_sweep_whose_agents_were_killed_ends_like_an_uninterrupted_one(
    seed: int,
    online: Any,
    server: Any,
    communicate: Callable[..., str],
    wait_for: Callable[..., None],
    alive: Callable[[int], bool],
) -> None:
    chance, killed, begin = random.Random(seed), [], time.monotonic()
    online.sweep({"model.size": SIZES, "model.wandb": True, "model.nap": 1.0, "model.epochs": 4})
    assert online.run("register", "toy")[0] == 0
    for _ in range(KILLS):
        program = online.start("agents", SWEEP, "--workers", "2")
        wait_for(lambda: any(run.state == "running" for run in server.runs.values()), 60)
        if chance.random() < 0.6:  # while a cell trains, however long it takes to start
            wait_for(lambda: any(map(alive, online.starts())), 60)
        time.sleep(chance.uniform(0.0, 3.0))
        agents = children(program.pid)
        victim = chance.choice([program.pid, *agents])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed.append("program" if victim == program.pid else "agent")
        if victim != program.pid:
            # The other agent must not end the sweep alone: it is killed a little later, or asked to leave.
            time.sleep(chance.uniform(0.0, 2.0))
            for process in [program.pid, *agents] if chance.random() < 0.5 else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.append("program" if process == program.pid else "agent")
            if program.poll() is None:
                program.send_signal(signal.SIGTERM)
        communicate(program, 60)
        if all(run.state == "finished" for run in server.runs.values()):
            break
    output, crashed = communicate(online.start("agents", SWEEP, "--workers", "2"), 120), server.delete_crashed()
    if crashed:  # a cell that died before it could speak
        output = communicate(online.start("agents", SWEEP, "--workers", "2"), 120)
    seconds = time.monotonic() - begin
    print(f"seed {seed}: killed {killed}, {len(online.starts())} starts, {crashed} died unheard, {seconds:.0f} s")
    assert {run.state for run in server.runs.values()} == {"finished"}, output
    records = online.records()
    assert sorted(records) == sorted(server.runs), output
    sizes = sorted(word for record in records.values() for word in record["arguments"] if "model.size" in word)
    assert sizes == [f"--model.size={size}" for size in SIZES]
    assert [record["history"] for record in records.values()] == [["0/0", "0/1", "0/2", "0/3"]] * len(SIZES)
    for run in server.runs.values():
        assert [line.split('"epoch":')[1][0] for line in run.history] == ["0", "1", "2", "3"], "W&B's curve"
