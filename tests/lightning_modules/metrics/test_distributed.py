"""The same numbers from 1, 2 and 3 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytestmark = pytest.mark.program

WORLDS = (1, 2, 3)
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def tables(problem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    p = problem(21, images=16, size=(20, 22), levels=40, categories=3)
    np.savez(folder / "data.npz", maps=p.maps, masks=p.masks, names=np.array(p.categories))
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), folder / f"meet{world}", folder / "data.npz", folder],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for world in WORLDS
        for rank in range(world)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(errors)
    alone = {
        "padded": p.compute(categories={"c0": "one", "c1": "two", "c2": "two"}).table,
        "uneven": p.compute(categories=["c0", "c1", "c2"]).table,
    }
    alone["one process has nothing"] = alone["padded"]
    found = {f.stem: pd.read_pickle(f) for f in folder.glob("*.pkl")}
    assert len(found) == 3 * sum(WORLDS)
    return alone, found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", ["padded", "uneven", "one process has nothing"])
def test_every_process_gets_the_numbers_of_a_single_one(tables, scenario, world):
    alone, found = tables
    expected = alone[scenario]
    first = found[f"{scenario}-{world}-0"]
    for rank in range(1, world):
        pd.testing.assert_frame_equal(found[f"{scenario}-{world}-{rank}"], first)  # the same bits
    pd.testing.assert_frame_equal(first.drop(columns="value"), expected.drop(columns="value"))
    np.testing.assert_allclose(first.value, expected.value, rtol=0, atol=1e-13)
