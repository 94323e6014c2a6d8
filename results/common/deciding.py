"""What decides a result: the one rule for names of cells, for going on with an interrupted run, and for tables.

Everything decides except what is listed here, so that an option or a file that is new counts until somebody knows better.
Data counts by its contents (`results.common.contents`), weights by their hash, both beside this rule. Versions of
libraries are recorded and shown, and tables say when they differ, but no cell is run again for them; except those of
`LIBRARIES`, for the methods whose code imports them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

FREE = re.compile(
    r"(config|ckpt_path"
    r"|run\.(name|sweep|results|alpha|rule|folds|heatmaps|overwrite|upload|keep_epochs|cuda_graphs)"
    r"|cache\.(root|budget_gb|resident_gb)"
    r"|trainer\.(logger|default_root_dir|enable_\w+|log_every_n_steps|accelerator|profiler|num_sanity_val_steps)"
    r"|data\.init_args\.(num_workers|pin_memory|eval_batch_size|cache_mb|predict_root|predict_dataset|root"
    r"|datasets\.\d+(\.init_args)?\.(root|categories))"
    r"|model\.init_args\.backbone\.weights)(\.|$)"
)
"""Options that change no number: names, places, speed, what is shown; data and weights count by what is in them."""

SEEDS = re.compile(r"(seed_everything|(data|model)\.init_args\.seed)$")
"""Options that decide a result, and in which the runs of one cell differ on purpose."""

EXTENDS = re.compile(r"trainer\.(max_\w+|min_\w+|devices|num_nodes|strategy)(\.|$)")
"""Options that decide a result, and that an interrupted run may go on with otherwise: longer, or on another machine."""

LATER = {
    "data.init_args.shots": None, "data.init_args.contamination": 0.0, "data.init_args.contamination_reserved": None,
    "data.init_args.epoch_images": None, "data.init_args.category_count": None, "data.init_args.tiles": None,
    "data.init_args.fold": None, "data.init_args.repeat": 1,
}  # fmt: skip
"""Options that earlier versions did not have, with the value that means what those did: older runs stay comparable."""

LIBRARIES = ("anomalib",)
"""Packages that some methods take their networks from: the version decides these methods' results, and no others'."""

SHOWING = (
    "results", "sweeps", "tests", "datamodules/__main__.py", "datamodules/check.py", "datamodules/contact_sheet.py",
    "datamodules/download", "datamodules/errors.py", "datamodules/outline.py", "datamodules/problems.py",
    "lightning_modules/benchmarks", "lightning_modules/decisions", "lightning_modules/exporting",
    "lightning_modules/pictures", "lightning_modules/prediction", "lightning_modules/callbacks/kept_epochs.py",
    "lightning_modules/callbacks/predictions.py", "lightning_modules/callbacks/progress.py",
    "lightning_modules/running/checkpoints.py", "lightning_modules/running/decisions.py",
    "lightning_modules/running/finding.py", "lightning_modules/running/folds.py", "lightning_modules/running/loading.py",
    "lightning_modules/running/parser.py", "lightning_modules/running/preemption.py",
    "lightning_modules/running/printing.py", "lightning_modules/running/quick_parser.py",
    "lightning_modules/running/quiet.py", "lightning_modules/running/resuming.py",
    "lightning_modules/running/requirements.py", "lightning_modules/running/submission.py",
    "lightning_modules/running/tracking.py",
)  # fmt: skip
"""Source files and folders that only start, draw, track, print or word: an edit of theirs makes no result anew."""


def deciding(configuration: Mapping[str, Any], beside: re.Pattern[str] | None = None) -> dict[str, Any]:
    """The options of a configuration that decide its result, by dotted key.

    Args:
        configuration: As the command line writes it; nested mappings.
        beside: More keys to leave out (`SEEDS` or `EXTENDS`).
    """
    flat = {k: v for k, v in flatten(configuration) if not FREE.match(k) and not (beside and beside.match(k))}
    if flat.get("run.protocol", "clean") == "clean":
        flat.pop("run.curve_every", None)  # watched only; as_released may choose an epoch by it
    if flat.get("cache.mode") in ("off", "float32"):
        del flat["cache.mode"]  # bit-exact
    for key, value in LATER.items():
        if key in flat and flat[key] == value:
            del flat[key]
    return flat


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings and of lists of mappings."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, part in value.items():
            yield from flatten(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from flatten(part, f"{prefix}.{number}")
    else:
        yield prefix, value


def shows_only(file: str | PurePath) -> bool:
    """Whether a source file, relative to the repository, is one of `SHOWING`."""
    return f"{PurePath(file).as_posix()}/".startswith(_SHOWING)


_SHOWING = tuple(f"{known}/" for known in SHOWING)
