"""What training and scoring cost: `python -m lightning_modules.benchmarks.training` or `make bench`.

Every method trains on the embedded benchmark in a process of its own, in turns: through the trainer with the feature
cache, and in a plain loop that decodes, resizes and runs the backbone in every step, as the released codes do. Both train
the same network object with the method's optimiser; the ratio of a round is the plain loop's time by ours in that round.
With the default options this takes about a minute per method on two CPU cores. Weights are random: they cost what trained
ones cost.

Peak memory is the largest resident memory of the process (of the device on a GPU) from its start to the end of a training
with cached features. MACs are multiply-accumulates of the matrix products and convolutions in one image's forward pass;
FLOPs are twice that.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from datamodules import UnifiedDataModule
from datamodules.synthetic import Plan, generate
from lightning_modules.base import ReconstructionModule
from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.fitted import FittedModule
from lightning_modules.running.methods import build
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.running.settings import code_version
from results.common.did_you_mean import did_you_mean
from results.common.environment import parts

CATEGORIES = ("wood", "fabric", "gear", "steel_plate")
CELLS = 16
PROFILES = Path(__file__).resolve().parents[2] / "sweeps" / "profiles"
FIRST = "uniad"
"""The method with which growth and float16 are measured if all methods are."""
Clock = Callable[[], float]


def trained(profile: str) -> tuple[str, ...]:
    """The methods with a profile that are trained in steps on a frozen backbone, which is measured here; sorted."""
    found = []
    for file in sorted((PROFILES / profile).glob("*.yaml")):
        module, _, name = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["class_path"].rpartition(".")
        method = getattr(importlib.import_module(module), name)
        if method.has_backbone and not issubclass(method, FittedModule):
            found.append(file.stem)
    return tuple(found)


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Args:
        methods: Names of profiles; empty for all that train (`trained`).
        profile: `demo` or `paper`: sizes of backbone, image, network and batch.
        images: Training images per category, a tenth of them held out.
        native: Side of the image files in pixels; those of MVTec AD are 700 to 1024.
        categories: Number of categories, at most four.
        image_size: Input size in pixels; by default the profile's.
        augmentation: Entry of `datamodules.augmentation`; one that only flips and turns is cached in all its versions.
        precision: Of our trainer, `32-true` or `bf16-mixed`; the plain loop has float32.
        steps: Training steps of a round.
        rounds: Rounds of ours and of the plain loop.
        clock: `wall`, or `cpu` (seconds of all threads of the process) on a machine that also does other work.
        short: Leave out growth and float16, which are measured with the first method.
    """

    methods: tuple[str, ...] = ()
    profile: str = "demo"
    images: int = 40
    native: int = 224
    categories: int = 2
    image_size: int | None = None
    augmentation: str = "none"
    precision: str = "32-true"
    steps: int = 4
    rounds: int = 3
    clock: str = "wall"
    short: bool = False

    def __post_init__(self) -> None:
        for name, least in {"images": 2, "categories": 1, "steps": 1, "rounds": 1}.items():
            if getattr(self, name) < least:
                raise SystemExit(f"--{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.categories > len(CATEGORIES):
            raise SystemExit(f"--categories is {self.categories}; at most {len(CATEGORIES)} are generated.")
        known = trained(self.profile)
        for method in self.methods:
            if method not in known:
                raise SystemExit(f"{self.profile}/{method} cannot be measured. {did_you_mean(method, known)}")
        object.__setattr__(
            self, "methods", self.methods or tuple(sorted(known, key=lambda name: (name != FIRST, name)))
        )


# ---- what is measured ------------------------------------------------------------------------------------------------


def prepare(
    method: str, options: Options, root: Path
) -> tuple[ReconstructionModule, Callable[[], UnifiedDataModule], Any]:
    """The method, a maker of fresh data modules (not set up), and the recipe's gradient clipping."""
    config = yaml.safe_load((PROFILES / options.profile / f"{method}.yaml").read_text())
    model, data = config["model"], config["data"]
    model["init_args"]["backbone"]["weights"] = "random"
    if options.image_size is not None:
        model["init_args"]["image_size"] = options.image_size
        model["init_args"].pop("grid", None)
    module = build(ReconstructionModule, model)
    module.set_protocol("clean", "last")
    recipe = module.recipe
    filled = {"image_size": module.image_size, "resize": recipe.resize, "batch_size": recipe.batch_size}
    own = {
        "datasets": [{"name": "synthetic", "root": str(root)}],
        "augmentation": options.augmentation,
        "setting": "unified",
        "holdout": 0.1,  # for what some methods estimate on held-out images
        "num_workers": 0,
        "cache_mb": 0,
        "drop_last": recipe.drop_last,
    }
    data = data | {"init_args": filled | data["init_args"] | own}
    clip = config["trainer"].get("gradient_clip_val") or recipe.gradient_clip_val
    return module, lambda: build(UnifiedDataModule, data), clip


def _batches(data: UnifiedDataModule, steps: int) -> Iterator[dict[str, Any]]:
    """Training batches of as many epochs as it takes."""
    return itertools.islice(itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count()), steps)


