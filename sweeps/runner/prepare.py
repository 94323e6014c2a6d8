"""What a sweep needs before its first cell: environment, data, weights, workers, and the cells with their names."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from results.common import methods
from results.common.environment import parse, parts
from results.common.files import read_json, write_json
from results.common.lock import Lock
from results.common.no_weights import no_weights
from sweeps.runner import command
from sweeps.runner.checked_sweep import CheckedSweep
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.identity import OVERRIDES, Dataset, Identifier, lookup, read_config
from sweeps.runner.local import Job
from sweeps.runner.state import WORK

SYNTHETIC_LOCO = Path("data/synthetic_loco")
"""The benchmark in the layout of MVTec LOCO AD."""
LOCO_OPTIONS = ("--layout", "mvtec_loco")
CHOICES = {"COMPARE": methods.COMPARE, "SETTING": methods.SETTING}
"""Variables that choose the value of a parameter which is one experiment or another."""
_ALLOWED = {"COMPARE": methods.COMPARES, "SETTING": ("unified", "per_category")}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def environment(profile: str | None, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a sweep's programs: PROFILE set, empty overrides dropped, W&B offline unless WANDB=online."""
    may_be_empty = (*OVERRIDES, *CHOICES, "PROFILE", "WANDB", "ARGS", "METHOD")
    result = {key: value for key, value in base.items() if value or key not in may_be_empty}
    result["PROFILE"] = profile or result.get("PROFILE") or "demo"
    mode = result.pop("WANDB", None)
    if mode not in (None, "online", "offline", "disabled"):
        raise SweepError(f"WANDB is {mode!r}. Allowed: online, offline, disabled.")
    result["WANDB_MODE"] = mode or result.get("WANDB_MODE") or "offline"
    # A run of this sweep must not take itself for one of a sweep on a server.
    result.pop("WANDB_SWEEP_ID", None)
    return result


def chosen(sweep: CheckedSweep, variables: Mapping[str, str]) -> CheckedSweep:
    """The sweep with the values that COMPARE and SETTING choose; SweepError if it does not ask for such a choice."""
    parameters = dict(sweep.parameters)
    for name, key in CHOICES.items():
        value = variables.get(name)
        if not value:
            continue
        if key not in parameters:
            raise SweepError(
                f"{name}={value}, but {sweep.path} has no parameter {key} that it could choose. Leave it out."
            )
        if value not in _ALLOWED[name]:
            raise SweepError(f"{name} is {value!r}. Allowed: {', '.join(_ALLOWED[name])}.")
        parameters[key] = {"value": value}
    return replace(sweep, parameters=parameters, command=(*sweep.command, *_more_words(sweep, variables)))


def _more_words(sweep: CheckedSweep, variables: Mapping[str, str]) -> list[str]:
    """The words of ARGS, for every cell; SweepError if they are no options or set what the sweep varies."""
    try:
        words = shlex.split(variables.get("ARGS") or "")
    except ValueError as error:
        raise SweepError(f"ARGS={variables['ARGS']} cannot be split into words: {error}.") from None
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if not word.startswith("--") or "=" not in word:
            raise SweepError(f"ARGS: {word!r} must be an option with its value in one word, --key=value, for a sweep.")
        if name in sweep.parameters or name.startswith("run."):
            reason = "the sweep names its runs" if name.startswith("run.") else f"{sweep.path} sets it for each cell"
            raise SweepError(f"ARGS: {word}: {reason}. ONLY=key=value chooses cells, SEEDS= seeds.")
    return words


def only(sweep: CheckedSweep, conditions: list[str], variables: Mapping[str, str]) -> list[str]:
    """The conditions that choose cells, METHOD among them; SweepError if the sweep has no choice of methods."""
    method = variables.get("METHOD")
    if not method:
        return conditions
    if command.METHOD not in sweep.parameters:
        raise SweepError(
            f"METHOD={method}, but {sweep.path} has no choice of methods: its command names what is trained. Leave METHOD "
            "out, or run ABLATION=methods."
        )
    return [*conditions, f"{command.METHOD}={method}"]


