"""A stand-in for the training program: same arguments, work files and run record, in milliseconds.

Its dotted keys steer it: `model.epochs`, `model.nap` (seconds per epoch), `model.end` (ok, fail, full, silent, kill,
hang, leave), `model.wandb` (report to W&B).
"""

import ctypes
import errno
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

arguments = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
sweep, run = arguments["run.sweep"], arguments.get("run.name") or os.environ["WANDB_RUN_ID"]
work = Path("results/work") / sweep / run
checkpoint = work / "checkpoints" / "last.json"
epochs, nap, end = int(arguments.get("model.epochs", 3)), float(arguments.get("model.nap", 0)), arguments["model.end"]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


if end == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if end == "leave":
    # Lightning leaves in order when it is told to stop, with code 0.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
tracked: Any = None  # W&B's run
asked = False


class Asked(Exception):
    """SIGTERM came, and W&B can be told."""


def note(number: int, frame: object) -> None:
    """Like the training program: before W&B knows the run, SIGTERM is only noted."""
    global asked
    asked = True
    if tracked:
        raise Asked


def main() -> None:
    global tracked
    if arguments.get("model.wandb") == "True":
        signal.signal(signal.SIGTERM, note)
        if "WANDB_SWEEP_ID" in os.environ:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # SIGTERM when the agent dies
        import wandb

        run_of_wandb = wandb.init(resume="allow", dir=str(work.parent))
        tracked = run_of_wandb
        if asked:
            raise Asked
    work.mkdir(parents=True, exist_ok=True)
    busy = (work / "busy").open("w")
    fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two processes on one cell are an error
    with (work / "starts.txt").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    history = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    print(f"starting at epoch {len(history)}", flush=True)
    for epoch in range(len(history), epochs):
        time.sleep(nap)
        history.append(f"{arguments.get('seed_everything', 0)}/{epoch}")
        if tracked:
            tracked.log({"epoch": epoch})
        write(checkpoint, history)
        write(
            work / "progress.json",
            {"epoch": epoch + 1, "epochs": epochs, "metrics": {"train/loss": 0.5}},
        )
    if end == "fail":
        raise ValueError("the loss is not finite")
    if end == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{checkpoint}")
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while end == "hang":
        time.sleep(0.05)
    if end != "silent":
        names = ("CUDA_VISIBLE_DEVICES", "WANDB_MODE", "WANDB_RUN_GROUP", "WANDB_RUN_ID", "OMP_NUM_THREADS", "WEIGHTS")
        record = {
            "run": run,
            "history": history,
            "arguments": sys.argv[1:],
            "environment": {name: os.environ.get(name) for name in names},
            "sweep_parameters": Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text(),
        }
        write(Path("results/runs") / sweep / run / "record.json", record)
    if tracked:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tracked.finish()


try:
    main()
except Asked:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tracked.mark_preempting()
    tracked.finish(exit_code=143)
    sys.exit(143)
