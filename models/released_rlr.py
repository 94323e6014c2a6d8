"""Import of the RLR authors' checkpoints: from the released state dict of one level to that of `rlr.LevelNetwork`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from models.rlr import LevelNetwork

# Released name -> ours. Every released key must match exactly one line.
RELEASED_NAMES = (
    (r"ref_mca", "reference"),
    (r"embedding\.project_embedding\.project\.(weight|bias)", r"embedding.project.\1"),
    (r"ref_mca_embedding\.project_embedding\.project\.(weight|bias)", r"reference_embedding.project.\1"),
    (r"encoder\.encode_layers\.(\d+)\.mca\.(.+)", r"layers.\1.attention.lca.\2"),
    (r"encoder\.encode_layers\.(\d+)\.nsa\.(.+)", r"layers.\1.attention.mlka.\2"),
    (r"encoder\.encode_layers\.(\d+)\.(ca|msa|sa)\.(.+)", r"layers.\1.attention.\2.\3"),
    (r"encoder\.encode_layers\.(\d+)\.(norm[12])\.(weight|bias)", r"layers.\1.\2.\3"),
    (r"encoder\.encode_layers\.(\d+)\.ffn\.fc1\.(weight|bias)", r"layers.\1.ffn.0.\2"),
    (r"encoder\.encode_layers\.(\d+)\.ffn\.fc2\.(weight|bias)", r"layers.\1.ffn.2.\2"),
    (r"encoder\.norm\.(weight|bias)", r"norm.\1"),
    (r"encoder\.gate", "fusion.theta"),
    (r"projection\.(weight|bias)", r"projection.\1"),
)


def load_released_level(network: LevelNetwork, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill one level's network with the part of a released state dict whose names start with `prefix`.

    The K references, (1, K * L, C) in the release, become (K, L, C), and the 1x1 convolutions' weights (d, C, 1)
    become (d, C). The released switch `blocks_gate net` is not imported: its names are not published.
    Raises KeyError for a name that no rule knows or if the prefix matches nothing, and RuntimeError (PyTorch's own,
    naming the tensors) if names or shapes do not fit the network.
    """
    converted = {}
    for released, value in state.items():
        if not released.startswith(prefix):
            continue
        name = _our_name(released.removeprefix(prefix))
        if name == "reference":
            value = value.reshape(-1, network.embedding.position.shape[0], value.shape[-1])
        elif name.endswith("embedding.project.weight"):
            value = value.squeeze(-1)
        converted[name] = value
    if not converted:
        raise KeyError(f'No name of the checkpoint starts with "{prefix}"; it has {", ".join(list(state)[:4])}, ...')
    network.load_state_dict(converted)


def _our_name(released: str) -> str:
    for pattern, ours in RELEASED_NAMES:
        match = re.fullmatch(pattern, released)
        if match:
            return match.expand(ours)
    raise KeyError(
        f'"{released}" is no name of a released RLR level; such names look like '
        '"encoder.encode_layers.0.mca.in_proj_weight". Import a checkpoint of several levels level by level, by prefix.'
    )
