"""Exchange between processes: sums of arrays, and what each of them has. The one gather of this repository."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist


class Group:
    """The processes that evaluate together; without an initialised process group, or if `alone`, only this one."""

    def __init__(self, alone: bool = False) -> None:
        active = not alone and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if active else 1
        self.rank = dist.get_rank() if active else 0
        on_gpu = active and dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Element-wise sum over the processes."""
        if self.size == 1 or not array.size:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def sum_all(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`sum` of several arrays of one dtype, in one message."""
        if self.size == 1:
            return list(arrays)
        bounds = np.cumsum([a.size for a in arrays])[:-1]
        return np.split(self.sum(np.concatenate(arrays)), bounds)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """The 1-D arrays (of any length) of all processes, in the order of their ranks."""
        if self.size == 1:
            return [array]
        lengths = np.zeros(self.size, dtype=np.int64)
        lengths[self.rank] = len(array)
        lengths = self.sum(lengths)
        if not lengths.any():
            return [array] * self.size
        padded = torch.zeros(int(lengths.max()), dtype=torch.from_numpy(array[:0]).dtype, device=self.device)
        padded[: len(array)] = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded)
        return [part[:n].cpu().numpy() for part, n in zip(received, lengths.tolist(), strict=True)]

    def gather_objects(self, value: object) -> list:
        """Small Python objects of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        received: list = [None] * self.size
        dist.all_gather_object(received, value)
        return received
