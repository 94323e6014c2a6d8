"""What a run leaves in W&B besides its curves; nothing happens in a run that does not log there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd


def active_run() -> Any | None:
    """This process's W&B run, without importing W&B into a run that does not use it."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)


def log_record(folder: Path, table: pd.DataFrame) -> None:
    """Puts the means into the run's summary, the per-category table and the heat maps beside them, the record as artifact.

    Args:
        folder: The finished run record; every file of it becomes part of an artifact of type ``run-record``.
        table: Its metrics in long form.
    """
    run = active_run()
    if run is None:
        return
    import wandb

    own = table[table.variant == ""]
    means = own[(own.scope == "mean") & (own.dataset == "")].dropna(subset="value")
    run.summary.update({row.metric: row.value for row in means.itertuples()})
    categories = own[own.scope == "category"]
    wide = categories.pivot_table(index=["dataset", "category"], columns="metric", values="value", sort=False)
    pictures = {
        f"heatmaps/{picture.stem}": wandb.Image(str(picture)) for picture in sorted((folder / "heatmaps").glob("*.jpg"))
    }
    run.log({"categories": wandb.Table(dataframe=wide.reset_index()), **pictures})
    artifact = wandb.Artifact(f"{folder.parent.name}-{folder.name}".replace("=", "-"), type="run-record")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


def report_preemption() -> None:
    """Tells W&B that the run was pre-empted and must be handed out again, not that it has finished."""
    run = active_run()
    if run is not None:
        run.mark_preempting()
        run.finish(exit_code=143)
