"""Exact nearest neighbours in a bank of vectors, in float32 and bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.layers.tracing import in_parts, tracing

QUERIES = 2048
"""Queries that are compared at a time."""
ENTRIES = 8192
"""Bank entries that they are compared with at a time: 2048 x 8192 float32 numbers are 64 MiB."""
SPARE = 4
"""Candidates beyond those asked for, whose distances are computed anew."""


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, neighbors: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest bank entries of every query and their squared Euclidean distances, nearest first.

    Candidates are found block by block through a matrix product; the distances of those that are left are then computed
    from differences. So a vector that is in the bank has distance 0, which the product alone would miss by its rounding.
    Everything is float32, also under autocast; of equally near entries the one with the lower index comes first.

    queries: (Q, C) float. bank: (M, C) float on the same device. Returns float32 (Q, neighbors) and int64 (Q, neighbors).
    Raises ValueError when the bank holds fewer entries than are asked for.
    """
    if not 0 < neighbors <= len(bank):
        raise ValueError(
            f"{neighbors} nearest neighbours were asked for, but the memory bank holds {len(bank)} vectors."
        )
    if queries.shape[0] == 0:
        empty = queries.new_empty(0, neighbors, dtype=torch.float32)
        return empty, empty.long()
    with torch.autocast(queries.device.type, enabled=False):
        bank = bank.float()
        # The rounding of a product grows with the vectors' length: from the bank's mean they are shorter.
        centre = bank.mean(dim=0)
        found = [_nearest(part, bank, centre, neighbors) for part in in_parts(queries.float(), QUERIES)]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest(queries: Tensor, bank: Tensor, centre: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    wanted = min(neighbors + SPARE, len(bank))
    moved = queries - centre
    values = queries.new_empty(queries.shape[0], 0)
    indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), ENTRIES):
        block = bank[first : first + ENTRIES] - centre
        # Half the squared distance, less what all entries have in common.
        order = torch.addmm(block.square().sum(dim=1) / 2, moved, block.T, alpha=-1)
        best, where = order.topk(min(wanted, len(block)), dim=1, largest=False)
        values, indices = torch.cat([values, best], dim=1), torch.cat([indices, where + first], dim=1)
        if values.shape[1] > wanted:
            values, kept = values.topk(wanted, dim=1, largest=False)
            indices = indices.gather(1, kept)
    indices = indices.sort(dim=1).values
    exact = (queries[:, None] - bank[indices]).square().sum(dim=2)
    # ONNX knows one sort, which is stable.
    order = (exact.sort(dim=1) if tracing() else exact.sort(dim=1, stable=True)).indices[:, :neighbors]
    return exact.gather(1, order), indices.gather(1, order)


class MemoryBank(nn.Module):
    """Vectors of normal patches, (M, C) float32, as a buffer whose size a checkpoint may decide.

    channels: C. It is empty until `set` is called or a state dict is loaded.
    """

    vectors: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(0, channels))

    def __len__(self) -> int:
        return len(self.vectors)

    def set(self, vectors: Tensor) -> None:
        """Replace the bank by vectors (M, C), which are copied to its device as float32."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"A memory bank of {self.vectors.shape[1]} channels was given vectors of shape {tuple(vectors.shape)}."
            )
        self.vectors = vectors.detach().to(self.vectors.device, torch.float32, copy=True)

    def forward(self, queries: Tensor, neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """`nearest` of queries (Q, C) in this bank. Raises RuntimeError while the bank is empty."""
        if not len(self.vectors):
            raise RuntimeError(
                "The memory bank is empty: it is filled at the end of fit and stored in the checkpoint. Train the run, or "
                "give a checkpoint."
            )
        return nearest(queries, self.vectors, neighbors)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "vectors")
        if stored is not None and stored.ndim == 2 and stored.shape[1] == self.vectors.shape[1]:
            self.vectors = self.vectors.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