def with_shared_data(sweep: CheckedSweep, cells: list[Cell], variables: Mapping[str, str]) -> dict[str, str]:
    """The variables, for a sweep over methods with DATASET: the data of all methods of its profile if none is named.

    Without it each method would have its own profile's data, and no table could hold them together.
    """
    if variables.get("DATASET") or not cells or command.METHOD not in cells[0].parameters:
        return dict(variables)
    try:
        found = methods.datasets(variables["PROFILE"])
    except ValueError as error:
        raise SweepError(str(error)) from error
    named = {
        "DATASET": ",".join(entry["name"] for entry in found),
        "DATA_ROOT": ",".join(entry.get("root") or "" for entry in found),
    }
    categories = variables.get("CATEGORIES") or ",".join(found[0].get("categories") or ())
    if len(found) == 1 and categories:
        named["CATEGORIES"] = categories
    return {**variables, **named}


def datasets(configs: Iterable[Path], variables: Mapping[str, str]) -> list[Dataset]:
    """The data sets of the runs: what DATASET, DATA_ROOT and CATEGORIES name, else what the configurations name."""
    named: list[Mapping[str, Any]] = []
    for path in configs:
        named = lookup(read_config(path), "data.init_args.datasets") or named
    try:
        own = parse(variables, _has_own_root).datasets
    except ValueError as error:
        raise SweepError(str(error)) from error
    if own:
        named = [asdict(dataset) for dataset in own]
    return [
        Dataset(entry["name"], _root(entry["name"], entry.get("root")), parts(entry.get("categories")) or None)
        for entry in named
    ]


def _has_own_root(name: str) -> bool:
    from datamodules.readers import has_own_root  # late: a sweep of another program needs no readers

    return has_own_root(name)


def _root(name: str, root: str | None) -> Path:
    """The folder that is named, else the one of a data set that comes with the project."""
    if root:
        return Path(root)
    from datamodules.errors import DataError
    from datamodules.readers import find_dataset

    try:
        return find_dataset(name, None)[1]
    except DataError as error:
        raise SweepError(str(error)) from error


def data(sets: list[Dataset], profile: str, say: Callable[[str], None]) -> None:
    """Make the embedded benchmark if it is used and absent; SweepError if other data or a category is missing."""
    for dataset in sets:
        from datamodules.errors import DataError  # late: a sweep of another program needs no readers
        from datamodules.readers import find_dataset, get_reader

        try:
            get_reader(dataset.name)
            if dataset.name == "synthetic":
                _make_synthetic(dataset.root, LOCO_OPTIONS if dataset.root == SYNTHETIC_LOCO else (), say)
            elif not dataset.root.is_dir():
                raise SweepError(
                    f"The data set {dataset.name} of profile {profile} should be in {dataset.root}, which is not a folder. "
                    f"Name its place with DATA_ROOT=<folder>, or run PROFILE=demo, which makes its own data."
                    f"{_fetched(dataset.name)}"
                )
            find_dataset(dataset.name, dataset.root, dataset.categories)
        except DataError as error:
            raise SweepError(str(error)) from error


def _fetched(name: str) -> str:
    """How to get a data set that can be fetched by name, as a further sentence."""
    from datamodules.download.sources import SOURCES

    return f" Fetch it with make data DATASET={name} DATA_ROOT=<folder>." if name in SOURCES else ""


def _make_synthetic(root: Path, options: tuple[str, ...], say: Callable[[str], None]) -> None:
    with Lock(WORK / "synthetic.lock"):
        if root.is_dir() and any(root.iterdir()):
            return
        say(f"Making the embedded benchmark in {escape(str(root))}.")
        # It appears complete or not at all.
        code = subprocess.run([sys.executable, "-m", "datamodules", "synthetic", str(root), *options]).returncode
        if code:
            raise SweepError(f"Making the embedded benchmark failed with exit code {code}; its message is above.")


