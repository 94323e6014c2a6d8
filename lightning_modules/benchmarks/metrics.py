"""`python -m lightning_modules.benchmarks.metrics`: time, memory and error of these metrics and of others.

All methods get the same arrays, in interleaved rounds; the ratio of a round is that method's time by ours in the same
round. Memory is measured in a process of its own, above the arrays it is given (Linux). Methods whose package is not
installed are left out. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lightning_modules.metrics import AnomalyMetrics

BATCH = 32
Numbers = dict[str, float]


def make_category(seed: int, images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 (N, size, size) like feature distances, and masks: 3 of 4 images, about 3 % of pixels anomalous."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.gamma(2, 1, (images, 1, 14, 14)).astype(np.float32) + 0.3)
    maps = functional.interpolate(coarse, size=(size, size), mode="bilinear")[:, 0].numpy()
    masks = np.zeros(maps.shape, dtype=bool)
    for i in range(3 * images // 4):
        for _ in range(rng.integers(1, 3)):
            h, w = rng.integers(size // 12, size // 4, 2)
            y, x = rng.integers(0, size - h), rng.integers(0, size - w)
            masks[i, y : y + h, x : x + w] = True
        maps[i][masks[i]] *= rng.uniform(1, 3)
    return maps, masks


def ours(maps: np.ndarray, masks: np.ndarray, **options: Any) -> Numbers:
    metrics = AnomalyMetrics(["category"], pooled=False, **options)
    feed(metrics, maps, masks, "category", 0)
    result = metrics.compute()
    return {name: result.value(name, "category") for name in ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")}


def feed(metrics: AnomalyMetrics, maps: np.ndarray, masks: np.ndarray, category: str, first_id: int) -> None:
    for start in range(0, len(maps), BATCH):
        batch, truth = maps[start : start + BATCH], masks[start : start + BATCH]
        ids = np.arange(start, start + len(batch)) + first_id
        scores, labels = batch.max(axis=(1, 2)), truth.any(axis=(1, 2)).astype(int)
        metrics.update(batch, truth, scores, labels, [category] * len(batch), ids)


def sklearn_three(maps: np.ndarray, masks: np.ndarray) -> Numbers:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    labels, scores = masks.reshape(-1), maps.reshape(-1)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {
        "pixel_auroc": roc_auc_score(labels, scores),
        "pixel_ap": average_precision_score(labels, scores),
        "pixel_f1max": f1.max(),
    }


def torchmetrics_exact(maps: np.ndarray, masks: np.ndarray) -> Numbers:
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    scores, labels = torch.from_numpy(maps).reshape(-1), torch.from_numpy(masks).reshape(-1).long()
    return {
        "pixel_auroc": float(binary_auroc(scores, labels)),
        "pixel_ap": float(binary_average_precision(scores, labels)),
    }


def anomalib_aupro(maps: np.ndarray, masks: np.ndarray) -> Numbers:
    from anomalib.metrics.aupro import _AUPRO

    metric = _AUPRO(fpr_limit=0.3)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks).long())
    return {"pixel_aupro": float(metric.compute())}


def adeval_1000(maps: np.ndarray, masks: np.ndarray) -> Numbers:
    from adeval import EvalAccumulator

    if not hasattr(np, "trapz"):  # ADEval 1.1 needs the name that numpy 2.4 dropped
        vars(np)["trapz"] = np.trapezoid
    low, high = float(maps.min()), float(maps.max())
    accumulator = EvalAccumulator(low, high, low, high, nstrips=1000)
    accumulator.add_anomap_batch(maps, masks.astype(np.uint8))
    with np.errstate(invalid="ignore"):  # no image scores were given
        values = accumulator.summary()
    return {"pixel_auroc": values["p_auroc"], "pixel_ap": values["p_aupr"], "pixel_aupro": values["p_aupro"]}


METHODS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], Numbers]]] = {
    "ours, every metric": ("numpy", ours),
    "scikit-learn AUROC + AP + F1-max": ("sklearn", sklearn_three),
    "torchmetrics AUROC + AP": ("torchmetrics", torchmetrics_exact),
    "anomalib AUPRO": ("anomalib", anomalib_aupro),
    "ADEval AUROC + AP + AUPRO, 1000 bins": ("adeval", adeval_1000),
}


COUNTED = Path("/proc/self/clear_refs").exists()
"""Whether this system tells a process how much memory it uses and has used at most."""


def memory(field: str) -> float:
    """MB of a field of /proc/self/status; only where memory is `COUNTED`."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let the kernel measure the highest memory from now on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_memory(method: str, images: int, size: int) -> str:
    """MB that a method needs above its arrays, measured in this (fresh) process."""
    function = METHODS[method][1]
    function(*make_category(1, 4, size))  # imports and warm-up
    maps, masks = make_category(0, images, size)
    if not COUNTED:
        return "-"
    before = memory("VmRSS")
    forget_peak()
    function(maps, masks)
    extra = memory("VmHWM") - before
    return f"{extra - maps.nbytes / 2**20:.0f} + maps" if method.startswith("ours") else f"{extra:.0f}"


