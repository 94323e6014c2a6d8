"""The lock between processes: what two runs, two users or a killed runner would lose without it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from results.common.lock import Lock

REPOSITORY = Path(__file__).resolve().parents[3]
RUNNER = """
import os, subprocess, sys
from pathlib import Path
from results.common.lock import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire()
cell = subprocess.Popen(["sleep", "60"], pass_fds=(lock.descriptor,), preexec_fn=lambda: None)
print(cell.pid, flush=True)
os._exit(0)
"""


def test_a_cell_that_outlives_its_killed_runner_stays_locked(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    cell = int(runner.stdout.readline())
    runner.stdout.close()
    runner.wait()
    assert not Lock(path).acquire()
    os.kill(cell, 9)
    assert Lock(path).acquire(wait=10)


def test_releasing_a_lock_frees_it_although_a_child_holds_its_descriptor(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    with subprocess.Popen(["sleep", "60"], pass_fds=(lock.descriptor,)) as child:
        assert not Lock(tmp_path / "lock").acquire(wait=0.2)
        lock.release()
        assert Lock(tmp_path / "lock").acquire()
        child.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_still_keeps_two_apart(tmp_path: Path, monkeypatch, number: int) -> None:
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_planted_link_is_refused_and_its_target_left_whole(tmp_path: Path) -> None:
    target = tmp_path / "diary.txt"
    target.write_text("dear diary")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError, match="lock"):
        Lock(tmp_path / "lock").acquire()
    (tmp_path / "lock").unlink()
    os.link(target, tmp_path / "lock")
    with Lock(tmp_path / "lock") as lock:
        lock.sign()
    assert target.read_text() == "dear diary"


def test_the_holder_is_named_and_a_wait_ends(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock") as lock:
        lock.sign()
        other = Lock(tmp_path / "lock")
        begin = time.monotonic()
        assert not other.acquire(wait=0.3)
        assert time.monotonic() - begin >= 0.3
        assert other.holder() == str(os.getpid())
