"""Loose groups of encoder and decoder layers (Dinomaly): a mean over layers answers for a mean over layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]


def layer_groups(groups: int | Sequence[Sequence[int]], layers: int) -> Groups:
    """Which layers are averaged, as positions 0 .. layers - 1.

    groups: a number of equal groups of neighbouring layers (1 = all in one, `layers` = layer to layer), or the groups
    themselves. Layers may be left out, none may stand twice in a group. Raises ValueError for anything else.
    """
    if isinstance(groups, int):
        if groups < 1 or layers % groups:
            raise ValueError(
                f"groups={groups} does not divide the {layers} layers into equal groups. Give a divisor of {layers}, or "
                "the groups themselves, for example [[0, 1], [2, 3]]."
            )
        size = layers // groups
        return tuple(tuple(range(start, start + size)) for start in range(0, layers, size))
    chosen = tuple(tuple(int(layer) for layer in group) for group in groups)
    if not chosen or any(not group or len(set(group)) < len(group) for group in chosen):
        raise ValueError(f"groups needs one or more lists of different layer positions, found {groups}.")
    if any(not 0 <= layer < layers for group in chosen for layer in group):
        raise ValueError(f"groups names positions 0 to {layers - 1} of the {layers} layers, found {groups}.")
    return chosen


def group_means(layers: Sequence[Tensor], groups: Groups) -> list[Tensor]:
    """The mean over the layers of each group; all tensors of one shape."""
    return [torch.stack([layers[layer] for layer in group]).mean(dim=0) for group in groups]


def means_suffice(groups: Groups, layers: int) -> bool:
    """Whether the mean over all layers is the mean of the groups' means: equal groups, every layer in exactly one."""
    return sorted(layer for group in groups for layer in group) == list(range(layers)) and (
        len({len(group) for group in groups}) == 1
    )
