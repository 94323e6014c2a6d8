"""Checkpoints that are whole or not there, whatever happens while they are written, and that are read as data only."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from results.common.contents import file_hash
from results.common.files import replacing, write_text

PREVIOUS = "previous.ckpt"
"""Beside `last.ckpt`: the one before it."""
RECORDED = "recorded.txt"
"""Beside `last.ckpt`: the hash of the one whose run has its record."""


class CheckpointError(ValueError):
    """A file is not a checkpoint of this program."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; what stood there is kept as `PREVIOUS`.

    Lightning's own writer moves a file from the system's temporary folder. From another file system that is a copy over
    the last checkpoint, and a full disk or a killed process leaves a part of one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with replacing(path) as part:
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # whole before the last one is moved
            if path.is_file() and path.name == "last.ckpt":
                _keep(path)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Tensors and plain values only, whatever is asked for: a checkpoint may come from anywhere."""
        return read(path, map_location)


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, tensors and plain values; nothing in it is run.

    Raises:
        CheckpointError: the file is missing, cut off, empty, or no checkpoint; says which.
    """
    path = Path(path)
    if "://" in str(path) or ":/" in str(path) or not path.is_file():
        raise CheckpointError(
            f"{path} is not a file on this machine: give --ckpt_path the path of a checkpoint that has been trained here "
            "or fetched before."
        )
    what = ""
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
        if isinstance(content, dict):
            return content
        what = f"it holds a {type(content).__name__}, not a training's state"
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            what = "it asks for classes beyond tensors and plain values, which are not built"
        else:
            what = "it is cut off or damaged"
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError):
        what = "it is cut off or damaged"
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK":  # what torch saves is a zip file
        what = "torch did not save it" if start else "it is empty"
    raise CheckpointError(
        f"{path} cannot be read as a checkpoint: {what}. Delete it to begin anew, or give another one (--ckpt_path)."
    )


def newest_whole(last: Path) -> Path | None:
    """The checkpoint that a run goes on from: `last` if it is whole, else the one before; None if there is neither.

    Raises:
        CheckpointError: `last` is damaged, and no whole one lies beside it.
    """
    previous = last.with_name(PREVIOUS)
    if not last.is_file():
        return None
    try:
        _check(last)
    except CheckpointError as error:
        if not previous.is_file():
            raise
        _check(previous)
        rank_zero_info(f"{str(error).split('. Delete')[0]}. The one before it is used: {previous}.")
        return previous
    return last


def forget(last: Path) -> None:
    """Removes a checkpoint and what is kept beside it."""
    for file in (last, last.with_name(PREVIOUS), last.with_name(RECORDED)):
        file.unlink(missing_ok=True)


def note_recorded(last: Path) -> None:
    """Notes that the run of this checkpoint has its record, so that whoever overwrites it does not go on from it."""
    with contextlib.suppress(FileNotFoundError):
        write_text(last.with_name(RECORDED), file_hash(last))


def is_recorded(last: Path) -> bool | None:
    """Whether the checkpoint is that of a finished run; None if nothing was noted."""
    note = last.with_name(RECORDED)
    return note.read_text() == file_hash(last) if note.is_file() else None


def _check(path: Path) -> None:
    content = read(path)
    if missing := [key for key in ("state_dict", "trained_epochs") if key not in content]:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it lacks {' and '.join(missing)}, so it is another program's. Delete "
            "it to begin anew, or give another one (--ckpt_path)."
        )


def _keep(path: Path) -> None:
    with replacing(path.with_name(PREVIOUS)) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)
