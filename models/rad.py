"""RAD: patches are compared with those of the most similar normal images, level by level; nothing is trained.

"Is Training Necessary for Anomaly Detection?", 2026, https://arxiv.org/abs/2601.22763. Details follow the authors' code.

    image -> its nearest normal images -> per level: 1 - cosine to the most similar of their patches at about the same
    place -> mean over the levels

The authors retrieve by the class token of the highest level. A backbone here gives maps of patches only, so the mean of the
highest level's unit vectors stands in for it.

Size by arithmetic: the bank holds every patch of every training image, so images x positions x channels x levels x 4 bytes:
MVTec AD, unified, with a ViT-B/16 at 448 pixels (784 patches, 768 channels, 4 levels): 35 GB; a category of 250 images 2.4 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers.tracing import in_parts
from models.reconstruction import FeatureNetwork

CHUNK = 16
"""Retrieved images that are compared at a time."""


class RADNetwork(FeatureNetwork):
    """`prepare` makes unit vectors, the banks hold those of all normal images, `forward` compares.

    Args:
        channels: channels and (height, width) of each level.
        sizes: See `channels`.
        images: how many normal images are retrieved (150); fewer training images: all.
        positional: whether a patch is compared only with patches of about the same place.
        radius: how many patches that place reaches in every direction; 0 is the same place only.

    The state dict holds `descriptors` (N, C_L) and `bank{l}` (H_l W_l, N, C_l), float32, all of unit length.
    """

    descriptors: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        images: int = 150,
        positional: bool = True,
        radius: int = 1,
    ) -> None:
        super().__init__()
        if images < 1:
            raise ValueError(f"images, the number of retrieved ones, must be at least 1, found {images}.")
        if radius < 0:
            raise ValueError(f"radius must not be negative, found {radius}.")
        self.images, self.positional, self.radius = images, positional, radius
        self.sizes = [(*size,) for size in sizes]
        self.register_buffer("descriptors", torch.zeros(0, channels[-1]))
        for level, (width, (height, columns)) in enumerate(zip(channels, self.sizes, strict=True)):
            self.register_buffer(f"bank{level}", torch.zeros(height * columns, 0, width))

    preparation = "unit length per position"

    def prepare(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C_l, H_l, W_l) -> the same with vectors of length 1, float32."""
        with torch.autocast(levels[0].device.type, enabled=False):
            return [F.normalize(level.float(), dim=1) for level in levels]

    @property
    def banks(self) -> list[Tensor]:
        """The banks of all levels, lowest first."""
        return [getattr(self, f"bank{level}") for level in range(len(self.sizes))]

    @property
    def bank_bytes_per_image(self) -> int:
        """What a training image adds to the banks."""
        return 4 * sum(bank.shape[0] * bank.shape[2] for bank in self.banks)

    @torch.no_grad()
    def set_banks(self, levels: Sequence[Tensor]) -> None:
        """Replace the banks by prepared levels (N, C_l, H_l, W_l) of N normal images."""
        for number, (level, bank) in enumerate(zip(levels, self.banks, strict=True)):
            setattr(self, f"bank{number}", level.flatten(2).permute(2, 0, 1).to(bank).contiguous())
        self.descriptors = self._describe(levels[-1]).to(self.descriptors)

    @staticmethod
    def _describe(level: Tensor) -> Tensor:
        return F.normalize(level.float().mean(dim=(2, 3)), dim=1)

    @torch.no_grad()
    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Prepared levels -> cosine distance of every position, float32 (B, H_l, W_l) per level, in [0, 2]."""
        if not len(self.descriptors):
            raise RuntimeError(
                "RAD's banks are empty: they are filled at the end of fit and stored in the checkpoint. Train the run, or "
                "give a checkpoint."
            )
        with torch.autocast(features[0].device.type, enabled=False):
            similar = self._describe(features[-1]) @ self.descriptors.T
            retrieved = similar.topk(min(self.images, len(self.descriptors)), dim=1).indices
            maps = []
            for level, bank, size in zip(features, self.banks, self.sizes, strict=True):
                vectors = level.float().flatten(2).transpose(1, 2)  # (B, H * W, C)
                compare = self._same_place if self.positional else self._anywhere
                images = zip(in_parts(vectors, 1), in_parts(retrieved, 1), strict=True)
                found = [compare(own, bank, chosen, size) for own, chosen in images]
                maps.append(1 - torch.cat(found).view(-1, *size))
        return maps

    @staticmethod
    def _anywhere(vectors: Tensor, bank: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """Largest cosine of each vector (B, P, C) with any patch of the chosen images (B, k), (B, P)."""
        patches = (bank[:, part].transpose(0, 1).flatten(1, 2) for part in chosen.split(CHUNK, dim=1))
        return torch.stack([(vectors @ found.transpose(1, 2)).amax(dim=2) for found in patches]).amax(dim=0)

    def _same_place(self, vectors: Tensor, bank: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """Largest cosine of each vector (B, P, C) with patches of the chosen images (B, k) at most `radius` away, (B, P)."""
        H, W = size
        query = vectors.unflatten(1, size)[..., None]
        best = torch.full_like(query[..., 0, 0], -1.0)
        for part in chosen.split(CHUNK, dim=1):
            grid = bank[:, part].transpose(0, 1).unflatten(1, size)  # (B, H, W, k, C)
            for down in range(max(-self.radius, 1 - H), min(self.radius, H - 1) + 1):
                for right in range(max(-self.radius, 1 - W), min(self.radius, W - 1) + 1):
                    rows, columns = slice(max(0, -down), H - max(0, down)), slice(max(0, -right), W - max(0, right))
                    there = grid[:, max(0, down) : H - max(0, -down), max(0, right) : W - max(0, -right)]
                    cosine = (there @ query[:, rows, columns])[..., 0].amax(dim=3)
                    best[:, rows, columns] = torch.maximum(best[:, rows, columns], cosine)
        return best.flatten(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "descriptors")
        if stored is not None and stored.ndim == 2:
            self.descriptors = self.descriptors.new_zeros(len(stored), self.descriptors.shape[1])
            for number, bank in enumerate(self.banks):
                setattr(self, f"bank{number}", bank.new_zeros(bank.shape[0], len(stored), bank.shape[2]))
        super()._load_from_state_dict(state_dict, prefix, *args)
