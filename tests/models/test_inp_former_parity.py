"""INP-Former must compute what the authors' released code computes, from their own parameter names.

Prototypes, forward pass, maps, score, losses and gradients. Parameters and inputs are filled by a rule, so no weight
file is needed.
"""

import pytest
import torch

from models.inp_former import INPFormer, released_name
from models.layers.mining import mined_cosine_loss, position_distance, soft_mining_scale
from models.released import load_released

COHERENCE_WEIGHT = 0.2  # fixed in the released code


def parameter(name: str, values: torch.Tensor) -> torch.Tensor:
    if name.endswith("prototype_token"):
        return values
    return 0.05 * values + (name.endswith("learn_scale") or (".norm" in name and name.endswith("weight")))


def linear(name: str, outputs: int, inputs: int) -> dict:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def released_shapes(h: dict) -> dict:
    dim = h["dim"]
    shapes = {"prototype_token": [h["prototypes"], dim]}
    shapes |= linear("bottleneck.0.fc1", 4 * dim, dim) | linear("bottleneck.0.fc2", dim, 4 * dim)
    for block in ["aggregation.0", *(f"decoder.{layer}" for layer in range(h["layers"]))]:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.{leaf}": [dim] for leaf in ("weight", "bias")}
        if block.startswith("decoder"):
            shapes[f"{block}.attn.learn_scale"] = [h["heads"], 1, 1]
        shapes |= linear(f"{block}.attn.q", dim, dim) | linear(f"{block}.attn.kv", 2 * dim, dim)
        shapes |= linear(f"{block}.attn.proj", dim, dim)
        shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
    return shapes


def levels(case) -> list[torch.Tensor]:
    """Maps (B, C, side, side); class token and registers, which come first, are not used."""
    side, prefix = case.hparams["side"], 1 + case.hparams["registers"]
    return [t[:, prefix:].transpose(1, 2).unflatten(2, (side, side)) for t in case.layer_tokens()]


@pytest.mark.parity("inpformer")
def test_inp_former_gives_the_released_outputs_losses_and_gradients(case, check_decoder):
    h = case.hparams
    network = INPFormer(
        [h["dim"]] * h["layers"],
        [(h["side"],) * 2] * h["layers"],
        prototypes=h["prototypes"],
        groups=h["groups"],
        heads=h["heads"],
    )
    assert not load_released(network, case.state(released_shapes(h), parameter)).unused
    network.eval()
    rebuilt = network.rebuild(network.prepare(levels(case)))
    pairs = rebuilt.pairs
    coherence = rebuilt.distance.mean()
    scales = [soft_mining_scale(position_distance(pair), h["gamma"]) for pair in pairs]
    loss = mined_cosine_loss(pairs, scales) + COHERENCE_WEIGHT * coherence
    more = {"prototypes": rebuilt.prototypes, "distance": rebuilt.distance.flatten(1), "gather_loss": coherence}
    check_decoder(case, network, released_name, pairs, loss, **more)


def test_the_released_checkpoint_loads_and_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = INPFormer([768] * 8, [(28, 28)] * 8)
    assert sum(parameter.numel() for parameter in network.parameters()) == 68_517_984
    shapes = released_shapes({"dim": 768, "prototypes": 6, "layers": 8, "heads": 12})
    ours = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert {released_name(name): shape for name, shape in shapes.items()} == ours
