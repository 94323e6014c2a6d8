"""Records of a sweep's cells that W&B's agents made, so that the local runner does not run those cells again.

An agent's run has W&B's name, not the cell's. Its record counts for a cell if it has the cell's parameters, profile, data,
backbone and weights, and if no file that decides the result (code, profile, sweep file) differs from the commit that
made it. In doubt the cell is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from results.common.code import unchanged_since
from results.common.files import read_json
from sweeps.runner import command
from sweeps.runner.checked_sweep import CheckedSweep
from sweeps.runner.expansion import same
from sweeps.runner.identity import Dataset, deciding_files, lookup, read_config
from sweeps.runner.local import Job
from sweeps.runner.state import RECORDS

_BACKBONE = "model.init_args.backbone"


def take_over(
    jobs: Iterable[Job], sweep: CheckedSweep, variables: Mapping[str, str], sets: Iterable[Dataset]
) -> list[Job]:
    """Give jobs whose cell an agent finished the agent's run in place of their own; returns those jobs."""
    jobs = [job for job in jobs if not job.finished()]
    known = {job.run for job in jobs}
    records = {
        path.parent.name: read_json(path)
        for path in sorted(Path(RECORDS, sweep.name).glob("[!.]*/record.json"))
        if path.parent.name not in known
    }
    taken: list[Job] = []
    prints: dict[str, str] | None = None
    for job in jobs:
        for run, record in records.items():
            if not (_same_cell(record, job, variables) and _same_code(record, job, sweep, variables)):
                continue
            prints = _fingerprints(sets) if prints is None else prints
            if {str(d.get("name")): d.get("fingerprint") for d in record.get("datasets", ())} == prints:
                job.run = run
                taken.append(job)
                break
    return taken


def _same_cell(record: Mapping[str, Any], job: Job, variables: Mapping[str, str]) -> bool:
    cell, wanted = record.get("cell") or {}, job.cell.parameters
    backbone = record.get("backbone") or {}
    weights = job.environment.get("WEIGHTS")
    return (
        set(cell) == set(wanted)
        and all(same(cell[name], value) for name, value in wanted.items())
        and record.get("profile") == variables["PROFILE"]
        and variables.get("BACKBONE") in (None, "", backbone.get("name"))
        and weights in (None, "", backbone.get("weights"))
    )


def _same_code(record: Mapping[str, Any], job: Job, sweep: CheckedSweep, variables: Mapping[str, str]) -> bool:
    """Whether the files that decide the cell's result are those of the commit that made the record."""
    came = record.get("provenance") or {}
    if came.get("git_dirty") is not False:
        return False
    configs = command.configs(sweep.command, variables, job.cell.parameters)
    if not job.environment.get("WEIGHTS"):  # then the profile's, which must be those of the record
        words = [lookup(read_config(path), f"{_BACKBONE}.weights") for path in configs]
        if not {word for word in words if word} <= {(record.get("backbone") or {}).get("weights")}:
            return False
    return unchanged_since(came.get("git_commit"), deciding_files(sweep, variables, job.cell.parameters))


def _fingerprints(sets: Iterable[Dataset]) -> dict[str, str]:
    from datamodules.reading import DatasetConfig, read_datasets  # late: it reads the data

    configs = [DatasetConfig(data.name, str(data.root), data.categories or ()) for data in sets]
    with warnings.catch_warnings():  # the cells that run say what is odd in the data
        warnings.simplefilter("ignore")
        return dict(read_datasets(configs).fingerprints)
