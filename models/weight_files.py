"""Reading other people's weight files, and saying precisely what does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Where training scripts nest the parameters inside a checkpoint, most specific first.
_NESTS = ("state_dict", "model_state_dict", "state_dict_ema", "model_state", "model", "net", "network", "backbone")

# Authors' checkpoints carry their best metric as a NumPy number, pickled by NumPy 1's name or NumPy 2's.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, or of any other as torch saved it, on the CPU.

    Looks through the usual nesting ("state_dict", "model", ...); a list of state dicts gives names "0.<name>", "1.<name>".
    Raises FileNotFoundError for a missing file and
    ValueError for one that cannot be read or holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The weight file {path} does not exist. Give a path to a .pth or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(str(path))
        else:
            with torch.serialization.safe_globals(_NUMPY_SCALARS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"The weight file {path} cannot be read as tensors ({type(error).__name__}: {error}). Give a .safetensors "
            "file, or a .pth file that holds a state dict rather than a pickled module."
        ) from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[name] for name in _NESTS if isinstance(content.get(name), (Mapping, list))), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = {f"{number}.{name}": value for number, part in enumerate(content) for name, value in part.items()}
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = f"the keys {few(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"The weight file {path} holds no named tensors; found {found}.")
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError naming the tensors that hold NaN or infinity."""
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{where} holds NaN or infinity in {few(broken)}. The file is damaged; get it again.")


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError unless `found` has every name of `wanted`, in the same shape."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{where} lacks {len(missing)} of the network's {len(wanted)} tensors: {few(missing)}. "
            "The network must be built as the file's was (same backbone, widths, layers and grid)."
        )
    wrong = [
        f"{name} is {tuple(found[name].shape)} in the file, {tuple(value.shape)} in the network"
        for name, value in wanted.items()
        if found[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit the network: {len(wrong)} tensors differ in shape: {few(wrong, 3)}.")


def few(names: Iterable[str], shown: int = 6) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    text = ", ".join(names[:shown])
    return f"{text} and {len(names) - shown} more" if len(names) > shown else text


def file_sha256(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """One digest of names, dtypes, shapes and values, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