class Weights:
    """Decides `auto` weights once per backbone and sweep, so that no two cells differ in them by chance.

    The decision is kept in the sweep's working folder and also holds for later runs of the sweep.
    """

    def __init__(
        self,
        sweep: CheckedSweep,
        variables: Mapping[str, str],
        say: Callable[[str], None],
        sets: Sequence[Dataset] = (),
    ) -> None:
        self._variables = variables
        self._say = say
        self._kept = WORK / sweep.name / "weights.json"
        self._decided: dict[str, str] = {}
        self._sweep = sweep
        self._own_data = any(dataset.name == "folder" for dataset in sets)

    def of(self, cell: Cell) -> str | None:
        """The cell's WEIGHTS, or None if neither the environment nor `auto` in the profile asks for any."""
        prefix = "model.init_args.backbone."
        profile: dict[str, Any] = {}
        for path in command.configs(self._sweep.command, self._variables, cell.parameters):
            profile.update(lookup(read_config(path), prefix[:-1]) or {})
        if key := methods.of(cell.parameters):
            options = methods.shared(*key, self._variables["PROFILE"])
            profile |= {name.removeprefix(prefix): v for name, v in options.items() if name.startswith(prefix)}
        weights = cell.parameters.get(f"{prefix}weights") or self._variables.get("WEIGHTS")
        if (weights or profile.get("weights")) != "auto":
            return weights
        tag = cell.parameters.get(f"{prefix}name") or self._variables.get("BACKBONE") or profile.get("name")
        if tag is None:
            raise SweepError(
                "WEIGHTS=auto needs the backbone's name: BACKBONE=<timm tag> or backbone.name in the profile."
            )
        if tag not in self._decided:
            self._decided[tag] = read_json(self._kept).get(tag) or self._decide(tag)
            self._tell(tag)
        if self._own_data and self._decided[tag] == "random":
            raise SweepError(no_weights(tag))
        return self._decided[tag]

    def _decide(self, tag: str) -> str:
        words = [sys.executable, "-m", "models.backbones", tag, "--weights", "auto"]
        outcome = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        lines = outcome.stdout.split()
        if outcome.returncode or not lines or lines[-1] not in ("imagenet", "packaged", "random"):
            raise SweepError(f"`{' '.join(words[1:])}` could not decide the weights of {tag}; its message is above.")
        write_json(self._kept, {**read_json(self._kept), tag: lines[-1]})
        return lines[-1]

    def _tell(self, tag: str) -> None:
        if self._decided[tag] == "imagenet":
            self._say(f"{tag} has ImageNet weights.")
        elif self._decided[tag] == "packaged":
            self._say(f"{tag} has ImageNet weights, those of a Python package.")
        else:
            self._say(
                f"[bold yellow]{tag} has RANDOM weights[/]: when this sweep began, the ImageNet weights were neither cached nor "
                f"available from the hub or a package. WEIGHTS=imagenet insists on them."
            )


def jobs(
    sweep: CheckedSweep,
    cells: list[Cell],
    variables: Mapping[str, str],
    sets: list[Dataset],
    weights: Weights,
    count: int,
) -> list[Job]:
    """The cells as jobs with names, command lines and environments. count: CPU threads of one cell."""
    identifier = Identifier(sweep, variables, sets)
    result = []
    for cell in cells:
        own = weights.of(cell)
        run = identifier.name(cell, own)
        result.append(
            Job(
                cell=cell,
                sweep=sweep.name,
                run=run,
                words=[*command.expand(sweep.command, cell.parameters, sys.executable, variables), f"--run.name={run}"],
                environment={
                    **threads(variables, count),
                    **({"WEIGHTS": own} if own else {}),
                    "WANDB_RUN_GROUP": sweep.name,
                    "WANDB_RUN_ID": f"{sweep.name}-{run}",
                    "PYTHONUNBUFFERED": "1",
                },
                identity=identifier.describe(cell, own),
            )
        )
    return result


def threads(variables: Mapping[str, str], count: int) -> dict[str, str]:
    """The variables with one number of CPU threads for all numerical libraries, the user's if there is one.

    It must be one number: a library with more threads than the others waits for a core by spinning on it.
    """
    chosen = next((variables[name] for name in THREADS if variables.get(name)), str(count))
    return {**variables, **{name: variables.get(name) or chosen for name in THREADS}}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(chosen: str | None) -> list[str]:
    """GPU numbers to use: the chosen ones, else those of CUDA_VISIBLE_DEVICES, else all that the machine has.

    `none` means the CPU. The list is empty if there is no GPU.
    """
    if chosen:
        return [] if chosen == "none" else list(parts(chosen))
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [number for number in parts(os.environ["CUDA_VISIBLE_DEVICES"]) if number != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listing.stdout.split() if listing.returncode == 0 else []
