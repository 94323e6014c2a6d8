"""The two kinds of files: how each is written, read back and run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.problems import number_of
from lightning_modules.exporting.graph import Scorer

KEY = "unirecon"
"""Of the JSON text in an ONNX file's metadata; in a file of torch.export it is `unirecon.json` among the extra files."""
INPUT = "images"
LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights; an ONNX file is one message of at most 2 GiB."""
Runner = Callable[[np.ndarray], list[np.ndarray]]
"""uint8 (B, height, width, 3) -> maps, unless the method has none, and image scores."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Of its name.
        program: What runs it.
        needs: Packages beyond requirements.txt.
        solves: Whether it can solve linear systems.
        convert: (program, names of its outputs) -> what is saved.
        save: (what is saved, metadata, path) -> None.
        open: path -> what runs the file, as another program would.
    """

    suffix: str
    program: str
    needs: tuple[str, ...]
    solves: bool
    convert: Callable[[torch.export.ExportedProgram, Sequence[str]], Any]
    save: Callable[[Any, Mapping[str, Any], Path], None]
    open: Callable[[Path], Runner]

    def check_packages(self) -> None:
        """Raises ValueError with the command that installs what is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise ValueError(
                f"An {self.suffix[1:]} file needs {number_of(len(self.needs), 'package')} beyond requirements.txt, of which "
                f"{', '.join(missing)} {are} not installed: make export-requirements."
            )


def traced(scorer: Scorer, images: Tensor, form: Format) -> torch.export.ExportedProgram:
    """The scorer's graph for a kind of file, for any number of images of the size of these, uint8 (N, height, width, 3)."""
    if not form.solves:
        scorer.module.avoid_solves()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), _without_autocast():
        scorer(images)  # what is computed once and kept is computed with numbers, not while tracing
        example = images[:1].repeat(2, 1, 1, 1)  # a batch of 1 could be taken for a constant
        return torch.export.export(scorer, (example,), dynamic_shapes={INPUT: {0: batch}}, strict=False)


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Leaves out the contexts that switch autocast off: nothing switches it on here, and a graph with them cannot be saved."""
    before, torch.autocast = torch.autocast, lambda *_, **__: contextlib.nullcontext()
    try:
        yield
    finally:
        torch.autocast = before


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def _to_onnx(program: torch.export.ExportedProgram, outputs: Sequence[str]) -> Any:
    if (size := _bytes_used(program)) > LARGEST_ONNX:
        raise ValueError(
            f"The run holds {size / 2**30:.1f} GiB of weights and memory, and an ONNX file at most 2: use FORMAT=torch, or a "
            "smaller memory bank."
        )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of what the optimiser leaves as it is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(program, dynamo=True, verbose=False, output_names=list(outputs))
    finally:
        logging.disable(disabled)


def _bytes_used(program: torch.export.ExportedProgram) -> int:
    """Of the weights and constants that the graph reads."""
    signature, values = program.graph_signature, {**program.state_dict, **program.constants}
    kinds = signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants
    names = {name: target for kind in kinds for name, target in kind.items()}
    return sum(values[names[node.name]].nbytes for node in program.graph.nodes if node.name in names and node.users)


def _save_onnx(made: Any, metadata: Mapping[str, Any], path: Path) -> None:
    made.model.metadata_props[KEY] = json.dumps(metadata, allow_nan=False)
    made.save(str(path), external_data=False)


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _save_torch(program: torch.export.ExportedProgram, metadata: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{KEY}.json": json.dumps(metadata, allow_nan=False)})


def _open_torch(path: Path) -> Runner:
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [part.numpy() for part in module(torch.from_numpy(images))]

    return run


FORMATS = {
    "onnx": Format(
        ".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), False, _to_onnx, _save_onnx, _open_onnx
    ),
    "torch": Format(".pt2", "torch.export", (), True, lambda program, outputs: program, _save_torch, _open_torch),
}
