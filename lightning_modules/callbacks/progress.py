"""How far a training is: a file for the sweep runner, lines for a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.callbacks.history import History
from results.common.files import write_json


class Progress(L.Callback):
    """Writes `{"epoch": done, "epochs": all, "metrics": {...}}` to a file after every epoch, for the sweep runner."""

    def __init__(self, path: Path, history: History) -> None:
        self.path = path
        self.history = history

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {name: value for _, _, name, value in self.history.rows}
        write_progress(self.path, trainer.current_epoch + 1, trainer.max_epochs, metrics)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and self.path.is_file():
            run = self.path.parent.name
            rank_zero_info(f"Interrupted. The same options and --run.name={run} (make: RUN={run}) go on from here.")


class PlainProgress(L.Callback):
    """Where there is no terminal for a progress bar: a line on the first epoch, on the last, and every `seconds` between."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._begun = self._printed = 0.0
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        now, done = time.monotonic(), trainer.current_epoch + 1
        if now - self._printed < self.seconds and done < trainer.max_epochs:
            return
        self._printed = now
        seconds = round((now - self._begun) / (done - self._first) * (trainer.max_epochs - done))
        time_left = f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
        left = f"  about {time_left} left" if done < trainer.max_epochs else ""
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f"  train/loss {float(loss):.4g}"
        rank_zero_info(f"epoch {done} of {trainer.max_epochs}{shown}{left}")


def work_progress(
    trainer: L.Trainer, description: str, seconds: float = 30.0
) -> Callable[[Sequence[int]], Iterator[int]]:
    """Shows how far a long loop inside a training is: wraps its sequence.

    Where the trainer shows a progress bar the loop gets one below it; else there is a line when it begins and every
    `seconds`.
    """

    def track(steps: Sequence[int]) -> Iterator[int]:
        bar = getattr(trainer.progress_bar_callback, "progress", None)
        task = None if bar is None else bar.add_task(description, total=len(steps))
        if bar is None:
            rank_zero_info(description)
        begun = printed = time.monotonic()
        for done, step in enumerate(steps, 1):
            yield step
            now = time.monotonic()
            if bar is not None:
                bar.update(task, completed=done, refresh=now - printed > 0.5 or done == len(steps))
            elif now - printed > seconds:
                left = round((now - begun) / done * (len(steps) - done))
                rank_zero_info(f"{description}: {done:,} of {len(steps):,}, about {left} s left")
            if now - printed > (0.5 if bar is not None else seconds):
                printed = now
        if bar is not None:
            bar.remove_task(task)

    return track


def write_progress(path: Path, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
    """Writes the progress file of the sweep runner."""
    write_json(path, {"epoch": epoch, "epochs": epochs, "metrics": dict(metrics)})
