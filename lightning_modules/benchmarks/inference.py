"""What scoring photographs costs with a trained run: `make bench-inference RUN=mine`.

The graph that `make export` writes, from the resized image to map and score, in float32: as PyTorch runs it, compiled by
torch.compile, and as an ONNX file in onnxruntime. Each is measured in a process of its own, in interleaved rounds, on one
image and on a batch. Decoding and resizing photographs is not counted. Peak memory is the largest resident memory of
the process, imports and compiler included, or what the device held at most.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_modules.benchmarks.training import peak_memory, spread
from lightning_modules.exporting.formats import FORMATS, traced
from lightning_modules.exporting.graph import Scorer
from lightning_modules.running.finding import find_run
from lightning_modules.running.loading import load_run
from lightning_modules.running.settings import code_version
from results.common import trouble

ENGINES = ("torch", "compiled", "onnxruntime")
BATCHES = (1, 32)
WARM_UP = 3
SECONDS = 2.0
"""A round lasts about so long, and has at least `LEAST` calls."""
LEAST = 5
WIDTH = 80
"""Of the table, in characters."""


def obstacle(engine: str) -> str:
    """Why an engine cannot run on this machine; empty where it can."""
    if engine == "compiled" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler, and none is on PATH"
    missing = [name for name in FORMATS["onnx"].needs if importlib.util.find_spec(name) is None]
    if engine == "onnxruntime" and missing:
        return f"{', '.join(missing)} not installed (make export-requirements)"
    return ""


def measure(engine: str, run: str, category: str, batch: int) -> dict[str, Any]:
    """Milliseconds of each call on a batch of noise, and the peak memory in bytes; in this process."""
    model = load_run(run, category=category or None)
    device = torch.device("cuda" if torch.cuda.is_available() and engine != "onnxruntime" else "cpu")
    scorer = Scorer(model).to(device).eval()
    images = torch.randint(256, (batch, *model.preparation.size, 3), dtype=torch.uint8).to(device)
    started = time.perf_counter()
    with torch.inference_mode():
        score = _prepared(engine, scorer, images)
        for _ in range(WARM_UP):
            score()
        ready = time.perf_counter() - started
        taken: list[float] = []
        while len(taken) < LEAST or sum(taken) < 1000 * SECONDS:
            before = time.perf_counter()
            score()
            taken.append(1000 * (time.perf_counter() - before))
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"milliseconds": taken, "ready": ready, "peak": peak_memory(device), "device": place}


def _prepared(engine: str, scorer: Scorer, images: Tensor) -> Callable[[], Any]:
    if engine == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            file = Path(folder) / "run.onnx"
            form = FORMATS["onnx"]
            form.save(form.convert(traced(scorer, images, form), scorer.outputs), {}, file)
            run = form.open(file)
        pixels = images.numpy()
        return lambda: run(pixels)
    compiled = torch.compile(scorer, dynamic=False) if engine == "compiled" else scorer
    return lambda: compiled(images)[-1].sum().item()  # waits for the device


def in_own_process(engine: str, run: str, category: str, batch: int) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, "-m", __spec__.name, "--in-own-process", json.dumps([engine, run, category, batch])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return {"reason": last}
    return json.loads(done.stdout.splitlines()[-1])


def report(run: Path, category: str, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measures everything; a row per engine and batch."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(rounds):
        for engine in ENGINES:
            for batch in batches:
                why = obstacle(engine)
                found = {"reason": why} if why else in_own_process(engine, str(run), category, batch)
                row = rows.setdefault((engine, batch), {"engine": engine, "batch": batch, "latency": [], "peak": 0})
                if "reason" in found:
                    row["reason"] = found["reason"]
                    continue
                row["latency"].append(statistics.median(found["milliseconds"]))
                row["peak"] = max(row["peak"], found["peak"])
                row["ready"], row["device"] = found["ready"], found["device"]
    commit, dirty = code_version()
    return {
        "run": str(run),
        "category": category,
        "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: _version(name) for name in ("torch", "onnxruntime")},
        "git_commit": commit,
        "git_dirty": dirty,
        "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
        "rows": list(rows.values()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def table(found: dict[str, Any]) -> Table:
    """What was measured, for a person."""
    rows = found["rows"]
    devices = sorted({row["device"] for row in rows if "device" in row})
    caption = [
        f"Median \\[range] of {found['rounds']} rounds' median calls; resized images to maps and scores, float32."
    ]
    caption += dict.fromkeys(f"{row['engine']}: {escape(row['reason'])}" for row in rows if not row["latency"])
    shown = Table(title=f"Scoring with {escape(found['run'])}: {'; '.join(devices)}", caption="\n".join(caption))
    for name in ("engine", "batch", "ms per batch", "images/s", "peak MiB", "ready s"):
        shown.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for row in rows:
        if not row["latency"]:
            shown.add_row(row["engine"], str(row["batch"]), *4 * ["-"])
            continue
        latency = statistics.median(row["latency"])
        cells = (
            spread(row["latency"], 1 if latency < 100 else 0),
            f"{1000 * row['batch'] / latency:.1f}",
            f"{row['peak'] / 2**20:.0f}",
            f"{row['ready']:.1f}",
        )
        shown.add_row(row["engine"], str(row["batch"]), *map(escape, cells))
    return shown


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.benchmarks.inference", description=__doc__)
    parser.add_argument("--run", help="name or record folder of a finished run")
    parser.add_argument("--category", default="", help="which model of a run with one per category")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images per call (default: 1 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("results/work/bench"), help="folder of inference.json and .txt"
    )
    parser.add_argument("--in-own-process", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_own_process:
        warnings.filterwarnings("ignore")
        print("\n" + json.dumps(measure(*json.loads(options.in_own_process))))
        return
    if min(*options.batches, options.rounds) < 1:
        parser.error("--batches and --rounds must be at least 1.")
    record = find_run(options.run or "")
    Scorer(load_run(record, category=options.category or None))  # a method without a graph is refused at once
    found = report(record, options.category, options.batches, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "inference.json").write_text(json.dumps(found, indent=1))
    with open(options.output / "inference.txt", "w") as file:
        for console in (Console(), Console(file=file, width=WIDTH)):
            console.print(table(found))
    print(f"{options.output / 'inference.json'}, {options.output / 'inference.txt'}")


if __name__ == "__main__":
    main()