def train_plainly(
    module: ReconstructionModule, data: UnifiedDataModule, steps: int, clip: float | None, now: Clock
) -> float:
    """Seconds of some training steps that decode, resize and run the backbone each time."""
    module.train()
    trained = [parameter for parameter in module.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if module.optimizer is None else module.optimizer_of(trained)
    started = now()
    for batch in _batches(data, steps):
        loss = module.batch_loss(move_data_to_device(batch, module.device))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            clip_grad_norm_(module.network.parameters(), clip)
        optimizer.step()
        loss.item()  # as the released codes do, for their logs
    return now() - started


class _EpochClock(L.Callback):
    """Seconds that the steps of an epoch took."""

    def __init__(self, now: Clock) -> None:
        self.now = now

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = self.now()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds = self.now() - self.started


def _trainer(folder: str, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        **options,
        devices=1,
        limit_val_batches=0,
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def train_ours(
    module: ReconstructionModule, data: UnifiedDataModule, steps: int, clip: float | None, precision: str, now: Clock
) -> float:
    """Seconds of as many training steps through the trainer; an epoch shorter than that is scaled up."""
    clock = _EpochClock(now)
    device = module.device
    done = min(steps, len(data.train_dataloader()))
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_epochs": 1, "limit_train_batches": done, "gradient_clip_val": clip, "precision": precision}
        _trainer(folder, clock, **options).fit(module, datamodule=data)
    module.to(device)  # the trainer has moved it
    module.trainer = None  # what the module logs in the plain loop then goes nowhere
    return clock.seconds / done * steps


@torch.no_grad()
def score(module: ReconstructionModule, data: UnifiedDataModule, now: Clock) -> float:
    """Seconds per image of scoring one batch of test images, with whatever the data module serves."""
    module.eval()
    started = now()
    batch = next(iter(data.test_dataloader()))
    module.evaluate(move_data_to_device(batch, module.device))[""].image_scores.sum().item()
    return (now() - started) / len(batch["label"])


def count_macs(module: ReconstructionModule) -> dict[str, int]:
    """MACs of one image's forward pass through the backbone (with what precedes the network) and through the network."""
    module.eval()
    image = torch.zeros(1, 3, *module.image_size, device=module.device)
    with sdpa_kernel(SDPBackend.MATH):  # decomposes attention into products that the counter knows
        with FlopCounterMode(display=False) as backbone:
            features = module.features({"image": image})
        with FlopCounterMode(display=False) as network:
            module.reconstruct({"image": image, "features": features, "dataset": ["synthetic"]})
    return {"backbone": backbone.get_total_flops() // 2, "network": network.get_total_flops() // 2}


def profile_step(module: ReconstructionModule, data: UnifiedDataModule) -> list[tuple[str, float]]:
    """The operations that take most of one training step with cached features, and their share of its time."""
    batch = move_data_to_device(next(iter(data.train_dataloader())), module.device)
    module.train()
    with torch.profiler.profile() as profiler:
        module.batch_loss(batch).backward()
    key = "self_device_time_total" if module.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [(event.key, getattr(event, key) / total) for event in events[:8]]


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(method: str, options: Options, root: Path) -> dict[str, Any]:
    """All numbers of one method."""
    torch.manual_seed(0)
    now = time.perf_counter if options.clock == "wall" else time.process_time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, make, clip = prepare(method, options, root)
    module.to(device)
    plain = make()
    plain.setup("fit")
    with tempfile.TemporaryDirectory() as folder:
        starts = []
        for _ in range(4):
            ours, started = make(), now()
            attach(module, ours, CacheConfig(root=folder), device, build=True)
            starts.append(now() - started)
        built, opened = starts[0], min(starts[1:])  # the first one finds nothing
        train_ours(
            module, ours, 1, clip, options.precision, now
        )  # warms up, and makes what a method makes at its start
        peak = peak_memory(device)
        train_plainly(module, plain, 1, clip, now)
        times: dict[str, list[float]] = {"plain": [], "ours": [], "score_plain": [], "score_ours": []}
        for _ in range(options.rounds):
            times["plain"].append(train_plainly(module, plain, options.steps, clip, now))
            times["ours"].append(train_ours(module, ours, options.steps, clip, options.precision, now))
            times["score_plain"].append(score(module, plain, now))
            times["score_ours"].append(score(module, ours, now))
        size = _cache_bytes(folder)
        largest = profile_step(module, ours)
    images, macs = options.steps * plain.batch_size, count_macs(module)
    return {
        "method": method,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "batch_size": plain.batch_size,
        "image_size": list(module.image_size),
        "backbone": module.extractor.provenance["name"],
        "images": len(plain.table),
        "categories": len(plain.categories),
        "train_images_per_second": [images / t for t in times["ours"]],
        "train_ratio": [p / o for p, o in zip(times["plain"], times["ours"], strict=True)],
        "score_images_per_second": [1 / t for t in times["score_ours"]],
        "score_ratio": [p / o for p, o in zip(times["score_plain"], times["score_ours"], strict=True)],
        "peak_memory_bytes": peak,
        "trainable_parameters": sum(p.numel() for p in module.network.parameters() if p.requires_grad),
        "macs_per_image": macs,
        "flops_per_image": {name: 2 * value for name, value in macs.items()},
        "cache_bytes": size,
        # Seconds of reading, decoding and the backbone until training can start:
        "first_run_seconds": built,
        "next_run_seconds": opened,
        "sweep_seconds": built + (CELLS - 1) * opened,
        "separate_runs_seconds": CELLS * built,
        "largest_operations_of_a_step": largest,
    }


def _cache_bytes(folder: str) -> int:
    """Bytes of the arrays of all cache entries in a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*.npy"))


def measure_float16(method: str, options: Options, root: Path, epochs: int = 4) -> list[dict[str, Any]]:
    """Mean metrics after a short training with either cache, from the same seed, and the size of the caches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("float32", "float16"):
            before = _cache_bytes(folder)
            torch.manual_seed(0)
            module, make, clip = prepare(method, options, root)
            data, evaluation = make(), Evaluation()
            attach(module, data, CacheConfig(mode, folder), device, build=True)
            sizes[mode] = _cache_bytes(folder) - before
            trainer = _trainer(folder, EpochSeed(0), evaluation, max_epochs=epochs, gradient_clip_val=clip)
            trainer.fit(module, datamodule=data)
            trainer.test(module, datamodule=data, verbose=False)
            table = evaluation.result.table
            values[mode] = table[(table.scope == "mean") & (table.dataset == "")].set_index("metric").value
    names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_aupro", "dsc")
    rows = [{"metric": name, **{mode: float(values[mode][name]) for mode in values}} for name in names]
    return [*rows, {"metric": "cache_bytes", **sizes}]


def growth(options: Options) -> list[Options]:
    """The first method's options, then with four times the images, twice the categories, twice the image size."""
    first = replace(options, methods=options.methods[:1], rounds=1)
    config = yaml.safe_load((PROFILES / options.profile / f"{options.methods[0]}.yaml").read_text())
    size = options.image_size or config["model"]["init_args"].get("image_size", 224)
    changes: list[dict[str, Any]] = [
        {},
        {"images": 4 * options.images},
        {"categories": 2 * options.categories},
        {"image_size": 2 * size},
    ]
    return [replace(first, **change) for change in changes]


# ---- running and showing ---------------------------------------------------------------------------------------------


def in_own_process(task: str, method: str, options: Options, root: Path) -> Any:
    """Result of a function of this module in a process of its own, so that peak memory is the method's."""
    command = [sys.executable, "-m", "lightning_modules.benchmarks.training", "--in-own-process"]
    question = json.dumps([task, method, asdict(options), str(root)])
    done = subprocess.run([*command, question], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nThe measurement of {method} failed.")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(question: str) -> None:
    task, method, options, root = json.loads(question)
    warnings.filterwarnings("ignore")
    print("\n" + json.dumps(globals()[task](method, Options(**options), Path(root))))


def run(options: Options) -> dict[str, Any]:
    """Measures everything."""
    with tempfile.TemporaryDirectory() as folder:

        def root(o: Options) -> Path:
            plan = Plan(size=o.native, train=o.images, test=8, defects=1, categories=CATEGORIES[: o.categories])
            return generate(
                Path(folder) / f"{o.images}-{o.categories}", plan, workers=1
            )  # others would import all this

        jobs = [("measure", method, options) for method in options.methods]
        if not options.short:
            jobs += [("measure", o.methods[0], o) for o in growth(options)]
            jobs.append(("measure_float16", options.methods[0], options))
        shown = track(jobs, "Benchmark", console=Console(stderr=True), transient=True)
        results = [in_own_process(task, method, o, root(o)) for task, method, o in shown]
    rows = results[: len(options.methods)]
    commit, dirty = code_version()
    return {
        "device": rows[0]["device"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version()},
        "git_commit": commit,
        "git_dirty": dirty,
        "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
        "options": asdict(options),
        "methods": rows,
        "growth": [] if options.short else results[len(rows) : -1],
        "float16": [] if options.short else results[-1],
    }


def spread(values: list[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "method": lambda r: r["method"],
    "batch": lambda r: str(r["batch_size"]),
    "images": lambda r: str(r["images"]),
    "categories": lambda r: str(r["categories"]),
    "size": lambda r: "x".join(map(str, r["image_size"])),
    "train img/s": lambda r: spread(r["train_images_per_second"]),
    "x plain loop": lambda r: spread(r["train_ratio"]),
    "score img/s": lambda r: spread(r["score_images_per_second"]),
    "x plain scoring": lambda r: spread(r["score_ratio"]),
    "peak MiB": lambda r: f"{r['peak_memory_bytes'] / 2**20:.0f}",
    "parameters": lambda r: f"{r['trainable_parameters']:,}",
    "GMACs network": lambda r: f"{r['macs_per_image']['network'] / 1e9:.2f}",
    "GFLOPs network": lambda r: f"{r['flops_per_image']['network'] / 1e9:.2f}",
    "GMACs backbone": lambda r: f"{r['macs_per_image']['backbone'] / 1e9:.2f}",
    "GFLOPs backbone": lambda r: f"{r['flops_per_image']['backbone'] / 1e9:.2f}",
    "cache MiB": lambda r: f"{r['cache_bytes'] / 2**20:.1f}",
    "first run s": lambda r: f"{r['first_run_seconds']:.2f}",
    "next run s": lambda r: f"{r['next_run_seconds']:.3f}",
    f"{CELLS}-cell sweep s": lambda r: f"{r['sweep_seconds']:.2f}",
    "x one run": lambda r: f"{r['sweep_seconds'] / r['first_run_seconds']:.2f}",
    f"{CELLS} separate runs s": lambda r: f"{r['separate_runs_seconds']:.1f}",
}


def _table(title: str, columns: list[str], rows: list[Mapping[str, Any]], caption: str = "") -> Table:
    table = Table(title=title, caption=caption)
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(COLUMNS[name](row) for name in columns))
    return table


def tables(report: Mapping[str, Any]) -> list[Table]:
    """What was measured, for a person."""
    o, rows = report["options"], report["methods"]
    names = list(COLUMNS)
    pace = ["method", "batch", "size", *names[5:10]]
    start = ["method", "images", *names[15:]]
    made = [
        _table(
            f"Pace: {report['device']}, profile {o['profile']}, image files of {o['native']} pixels",
            pace,
            rows,
            f"median \\[range] of {o['rounds']} rounds of {o['steps']} steps; {o['clock']} time",
        ),
        _table("Work per image, forward", ["method", *names[10:15]], rows, "FLOPs = 2 x MACs"),
        _table("Data and backbone until training starts", start, rows, f"{o['clock']} time; a sweep shares one cache"),
    ]
    steps = Table(title="Largest operations of one training step with cached features")
    steps.add_column("method")
    steps.add_column("share of the step's time")
    for row in rows:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["largest_operations_of_a_step"])
        steps.add_row(row["method"], shares)
    made.append(steps)
    if report["growth"]:
        columns = ["images", "categories", "size", "train img/s", "peak MiB", "cache MiB", "first run s", "next run s"]
        made.append(_table(f"Growth: {report['growth'][0]['method']}", columns, report["growth"]))
    if report["float16"]:
        halves = Table(title=f"Cache in float16: {rows[0]['method']}, mean over categories, metrics in percent")
        for name in ("metric", "float32", "float16", "difference"):
            halves.add_column(name, justify="left" if name == "metric" else "right")
        for row in report["float16"]:
            values = row["float32"], row["float16"], row["float16"] - row["float32"]
            in_bytes = row["metric"] == "cache_bytes"
            name, factor = ("cache MiB", 2**-20) if in_bytes else (row["metric"], 100)
            halves.add_row(name, *(f"{factor * value:.2f}" for value in values))
        made.append(halves)
    return made


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--in-own-process"]:
        _answer(arguments[1])
        return
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.benchmarks.training",
        description=__doc__.replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default="", help="comma list (default: every method that trains)")
    parser.add_argument("--profile", default=defaults.profile, choices=("demo", "paper"))
    parser.add_argument(
        "--clock", default=defaults.clock, choices=("wall", "cpu"), help="cpu: on a machine that is not idle"
    )
    parser.add_argument("--augmentation", default=defaults.augmentation, help="an entry of datamodules.augmentation")
    parser.add_argument("--precision", default=defaults.precision, help="of our trainer, for example bf16-mixed")
    helps = {
        "images": "training images per category",
        "native": "side of the image files in pixels",
        "categories": "at most four",
        "image_size": "input size in pixels instead of the profile's",
        "steps": "training steps of a round",
        "rounds": "rounds of ours and of the plain loop",
    }
    for name, text in helps.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(defaults, name), help=f"{text} (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="without growth and float16")
    parser.add_argument(
        "--output", type=Path, default=Path("results/work/bench"), help="folder of bench.json and bench.txt"
    )
    given = vars(parser.parse_args(arguments))
    output, methods = given.pop("output"), given.pop("methods")
    report = run(Options(methods=parts(methods), **given))
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(json.dumps(report, indent=1))
    with open(output / "bench.txt", "w") as file:
        for console in (Console(), Console(file=file, width=180)):
            for table in tables(report):
                console.print(table)
    print(f"{output / 'bench.json'}, {output / 'bench.txt'}")


if __name__ == "__main__":
    main()
