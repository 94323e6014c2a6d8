import pytest
import torch
from torch.nn import functional as F

from models.inp_former import INPFormer, PrototypeBlock, nearest_distance


def small(**options) -> INPFormer:
    torch.manual_seed(0)
    return INPFormer([8] * 4, [(3, 4)] * 4, **{"prototypes": 3, "heads": 2} | options)


def levels() -> list[torch.Tensor]:
    return list(torch.randn(4, 2, 8, 3, 4, generator=torch.Generator().manual_seed(1)))


def test_no_token_passes_the_decoder_except_through_the_prototypes():
    block = PrototypeBlock(8, 2, "relu", residual=False)
    for part in (block.mlp.fc2, block.attention.kv):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    x, prototypes = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    assert torch.equal(block(x, prototypes), block.attention.proj.bias.expand(2, 5, 8))  # values are zero, so is all
    block.residual = True
    torch.testing.assert_close(block(x, prototypes), x + block.attention.proj.bias)


def test_each_heads_output_is_a_non_negative_combination_of_the_prototypes_values():
    torch.manual_seed(0)
    block = PrototypeBlock(8, 2, "relu", residual=False).double()
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    with torch.no_grad():  # an identity behind the attention, so that its heads can be seen
        block.attention.proj.weight.copy_(torch.eye(8))
        block.attention.proj.bias.zero_()
    x, prototypes = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double()
    out = block(x, prototypes)
    values = block.attention.kv(block.norm1(prototypes))[..., 8:]
    for head in (slice(0, 4), slice(4, 8)):
        solution = torch.linalg.lstsq(values[0, :, head].T, out[0, :, head].T)
        assert solution.solution.min() > -1e-9
        torch.testing.assert_close(values[0, :, head].T @ solution.solution, out[0, :, head].T)


def test_coherence_trains_the_prototypes_alone():
    network = small()
    network.rebuild(network.prepare(levels())).distance.mean().backward()
    moved = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"prototypes", "extractor"}


def test_distance_is_to_the_nearest_prototype():
    tokens, prototypes = torch.randn(2, 7, 5), torch.randn(2, 3, 5)
    every = 1 - torch.stack([F.cosine_similarity(tokens, prototypes[:, [m]], dim=-1) for m in range(3)])
    torch.testing.assert_close(nearest_distance(tokens, prototypes), every.amin(dim=0))


@pytest.mark.parametrize(
    "options",
    [{"attention": "softmax"}, {"residual": True}, {"groups": 1}, {"groups": [[0], [1, 2]]}, {"prototypes": 1}],
)
def test_every_ablation_gives_pairs_of_the_levels_shape_and_gradients_everywhere(options):
    network = small(**options)
    pairs = network(network.prepare(levels()))
    assert all(tuple(t.shape) == (2, 8, 3, 4) for pair in pairs for t in pair)
    sum(pair.reconstruction.square().sum() for pair in pairs).backward()
    assert all(p.grad is not None for p in network.bottleneck.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prototypes": 0}, "prototypes=0"), ({"attention": "linear"}, "relu, softmax"), ({"groups": 3}, "divide")],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
