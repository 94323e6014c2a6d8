"""An interrupted run goes on only as what it began as."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.running import checkpoints, preemption
from lightning_modules.running.settings import RunConfig
from results.common.deciding import EXTENDS, deciding
from results.common.files import read_json, write_json
from results.common.lock import Lock

BEGAN_AS = "began_as.json"
PATIENCE = 20.0
"""Seconds that a pre-empted process may take to leave the run to its successor."""
_claimed: dict[Path, Lock] = {}


def claim(run: RunConfig) -> None:
    """Keeps the run's folder for this process until it ends, and removes what a finished training left there.

    Two trainings in one folder would go on from each other's checkpoints.

    Raises:
        SystemExit: another process is training this run, and has not ended after `PATIENCE` seconds.
    """
    if not preemption.is_first():
        return
    run.work.mkdir(parents=True, exist_ok=True)
    if run.work.resolve() not in _claimed:
        lock = Lock(run.work / "training.lock")
        if not lock.acquire(wait=PATIENCE):
            raise SystemExit(
                f"Process {lock.holder()} is training the run {run.work} now: wait for it, stop it, or choose another "
                "--run.name."
            )
        lock.sign()
        _claimed[run.work.resolve()] = lock
    checkpoint, record = run.work / "checkpoints" / "last.ckpt", run.record / "record.json"
    if not (record.is_file() and checkpoint.is_file()):
        return
    # Another one than the record's is of a training that was to replace the record and was interrupted. Where nothing
    # was noted, it is newer than the record; a time to come says nothing.
    finished = checkpoints.is_recorded(checkpoint)
    if finished is None:
        finished = not record.stat().st_mtime < checkpoint.stat().st_mtime <= time.time()
    if finished:
        checkpoints.forget(checkpoint)


def check(
    run: RunConfig, configuration: Mapping[str, Any], fingerprint: str, left: Path, packages: Iterable[str] = ()
) -> None:
    """Refuses to go on with an interrupted run that began with other options, data or networks; else notes these.

    Args:
        run: The run. With `overwrite` it begins anew instead.
        configuration: Its complete configuration.
        fingerprint: Of its data.
        left: The file or folder that an interrupted run goes on from.
        packages: What the method takes its networks from, by versions that must not change.

    Raises:
        SystemExit: the run began as something else; the message names what differs.
    """
    versions = {f"version of {package}": importlib.metadata.version(package) for package in packages}
    now = {**deciding(configuration, beside=EXTENDS), **versions, "fingerprint of the data": fingerprint[:12]}
    now = json.loads(json.dumps(now, default=str))
    file = run.work / BEGAN_AS
    then = read_json(file)  # empty after a lost power: then it is written anew
    if left.exists() and then:
        keys = sorted(key for key in then | now if then.get(key) != now.get(key))
        if keys and not run.overwrite:
            lines = [f"  {key}: {then.get(key)} then, {now.get(key)} now" for key in keys[:6]]
            lines += [f"  and {len(keys) - 6} more"] * (len(keys) > 6)
            raise SystemExit(
                "\n".join([f"{run.work} holds an interrupted run that began otherwise:", *lines])
                + "\nGo on with what it began with, choose another --run.name, or begin anew with --run.overwrite=true."
            )
        if keys:
            shutil.rmtree(left) if left.is_dir() else checkpoints.forget(left)
    rank_zero_only(write_json)(file, now)
