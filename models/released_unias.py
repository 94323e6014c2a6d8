"""Import of the UniAS authors' checkpoints (github.com/Mwxinnn/UniAS), of the MVTec and of the VisA configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from torch import Tensor

from models.unias import UniASNetwork


def load_released(network: UniASNetwork, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill a network of all levels with the part of a released state dict whose names start with `prefix`.

    Raises KeyError for a name that the released code does not have or if the prefix matches nothing, and RuntimeError
    (PyTorch's own, naming the tensors) if names or shapes do not fit the network: for the released VisA configuration
    build it with `attention="spatial"`.
    """
    names = released_names(len(network.channels), len(network.pyramid.encoder))
    converted = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise KeyError(
                f'"{name}" is no name of a released UniAS checkpoint; the nearest is "{(near or list(names))[0]}".'
            )
        converted[names[name]] = value
    if not converted:
        raise KeyError(f'No name of the checkpoint starts with "{prefix}"; it has {", ".join(list(state)[:4])}, ...')
    network.load_state_dict(converted)


def released_names(levels: int = 4, encoder_layers: int = 3) -> dict[str, str]:
    """{released parameter name: name in `models.unias.UniASNetwork`} for a network of all its `levels`.

    The released code counts levels from the coarsest, from 0; only its pyramid counts them from the finest, from 1.
    """
    modules = dict(_modules(levels, encoder_layers))
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    for theirs, ours in _attentions(levels, encoder_layers):
        for kind in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            names[f"{theirs}.{kind}"] = f"{ours}.{kind}"
    without_bias = [f"pixel_decoder.adapter_{i}" for i in range(1, levels)]
    without_bias += [f"pixel_decoder.layer_{i}" for i in range(1, levels + 1)]
    for name in without_bias:
        del names[f"{name}.bias"]
    names["predictor.spatial_query_feat.weight"] = "query.table"
    names["predictor.spatial_query_embed.weight"] = "query_position"
    names["predictor.level_embed_src.weight"] = "level_embedding"
    return names


def _attentions(levels: int, encoder_layers: int) -> Iterator[tuple[str, str]]:
    for layer in range(encoder_layers):
        yield f"pixel_decoder.transformer.encoder.layers.{layer}.self_attn", f"pyramid.encoder.{layer}.attention.block"
    for index, level in enumerate(range(levels, 0, -1)):
        for branch in ("Spatial", "Channel"):
            theirs, ours = f"predictor.transformer_block.{index}.{branch}", f"transformers.{level}.{branch.lower()}"
            yield f"{theirs}CrossAttnLayer.multihead_attn", f"{ours}.cross.block"
            yield f"{theirs}SelfAttnLayer.self_attn", f"{ours}.own.block"


def _modules(levels: int, encoder_layers: int) -> Iterator[tuple[str, str]]:
    yield "pixel_decoder.input_proj", "pyramid.top_projection"
    yield f"pixel_decoder.layer_{levels}", "pyramid.top_output"
    for level in range(1, levels):
        for theirs, ours in (("adapter", "lateral"), ("layer", "output")):
            yield f"pixel_decoder.{theirs}_{level}", f"pyramid.{ours}.{level}.0"
            yield f"pixel_decoder.{theirs}_{level}.norm", f"pyramid.{ours}.{level}.1"
    for layer in range(encoder_layers):
        theirs, ours = f"pixel_decoder.transformer.encoder.layers.{layer}", f"pyramid.encoder.{layer}"
        yield f"{theirs}.norm1", f"{ours}.attention.norm"
        yield f"{theirs}.linear1", f"{ours}.feedforward.block.0"
        yield f"{theirs}.linear2", f"{ours}.feedforward.block.3"
        yield f"{theirs}.norm2", f"{ours}.feedforward.norm"

    yield "predictor.feature_projector", "query.guide"
    for layer in range(3):
        yield f"predictor.query_processor.channel_weight.agg.layers.{layer}", f"query.channel_weight.{2 * layer}"
    yield "predictor.query_processor.spatial_weight.conv", "query.spatial_weight"
    yield from _granularities("predictor.query_processor.adaptor", "query.fusion")
    yield "predictor.decoder_norm", "norm"
    for index, level in enumerate(range(levels, 0, -1)):
        if index:
            yield f"predictor.patch_embed.{index}.proj", f"patch_embeddings.{level}.patches"
        yield f"predictor.input_proj.{index}", f"patch_embeddings.{level}.projection"
        for branch in ("Spatial", "Channel"):
            theirs, ours = f"predictor.transformer_block.{index}.{branch}", f"transformers.{level}.{branch.lower()}"
            yield f"{theirs}CrossAttnLayer.norm", f"{ours}.cross.norm"
            yield f"{theirs}SelfAttnLayer.norm", f"{ours}.own.norm"
            yield f"{theirs}FFNLayer.linear1", f"{ours}.feedforward.block.0"
            yield f"{theirs}FFNLayer.linear2", f"{ours}.feedforward.block.3"
            yield f"{theirs}FFNLayer.norm", f"{ours}.feedforward.norm"
        yield from _granularities(f"predictor.layer_adaptors.{index}", f"hybrids.{level}")
        for step in range(3):
            yield f"predictor.out_agg.{index}.{step + 1}", f"heads.{level}.convolutions.{step}"


def _granularities(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for branch in range(4):
        for step in range(max(branch, 1)):
            suffix = f".{step}" if branch > 1 else ""
            yield f"{theirs}.conv{branch}{suffix}", f"{ours}.branches.{branch}.{step}"
