import pytest
import torch

from models.layers.quantiles import StreamingQuantiles, _keys, _values


def stream(parts, probabilities) -> list[float]:
    quantiles = StreamingQuantiles(probabilities)
    for _ in quantiles.passes():
        for part in parts:
            quantiles.update(part)
    return quantiles.result()


@pytest.mark.parametrize("seed", range(5))
def test_streamed_quantiles_equal_those_of_all_values_at_once(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12_345, generator=generator) * 10.0 ** torch.randint(-8, 8, (12_345,), generator=generator)
    if seed % 2:
        values = values.mul(4).round().div(4)  # ties
    probabilities = [0.0, 0.001, 0.25, 0.5, 0.9, 0.995, 1.0]
    expected = torch.quantile(values.double(), torch.tensor(probabilities, dtype=torch.float64))
    for parts in (values.split(1000), [values.reshape(5, -1)], values.split([1, 12_344])):
        torch.testing.assert_close(
            torch.tensor(stream(parts, probabilities), dtype=torch.float64), expected, rtol=1e-15, atol=0
        )


def test_a_single_value_is_every_quantile():
    assert stream([torch.tensor([2.5])], [0.0, 0.3, 1.0]) == [2.5, 2.5, 2.5]


def test_keys_keep_the_order_of_floats_and_come_back():
    values = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38])
    keys = _keys(values)
    assert (keys.diff() >= 0).all()
    assert keys[3] == keys[4]
    assert torch.equal(_values(keys), values)


def test_counts_of_several_processes_add_up():
    values = torch.randn(999, generator=torch.Generator().manual_seed(0))
    shards = [StreamingQuantiles([0.9]) for _ in range(3)]
    for pass_ in range(2):
        for shard, part in zip(shards, values.split(333), strict=True):
            shard.update(part)
        total = sum(shard.counts for shard in shards)
        for shard in shards:
            shard.counts = total.clone()
            if pass_ == 0:
                shard.next_pass()
    results = {shard.result()[0] for shard in shards}
    assert results == {float(torch.quantile(values.double(), 0.9))}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="not in"):
        StreamingQuantiles([1.5])
    with pytest.raises(ValueError, match="not finite"):
        StreamingQuantiles([0.5]).update(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="nothing"):
        StreamingQuantiles([0.5]).next_pass()
    quantiles = StreamingQuantiles([0.5])
    quantiles.update(torch.rand(10))
    quantiles.next_pass()
    quantiles.update(torch.rand(10) + 5)
    with pytest.raises(RuntimeError, match="same values"):
        quantiles.result()
