"""Several processes must find the statistics and quantiles that one finds."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_modules.metrics.sync import Group
from lightning_modules.ulsad import ULSAD, QuantileConfig
from models.backbones import BackboneConfig

pytestmark = pytest.mark.program


def module() -> ULSAD:
    torch.manual_seed(0)
    return ULSAD(
        BackboneConfig("resnet10t", (2, 3), weights="random"),
        image_size=64,
        quantiles=QuantileConfig(alphas=(0.5,), betas=(0.99,)),
        pooled_channels=8,
    ).eval()


def estimate(rank: int, world: int) -> tuple[list[float], list[torch.Tensor]]:
    """Quantiles and moments from the part of ten images that a process sees; the last process sees none."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(10, 2, 16, 16, generator=generator)
    features = torch.randn(10, 8, 16, 16, generator=generator) * 3 + 7
    seeing = max(1, world - 1)
    own = [i for i in range(10) if i % seeing == rank] if rank < seeing else []
    network = module()
    chunks = maps[own].split(3) if own else ()
    quantiles = [value for branch in (0, 1) for value in network._quantiles(chunks, branch).values()]
    statistics = network.network.statistics
    if own:
        statistics.update(features[own], ["set"] * len(own))
    moments = statistics.moments()
    statistics.reset()
    for part in Group().gather_objects(moments):
        statistics.merge(part)
    count, mean, squares = statistics.moments()["set"]
    return quantiles, [torch.tensor(float(count)), mean, squares]


def worker(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(estimate(rank, world), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_three_processes_one_of_them_without_images_agree_with_one(tmp_path):
    quantiles, moments = estimate(0, 1)
    mp.spawn(worker, args=(3, str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    for rank in range(3):
        theirs, other = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert theirs == quantiles
        for a, b in zip(other, moments, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def drop(rank: int, world: int) -> tuple[list[str], dict[str, list[int]]]:
    """What a process keeps of two groups; the second process repeats the only image of group b."""
    kept = {"a": {0: torch.zeros(1), 2: torch.zeros(1)}, "b": {5: torch.zeros(1)}} if rank == 0 else {}
    kept = kept or ({"b": {5: torch.zeros(1)}} if rank == 1 else {"a": {1: torch.zeros(1)}})
    groups = ULSAD._each_once(kept)
    return groups, {group: list(maps) for group, maps in kept.items()}


def dropper(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(drop(rank, world), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_an_image_that_an_idle_process_repeats_counts_once_in_the_quantiles(tmp_path):
    mp.spawn(dropper, args=(3, str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    assert [groups for groups, _ in found] == [["a", "b"]] * 3
    assert [kept for _, kept in found] == [{"a": [0, 2], "b": [5]}, {"b": []}, {"a": [1]}]
