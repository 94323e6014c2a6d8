"""One run: its name, its folders, where it came from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_modules.metrics.thresholds import check_rule
from lightning_modules.metrics.version import __version__
from results.aggregator.records import NAME
from results.common.environment import shell_line
from results.common.files import restore_replaced

PROTOCOLS = ("clean", "as_released")


@dataclass(frozen=True)
class RunConfig:
    """Name, place and protocol of a run.

    Args:
        name: The run's folder below `results/runs/<sweep>/`; by default the method, the time and the seed.
        sweep: The sweep that the run belongs to; `single` for runs of their own.
        results: The folder that holds `runs/` (records) and `work/` (checkpoints, logs).
        protocol: `clean`: full test set, last epoch, nothing chosen on test images. `as_released`: what the method's
            released code does, to compare with its printed numbers; every table says so.
        selection: Which epoch's weights count: `last`, or `best_on_test`, the released code's choice by the test set.
            None is the protocol's own: last if clean, best_on_test if as_released. Clean refuses best_on_test.
        curve_every: Score the test set every so many epochs for a training curve (image and pixel AUROC); 0 for never.
            Under the protocol `clean` the curve is only watched: nothing is chosen by it.
        heatmaps: Draw heat maps of the worst, the median and the best image of each category.
        overwrite: Replace a finished run of the same name.
        upload: With W&B online, also send the record and the heat maps. They hold pictures of the data and the paths
            of its files. Without, W&B gets curves, numbers and options, and no path.
        keep_epochs: Also keep the weights at the end of these epochs (from 1), beside the run's checkpoint, for pictures of
            how a training goes.
        fpr_limits: False-positive rates up to which AU-PRO is integrated, each in (0, 1]: 0.3 gives `pixel_aupro`, 0.05
            `pixel_aupro_0.05`, side by side in record and table. None is the data's own: 0.05 and 0.3 for MVTec AD 2,
            0.3 for every other data set.
        alpha: Wanted rate of false alarms per good image, in (0, 1), for the rule `conformal`: 0.01 needs 99 held-out normal
            images of each category. It and `rule` decide nothing about the training; `predict` may be given others.
        rule: How the threshold is made of normal images: `max` (their highest score), `conformal` (needs alpha), `mean_3sd`,
            `p95_factor`; see `lightning_modules.metrics.thresholds`. None is conformal with an alpha, else max.
        folds: Make thresholds by cross-validation, where images are few: so many models are trained first, each without a part
            of the normal images, which it then scores; the run itself trains on all. The training takes that many times
            longer. See `lightning_modules.running.folds` for what is promised. None holds images out instead
            (`data.holdout`).
        compile: Compile the reconstruction network (`torch.compile`) for training and scoring. The first steps then
            take a minute; numbers agree with those of an uncompiled run up to rounding, but dropout draws differ.
        cuda_graphs: Launch the compiled network as one CUDA graph per batch shape instead of kernel by kernel
            (`torch.compile(mode="reduce-overhead")`), which pays where a small network waits for launches. Needs
            `compile` and an NVIDIA GPU.
    """

    name: str | None = None
    sweep: str = "single"
    results: str = "results"
    protocol: str = "clean"
    selection: str | None = None
    curve_every: int = 0
    heatmaps: bool = True
    overwrite: bool = False
    upload: bool = True
    keep_epochs: list[int] | None = None
    fpr_limits: list[float] | None = None
    alpha: float | None = None
    rule: str | None = None
    folds: int | None = None
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"run.protocol is {self.protocol!r}; allowed are {', '.join(PROTOCOLS)}.")
        if self.selection not in (None, "last", "best_on_test"):
            raise ValueError(f"run.selection is {self.selection!r}; allowed are last, best_on_test and null.")
        if self.selection == "best_on_test" and self.protocol == "clean":
            raise ValueError("run.selection=best_on_test looks at test labels: it needs run.protocol=as_released.")
        if self.keep_epochs is not None and not all(epoch >= 1 for epoch in self.keep_epochs):
            raise ValueError(f"run.keep_epochs is {self.keep_epochs!r}; epochs count from 1.")
        if self.fpr_limits is not None and not (self.fpr_limits and all(0 < limit <= 1 for limit in self.fpr_limits)):
            raise ValueError(
                f"run.fpr_limits is {self.fpr_limits!r}; give one or more false-positive rates above 0 and up to 1, for "
                "example [0.05, 0.3], or null for the data's own."
            )
        try:
            check_rule(self.rule, self.alpha)
        except ValueError as error:
            raise ValueError(f"run.{error}") from error
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"run.folds is {self.folds}; give at least 2, for example 5, or null for none.")
        if self.folds is not None and self.selects == "best_on_test":
            raise ValueError(
                "run.folds needs run.selection=last: the folds' epochs would be chosen on the test set, and their scores with it."
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError(
                "run.cuda_graphs=true needs run.compile=true: the graphs are made of the compiled network."
            )
        if self.curve_every < 0:
            raise ValueError(f"run.curve_every is {self.curve_every}; give 0 (no curve) or a number of epochs.")
        for key, value in (("name", self.name), ("sweep", self.sweep)):
            if value is not None and not NAME.match(value):
                raise ValueError(
                    f"run.{key} is {value!r}; it names a folder: give letters, digits, '-', '_', '=', '.'."
                )

    @property
    def selects(self) -> str:
        """The selection that counts, `last` or `best_on_test`."""
        return self.selection or ("best_on_test" if self.protocol == "as_released" else "last")

    @property
    def record(self) -> Path:
        """Folder of the finished run's record."""
        return Path(self.results) / "runs" / self.sweep / self.name

    def finished(self) -> bool:
        """Whether the run has its record; one whose replacing was cut off is brought back first."""
        restore_replaced(self.record.parent)
        return self.record.exists()

    @property
    def work(self) -> Path:
        """Folder of the run's checkpoints and logs."""
        return Path(self.results) / "work" / self.sweep / self.name


def work_folder(folder: Path) -> Path:
    """`<results>/work/<sweep>/<run>` of the record `<results>/runs/<sweep>/<run>`."""
    folder = folder.resolve()
    return folder.parent.parent.parent / "work" / folder.parent.name / folder.name


def sweep_parameters() -> dict[str, Any]:
    """The sweep's parameters of this run, as `wandb agent` and the local runner hand them over; empty outside a sweep."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).is_file():
        return {}
    entries = yaml.safe_load(Path(path).read_text()) or {}
    return {key: entry["value"] for key, entry in entries.items() if isinstance(entry, dict) and "value" in entry}


def code_version() -> tuple[str, bool]:
    """(git commit of the code or "unknown", whether files differ from it)."""
    here = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where a number comes from: commit, versions, machine, command.

    packages: What the method needs beyond requirements.txt, for its versions.
    """
    commit, dirty = code_version()
    packages = (*packages, "torch", "lightning", "timm", "torchmetrics", "albumentations", "numpy", "scipy", "pandas")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": {
            "unirecon": __version__,
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        },
        "device": f"{device.type}: {name}",
        "command": shell_line(["python", "-m", "lightning_modules", *sys.argv[1:]], os.environ),
    }