def compare(images: int, size: int, rounds: int) -> str:
    """The table of one category."""
    methods = {name: f for name, (package, f) in METHODS.items() if importlib.util.find_spec(package)}
    maps, masks = make_category(0, images, size)
    times: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    values: dict[str, Numbers] = {}
    for _ in range(rounds):
        for name, function in methods.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            values[name] = function(maps, masks)
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    first = next(iter(methods))
    exact = values[first] | values.get("scikit-learn AUROC + AP + F1-max", {})
    metrics = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
    lines = [
        f"{images} maps of {size}x{size}, {100 * masks.mean():.1f} % anomalous pixels, {rounds} rounds",
        "",
        "| method | best s | best CPU s | times ours (median, range) | extra MB | error AUROC | AP | F1-max | AUPRO |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in methods:
        ratios = sorted(t / o for t, o in zip(times[name], times[first], strict=True))
        command = [sys.executable, "-m", __spec__.name, "--memory-of", name]
        command += ["--images", str(images), "--size", str(size)]
        extra = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        errors = [f"{values[name][m] - exact[m]:+.0e}" if m in values[name] else "" for m in metrics]
        ratio = f"{ratios[len(ratios) // 2]:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        lines.append(
            f"| {name} | {min(times[name]):.3f} | {min(cpu[name]):.3f} | {ratio} | {extra} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def whole_set(categories: int, images: int, size: int, rounds: int) -> str:
    """A data set of several categories, per category and pooled, by ours alone; run in a fresh process."""
    names = [f"category {i}" for i in range(categories)]
    ours(*make_category(1, 4, size))
    metrics = AnomalyMetrics(dict.fromkeys(names, "set"))
    pixels, updates, computes, cpu = 0, [], [], []
    before = memory("VmRSS") if COUNTED else 0.0
    used = ""
    for turn in range(rounds):
        metrics.reset()  # the labelled regions stay
        updates.append(0.0)
        for number, name in enumerate(names):
            maps, masks = make_category(number, images, size)
            pixels += maps.size if turn == 0 else 0
            start = time.perf_counter()
            feed(metrics, maps, masks, name, images * number)
            updates[-1] += time.perf_counter() - start
            del maps, masks
        if COUNTED:
            held = memory("VmRSS")
            forget_peak()
        start, start_cpu = time.perf_counter(), time.process_time()
        metrics.compute()
        computes.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        if turn == 0 and COUNTED:
            extra, state = memory("VmHWM") - held, held - before - pixels * 4 / 2**20
            used = f", {extra:.0f} MB in compute, {state:.0f} MB in the state (allocator included)"
    return (
        f"{categories * images} maps of {size}x{size} in {categories} categories ({pixels / 1e6:.1f} M pixels), every "
        f"metric per category, mean and pooled: update {updates[0]:.2f} s (with labelled "
        f"regions {min(updates[1:], default=updates[0]):.2f} s), compute {min(computes):.2f} s "
        f"(CPU {min(cpu):.2f} s; the first {computes[0]:.2f} s); above the maps ({pixels * 4 / 2**20:.0f} MB){used}"
    )


def machine() -> str:
    """What the numbers were measured on, and how busy it was."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    return f"{date.today()}, {os.cpu_count()} x {model}{load}; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.benchmarks.metrics", description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="maps of one category")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--categories", type=int, default=15, help="of the whole set, with 115 maps each; 0 = leave out"
    )
    parser.add_argument("--memory-of", choices=list(METHODS), help="print the memory of one method only")
    parser.add_argument("--whole-set-only", action="store_true", help="print the line of the whole set only")
    args = parser.parse_args()
    if args.memory_of:
        print(measure_memory(args.memory_of, args.images, args.size))
    elif args.whole_set_only:
        print(whole_set(args.categories, 115, args.size, args.rounds))
    else:
        print(machine(), "\n")
        print(compare(args.images, args.size, args.rounds), "\n")
        if args.categories:
            command = [sys.executable, "-m", __spec__.name, "--whole-set-only", "--categories", str(args.categories)]
            subprocess.run([*command, "--size", str(args.size), "--rounds", str(args.rounds)], check=True)


if __name__ == "__main__":
    main()
