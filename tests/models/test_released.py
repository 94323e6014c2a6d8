import numpy as np
import pytest
import torch

from models.released import load_released
from models.shortcut import shortcut_network
from models.uniad import UniAD

RENAMED = {
    "position.": "pos_embed.",
    "input_projection.": "input_proj.",
    "output_projection.": "output_proj.",
    "norm.": "transformer.decoder.norm.",
    "encoder.": "transformer.encoder.layers.",
    "decoder.": "transformer.decoder.layers.",
    ".attention.": ".self_attn.",
    ".attention1.": ".self_attn.",
    ".attention2.": ".multihead_attn.",
    ".feedforward.": ".",
}


def small() -> UniAD:
    return UniAD([6], [(4, 5)], d_model=8, heads=2, feedforward=12, encoder_layers=1, decoder_layers=2, neighbor_size=1)


def released_state(network: UniAD, prefix: str = "") -> dict[str, torch.Tensor]:
    state = {}
    for name, value in network.state_dict().items():
        for ours, theirs in RENAMED.items():
            if ours.startswith("."):
                name = name.replace(ours, theirs)
            elif name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                if ours in ("encoder.", "decoder."):
                    name = name.replace(".query", ".learned_embed.weight")
        state[prefix + name] = value.clone()
    return state


@pytest.mark.parametrize("prefix", ["", "module.reconstruction.", "reconstruction_"])
def test_a_checkpoint_is_imported_whole_under_any_prefix(tmp_path, prefix):
    source, target = small(), small()
    state = released_state(source, prefix)
    torch.save({"epoch": 999, "best_metric": np.float64(0.97), "state_dict": state}, tmp_path / "ckpt.pth.tar")
    imported = load_released(target, tmp_path / "ckpt.pth.tar")
    assert imported.prefix == prefix
    assert sorted(imported.used) == sorted(state)
    assert imported.unused == []
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_what_was_not_used_is_named():
    state = released_state(small(), "module.reconstruction.") | {"module.backbone._conv_stem.weight": torch.zeros(3)}
    imported = load_released(small(), state)
    assert imported.unused == ["module.backbone._conv_stem.weight"]
    assert "module.backbone._conv_stem.weight" in str(imported)


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    missing = released_state(small())
    missing.pop("transformer.decoder.layers.1.norm3.bias")
    misshapen = released_state(small()) | {"pos_embed.row_embed.weight": torch.zeros(14, 4)}
    broken = released_state(small())
    broken["input_proj.bias"] = broken["input_proj.bias"] + float("inf")
    for state, message in (
        (missing, r"lacks 1 .*decoder\.1\.norm3\.bias"),
        (misshapen, r"position\.row_embed\.weight is \(14, 4\) in the file, \(4, 4\) in the network"),
        (broken, r"infinity in input_proj\.bias"),
        ({"featae.conv1.weight": torch.zeros(2)}, "no parameter of UniAD"),
    ):
        with pytest.raises(ValueError, match=message):
            load_released(network, state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_without_authors_names_is_refused():
    with pytest.raises(ValueError, match="no function `released_name`"):
        load_released(shortcut_network("mlp", [2], [(2, 2)], hidden=4), {})
