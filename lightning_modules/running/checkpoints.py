"""Checkpoints that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from results.common.files import replacing


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

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
            part.write_bytes(content.getbuffer())
