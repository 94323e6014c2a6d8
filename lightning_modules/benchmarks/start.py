"""What it costs a run's start that data is known by its contents: `make bench-start`.

A tree of small files is written, and the way from its names to the first training batch is timed in processes of their
own, in interleaved rounds: with nothing remembered of the files' contents (cold), with all remembered (warm), and with
sizes in the place of hashes (names only), which is what the start costs without them. A ratio is taken within a round.
Imports and the backbone do not count. The files lie in the system's page cache, as they do after they were written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from datamodules import DatasetConfig, UnifiedDataModule, sample_table
from results.common import contents

SIDE = 16  # pixels
STATES = ("names only", "cold", "warm")


def write_tree(root: Path, files: int) -> None:
    """Different images of one category: nine in ten for training, the others normal ones for the test."""
    rng = np.random.default_rng(0)
    for number in range(files):
        folder = root / "part" / ("test" if number % 10 == 9 else "train") / "good"
        if number in (0, 9):
            folder.mkdir(parents=True)
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        (folder / f"{number:06d}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())


def first_batch(root: Path, state: str) -> dict[str, float]:
    """Seconds of this process and of the clock from the names to the first training batch, and the peak memory in MB."""
    if state == "names only":
        sample_table.content_hashes = lambda paths, root: [str(os.stat(path).st_size) for path in paths]
    clock, work = time.perf_counter(), time.process_time()
    data = UnifiedDataModule([DatasetConfig("folder", str(root))], SIDE, "pil_bilinear", 16, num_workers=0)
    data.setup("fit")
    if state != "names only":  # what is said of test images that are trained on compares contents, too
        data.remarks()
    next(iter(data.train_dataloader()))
    seconds = {"wall": time.perf_counter() - clock, "cpu": time.process_time() - work}
    return seconds | {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(root: Path, state: str, folder: Path) -> dict[str, float]:
    """`first_batch` in a process of its own that remembers contents below `folder`."""
    if state == "cold":
        shutil.rmtree(folder / contents.MEMORY, ignore_errors=True)
    command = [sys.executable, "-m", __spec__.name, "--process", state, str(root)]
    variables = os.environ | {"PYTHONPATH": os.getcwd()}
    output = subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.benchmarks.start", description=__doc__)
    parser.add_argument("--files", type=int, default=60000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--process", nargs=2, metavar=("STATE", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        print(json.dumps(first_batch(Path(options.process[1]), options.process[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_tree(root, options.files)
        time.sleep(contents.RECENT / 1e9)  # younger files are not remembered
        found: dict[str, list[dict[str, float]]] = {state: [] for state in STATES}
        for _ in range(options.rounds):
            for state in STATES:
                found[state].append(measure(root, state, Path(folder)))
    print(f"{options.files} files, median [range] of {options.rounds} rounds\n")
    print("| contents | CPU seconds | seconds | CPU times names only | peak MB |\n|---|---:|---:|---:|---:|")
    for state, rounds in found.items():
        ratios = [one["cpu"] / names["cpu"] for one, names in zip(rounds, found["names only"], strict=True)]
        columns = [[one["cpu"] for one in rounds], [one["wall"] for one in rounds], ratios]
        cells = [f"{statistics.median(c):.2f} [{min(c):.2f}, {max(c):.2f}]" for c in columns]
        print(f"| {state} | {' | '.join(cells)} | {statistics.median(one['mb'] for one in rounds):.0f} |")


if __name__ == "__main__":
    main()
