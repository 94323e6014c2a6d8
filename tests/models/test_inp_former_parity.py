"""INP-Former must compute what the authors' released code computes, from their own parameter names.

Prototypes, forward pass, maps, score, losses and gradients. Parameters and inputs are filled by a rule, so no weight
file is needed.
"""

import pytest
import torch

from models.head import AnomalyHead, HeadConfig
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
    name, side, prefix = case.input["name"], case.hparams["side"], 1 + case.hparams["registers"]
    tokens = [
        case.fill(name, case.input["shape"]) + 0.5 * case.fill(f"{name}:{layer}", case.input["shape"])
        for layer in range(case.hparams["layers"])
    ]
    return [t[:, prefix:].transpose(1, 2).unflatten(2, (side, side)) for t in tokens]


@pytest.mark.parity("inpformer")
def test_inp_former_gives_the_released_outputs_losses_and_gradients(parity_case, assert_parity):
    h = parity_case.hparams
    network = INPFormer(
        [h["dim"]] * h["layers"],
        [(h["side"],) * 2] * h["layers"],
        prototypes=h["prototypes"],
        groups=h["groups"],
        heads=h["heads"],
    )
    assert not load_released(network, parity_case.state(released_shapes(h), parameter)).unused
    network.eval()
    rebuilt = network.rebuild(network.prepare(levels(parity_case)))
    pairs = rebuilt.pairs
    head = HeadConfig(
        distance="cosine",
        fusion="mean",
        map_size=h["evaluate"],
        smoothing_sigma=4.0,
        smoothing_kernel=5,
        smoothing_border="zeros",
        image_score="top_k",
        top_k_fraction=0.01,
    )
    unsmoothed = HeadConfig(distance="cosine", fusion="mean", image_score="max")
    with torch.no_grad():
        scored = AnomalyHead(head)(pairs, (h["image"],) * 2)
        at_image = AnomalyHead(unsmoothed)(pairs, (h["image"],) * 2)
        first = AnomalyHead(unsmoothed)(pairs[:1], (h["image"],) * 2)
        resized = torch.nn.functional.interpolate(at_image.maps[:, None], (h["evaluate"],) * 2, mode="bilinear")[:, 0]
    coherence = rebuilt.distance.mean()
    scales = [soft_mining_scale(position_distance(pair), h["gamma"]) for pair in pairs]
    loss = mined_cosine_loss(pairs, scales) + COHERENCE_WEIGHT * coherence
    loss.backward()

    found = {
        "prototypes": rebuilt.prototypes,
        "distance": rebuilt.distance.flatten(1),
        "gather_loss": coherence,
        "map_image": at_image.maps,
        "level_map0": first.maps,
        "map_resized": resized,
        "map": scored.maps,
        "score": scored.image_scores,
        "loss": loss,
    }
    for group, pair in enumerate(pairs):
        found |= {f"en{group}": pair.target, f"de{group}": pair.reconstruction}
    for name in parity_case.names():
        if name.startswith("grad:"):
            found[name] = network.get_parameter(released_name(name.removeprefix("grad:"))).grad
    assert found.keys() == set(parity_case.names())
    for name, value in found.items():
        assert_parity(value, parity_case.array(name))


def test_the_released_checkpoint_loads_and_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = INPFormer([768] * 8, [(28, 28)] * 8)
    assert sum(parameter.numel() for parameter in network.parameters()) == 68_517_984
    shapes = released_shapes({"dim": 768, "prototypes": 6, "layers": 8, "heads": 12})
    ours = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert {released_name(name): shape for name, shape in shapes.items()} == ours
