"""Import of the authors' checkpoints.

A method's file says how the authors' parameter names translate: a module-level function

    def released_name(name: str) -> str | None

from their name (without any wrapping prefix such as `module.reconstruction.`) to the network's, None where it has none.
`load_released` finds that function beside the network's class; a new method needs no entry here. What a checkpoint
keeps outside parameters and buffers of the network's own form (ULSAD's statistics) is taken by a second, optional one:

    def import_released_extras(network, state) -> list[str]

given the authors' state dict without the prefix; it returns the names that it used. Where the authors' files hold a part of
the network only (Patch SVDD's encoder),

    def released_part(network) -> nn.Module

names it; the names of `released_name` are then those of the part.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from models.weight_files import check_finite, check_fit, few, read_state_dict


class Imported(NamedTuple):
    """prefix: what was taken off the authors' names; used, unused: their names in full."""

    prefix: str
    used: list[str]
    unused: list[str]

    def __str__(self) -> str:
        text = f"{len(self.used)} tensors imported"
        return f"{text}, {len(self.unused)} not used: {few(self.unused)}" if self.unused else f"{text}, none left over"


def renamed(name: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    """The name after the first replacement whose pattern fits its beginning; None if none does.

    Args:
        name: The authors' name of a tensor.
        patterns: Regular expressions, each with its replacement as `re.sub` takes it.
    """
    for pattern, replacement in patterns:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


def load_released(network: nn.Module, checkpoint: str | Path | Mapping[str, Tensor]) -> Imported:
    """Load an authors' checkpoint (a file, or its state dict) into the network, completely or not at all.

    Every tensor of the network's state dict must be found with its shape (axes of length 1 aside: a 1x1 convolution may
    be a linear layer here); counters of batch norm may be missing. Names that the network has no place for, such as the
    backbone's, are listed as unused. Raises ValueError for a missing or misshapen tensor, NaN, or a network
    whose file tells no names.
    """
    network = getattr(sys.modules[type(network).__module__], "released_part", lambda whole: whole)(network)
    translate: Callable[[str], str | None] | None = getattr(
        sys.modules[type(network).__module__], "released_name", None
    )
    if translate is None:
        raise ValueError(
            f"{type(network).__module__} has no function `released_name`, so authors' checkpoints cannot be imported "
            f"into {type(network).__name__}."
        )
    source = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_state_dict(checkpoint)
    where = "The released checkpoint" if isinstance(checkpoint, Mapping) else f"The released checkpoint {checkpoint}"
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}

    best: dict[str, str] = {}
    best_prefix = ""
    for prefix in _prefixes(list(source)):
        names = {}
        for name in source:
            if name.startswith(prefix) and (own := translate(name.removeprefix(prefix))) in state:
                names[own] = name
        if len(names) > len(best):
            best, best_prefix = names, prefix
    if not best:
        raise ValueError(
            f"{where} has no parameter of {type(network).__name__}. It holds {few(source, 4)}. Is it another method's?"
        )
    wanted = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked") or name in best}
    found = {}
    for own, name in best.items():
        value, shape = source[name], state[own].shape
        without_ones = [length for length in value.shape if length != 1]
        fits = without_ones == [length for length in shape if length != 1]
        found[own] = value.reshape(shape) if fits else value
    check_fit(found, wanted, where)
    check_finite({best[own]: value for own, value in found.items()}, where)
    network.load_state_dict(found, strict=False)
    used = set(best.values())
    if extras := getattr(sys.modules[type(network).__module__], "import_released_extras", None):
        within = {n.removeprefix(best_prefix): value for n, value in source.items() if n.startswith(best_prefix)}
        used |= {best_prefix + name for name in extras(network, within)}
    return Imported(best_prefix, sorted(used), [name for name in source if name not in used])


def _prefixes(names: list[str]) -> list[str]:
    """What may have been put before the authors' names: shortest first."""
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 4)))
    first, last = min(names), max(names)  # what these share, all names share
    for length, (one, other) in enumerate(zip(first, last, strict=False), 1):
        if one != other:
            break
        prefixes.add(first[:length])
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
