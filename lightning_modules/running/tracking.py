"""What a run leaves in W&B besides its curves; nothing happens in a run that does not log there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_modules.running.settings import RunConfig


def settings(run: RunConfig, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Project, name, group and configuration under which a run appears in W&B.

    The complete configuration has one key of its own, `cli`, apart from the sweep's parameters.
    """
    if not run.upload:
        os.environ["WANDB_X_DISABLE_META"] = "true"  # the client's own notes: command line, working directory, host
        configuration = without_paths(configuration)
    return {
        "project": os.environ.get("WANDB_PROJECT", "unirecon"),
        "name": run.name,
        "group": os.environ.get("WANDB_RUN_GROUP", run.sweep),
        "config": {"cli": dict(configuration)},
    }


def without_paths(value: Any) -> Any:
    """The same options with the last part only of every path in them."""
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and ("/" in value or os.sep in value) else value


@rank_zero_only
def announce(run: RunConfig) -> None:
    """Says what W&B will be sent of the user's data, where it is online."""
    if os.environ.get("WANDB_MODE") != "online":
        return
    if run.upload:
        rank_zero_info(
            "W&B is online: it is sent the run's record, with heat maps (pictures of the data) and the paths of its "
            "files. --run.upload=false sends neither."
        )
    else:
        rank_zero_info("W&B is online: it is sent curves, numbers and options; no picture, no path, no record.")


def handed_out(run: RunConfig) -> bool:
    """Whether a W&B agent started this program for this run, and its name is W&B's."""
    return "WANDB_SWEEP_ID" in os.environ and os.environ.get("WANDB_RUN_ID") == run.name


@rank_zero_only
def open_run(run: RunConfig, configuration: Mapping[str, Any]) -> None:
    """Opens the W&B run of a program whose trainer does not open it."""
    import wandb

    run.work.mkdir(parents=True, exist_ok=True)
    wandb.init(**settings(run, configuration), dir=str(run.work), resume="allow")


def active_run() -> Any | None:
    """This process's W&B run, without importing W&B into a run that does not use it."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)


def log_history(history: pd.DataFrame, prefix: str) -> None:
    """Logs the curves of a finished part (a record's history: epoch, step, metric, value) as `<prefix>/<metric>`."""
    run = active_run()
    if run is None:
        return
    for epoch, rows in history.groupby("epoch", sort=True):
        values = {f"{prefix}/{row.metric}": row.value for row in rows.itertuples()}
        run.log({**values, "epoch": int(epoch)})


def log_record(folder: Path, table: pd.DataFrame, upload: bool = True) -> None:
    """Puts the means into the run's summary, the per-category table and the heat maps beside them, the record as artifact.

    The record is complete without W&B, so that its client's failures are a warning.

    Args:
        folder: The finished run record; every file of it becomes part of an artifact of type `run-record`.
        table: Its metrics in long form.
        upload: Whether the record and its pictures are sent.
    """
    run = active_run()
    if run is None:
        return
    try:
        _log_record(run, folder, table, upload)
    except Exception as error:
        rank_zero_warn(
            f"W&B did not take the run record ({type(error).__name__}: {error}). It is complete in {folder}."
        )


def _log_record(run: Any, folder: Path, table: pd.DataFrame, upload: bool) -> None:
    import wandb

    own = table[table.variant == ""]
    means = own[(own.scope == "mean") & (own.dataset == "")].dropna(subset="value")
    run.summary.update({row.metric: row.value for row in means.itertuples()})
    categories = own[own.scope == "category"]
    wide = categories.pivot_table(index=["dataset", "category"], columns="metric", values="value", sort=False)
    pictures = {
        f"heatmaps/{picture.stem}": wandb.Image(str(picture))
        for picture in sorted((folder / "heatmaps").glob("*.jpg"))
        if upload
    }
    run.log({"categories": wandb.Table(dataframe=wide.reset_index()), **pictures})
    if not upload:
        return
    artifact = wandb.Artifact(f"{folder.parent.name}-{folder.name}".replace("=", "-"), type="run-record")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


@rank_zero_only
def report_preemption() -> None:
    """Tells W&B that the run was pre-empted and must be handed out again, not that it has finished.

    A run that an agent started and that has not yet spoken to W&B speaks now: silent, it would count as crashed.
    """
    run = active_run()
    if run is None and "WANDB_SWEEP_ID" in os.environ and os.environ.get("WANDB_MODE") == "online":
        import wandb

        run = wandb.init(resume="allow", settings=wandb.Settings(init_timeout=30))
    if run is not None:
        run.mark_preempting()
        run.finish(exit_code=143)
