"""One process of test_distributed.py: scores its share of a problem and saves the table."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

from lightning_modules.metrics import AnomalyMetrics


def shares(ids: np.ndarray, world: int) -> dict[str, list[np.ndarray]]:
    """How the samples are spread over the processes."""
    padded = np.resize(ids, -(-len(ids) // world) * world)  # as a distributed sampler does, with duplicates
    parts = [padded[r::world] for r in range(world)]
    uneven = np.split(ids, sorted({min(3 * r, len(ids)) for r in range(1, world)}))
    return {
        "padded": parts,
        "uneven": uneven,
        "one process has nothing": [*parts[:-1], ids[:0]] if world > 1 else parts,
    }


def main(rank: int, world: int, rendezvous: str, data: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    arrays = np.load(data)
    names = arrays["names"].tolist()
    ids = np.random.default_rng(1).permutation(len(names))
    for scenario, parts in shares(ids, world).items():
        if scenario == "one process has nothing" and world > 1:
            parts[0] = np.setdiff1d(ids, np.concatenate(parts[1:]))
        # categories that a process has never seen come from the others, unless they are given
        metrics = AnomalyMetrics(None if scenario == "uneven" else {"c0": "one", "c1": "two", "c2": "two"}, threads=1)
        for i in parts[rank]:
            maps, masks = arrays["maps"][i][None], arrays["masks"][i][None]
            metrics.update(maps, masks, [maps.max()], [int(masks.any())], [names[i]], [i])
        metrics.compute().table.to_pickle(f"{output}/{scenario}-{world}-{rank}.pkl")
    numbered = AnomalyMetrics()
    numbered.update(arrays["maps"][:1], arrays["masks"][:1], [0.5], [1], ["c0"])
    try:
        numbered.compute()
        refused = False
    except ValueError as error:
        refused = "needs ids" in str(error)
    if refused != (world > 1):
        raise SystemExit("samples without ids cannot be told apart by several processes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
