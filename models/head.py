"""From (target, reconstruction) pairs to an anomaly map and an image score.

    pairs -> distance per level -> [affine] -> resize -> blur per level -> fusion -> resize to the image
          -> [resize to the map size] -> smoothing -> image score

Every step is a named option; a method's defaults are its paper's choices. Everything is computed in float32, also
under autocast: a map in half precision has so few distinct values that ranking metrics would tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.blur import Border, GaussianBlur
from models.layers.neck import resize
from models.reconstruction import Pair

Distance = Literal["l2", "squared_sum", "squared_mean", "cosine", "mse_cosine"]
Fusion = Literal["sum", "mean", "product"]
ImageScore = Literal["max", "mean", "std", "top_k", "pooled_max"]
SmoothingTarget = Literal["both", "image_score"]


@dataclass(frozen=True)
class HeadConfig:
    """How pairs become a map and a score. The defaults are UniAD's.

    Args:
        distance: per position over channels: `l2` norm of the residual (UniAD); `squared_sum`; `squared_mean` (DFR);
            `cosine` = 1 - cos (UniAS); `mse_cosine` = mean square + cosine_weight * (1 - cos) (RLR: 1, ULSAD: 0.5).
        cosine_weight: the weight in `mse_cosine`, >= 0.
        fusion: of the levels' maps, position by position: `sum`, `mean` (RLR, ULSAD) or `product` (UniAS).
        fusion_stride: levels are resized to image_size // fusion_stride before the fusion; 1 = at image size, UniAS 2.
        align_corners: of the bilinear resize of a level's map to the fusion size.
        fused_align_corners: of the bilinear resize of the fused map to the image size (only acts for fusion_stride > 1).
        level_sigmas: Gaussian blur of each level's resized map, in pixels of the fusion size, one value per level, lowest
            level first, reflect border; empty = none. Without kernels each is cut at 4 sigma.
        level_kernels: See `level_sigmas`.
        map_size: side, or (height, width), of the map that is smoothed, scored and given out, resized from the map at image
            size without aligned corners; None = the image size (Dinomaly, INP-Former: 256 from 392).
        smoothing_sigma: Gaussian blur of the map at image or map size, in pixels; 0 = none (RLR, ULSAD: 4).
        smoothing_kernel: its number of taps (odd); None = cut at 4 sigma, which is 33 taps for sigma 4.
        smoothing_border: `reflect` (kornia, ULSAD), `symmetric` (SciPy's default, RLR) or `zeros` (Dinomaly, INP-Former);
            see models/layers/blur.py.
        smoothing_target: `both` map and image score, or only `image_score` (RLR's pixel metrics read the unsmoothed map).
        image_score: of the map: `max`, `mean`, `std` (population), `top_k` = mean of the largest top_k_fraction of pixels
            (their number rounded down, at least 1: Dinomaly, INP-Former), `pooled_max` = max after average pooling with a
            pool_window x pool_window window, stride 1, no padding.
        pool_window: side of the window of `pooled_max`, in pixels.
        top_k_fraction: share of the pixels that `top_k` averages, in (0, 1].
    """

    distance: Distance = "l2"
    cosine_weight: float = 1.0
    fusion: Fusion = "sum"
    fusion_stride: int = 1
    align_corners: bool = True
    fused_align_corners: bool = True
    map_size: int | tuple[int, int] | None = None
    level_sigmas: tuple[float, ...] = ()
    level_kernels: tuple[int, ...] = ()
    smoothing_sigma: float = 0.0
    smoothing_kernel: int | None = None
    smoothing_border: Border = "reflect"
    smoothing_target: SmoothingTarget = "both"
    image_score: ImageScore = "pooled_max"
    pool_window: int = 16
    top_k_fraction: float = 0.01

    def __post_init__(self) -> None:
        for field, allowed in (
            ("distance", Distance),
            ("fusion", Fusion),
            ("smoothing_border", Border),
            ("smoothing_target", SmoothingTarget),
            ("image_score", ImageScore),
        ):
            value = getattr(self, field)
            if value not in get_args(allowed):
                raise ValueError(f'head.{field} is "{value}"; choose one of {", ".join(get_args(allowed))}.')
        if self.cosine_weight < 0:
            raise ValueError(f"head.cosine_weight must not be negative, found {self.cosine_weight}.")
        if self.fusion_stride < 1:
            raise ValueError(f"head.fusion_stride must be at least 1, found {self.fusion_stride}.")
        if self.smoothing_sigma < 0:
            raise ValueError(
                f"head.smoothing_sigma must not be negative, found {self.smoothing_sigma} (0 = no smoothing)."
            )
        if self.smoothing_kernel is not None and not self.smoothing_sigma:
            raise ValueError(
                "head.smoothing_kernel is set but head.smoothing_sigma is 0, so nothing would be smoothed."
            )
        if self.level_kernels and len(self.level_kernels) != len(self.level_sigmas):
            raise ValueError(
                f"head.level_kernels has {len(self.level_kernels)} values and head.level_sigmas has "
                f"{len(self.level_sigmas)}; give one of each per level, or no kernels."
            )
        if self.map_size is not None:
            size = (self.map_size,) * 2 if isinstance(self.map_size, int) else tuple(self.map_size)
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"head.map_size is a positive side or (height, width), found {self.map_size}.")
            object.__setattr__(self, "map_size", size)
        if self.pool_window < 1:
            raise ValueError(f"head.pool_window must be at least 1, found {self.pool_window}.")
        if not 0 < self.top_k_fraction <= 1:
            raise ValueError(f"head.top_k_fraction must lie in (0, 1], found {self.top_k_fraction}.")


class ScoredMaps(NamedTuple):
    """maps: float32 (B, H, W), of the image's size or the head's map_size; image_scores: float32 (B,); level_maps: raw
    distances, float32 (B, H_l, W_l) each."""

    maps: Tensor
    image_scores: Tensor
    level_maps: list[Tensor]


def distance_map(pair: Pair, distance: Distance, cosine_weight: float = 1.0) -> Tensor:
    """Distance of target and reconstruction at every position, float32 (B, H, W); names as in `HeadConfig`."""
    target, reconstruction = pair.target.float(), pair.reconstruction.float()
    if target.shape != reconstruction.shape:
        raise ValueError(
            f"Target {tuple(target.shape)} and reconstruction {tuple(reconstruction.shape)} of a level differ in shape."
        )
    if distance == "l2":
        return torch.linalg.vector_norm(reconstruction - target, dim=1)
    if distance == "squared_sum":
        return (reconstruction - target).square().sum(dim=1)
    if distance == "squared_mean":
        return (reconstruction - target).square().mean(dim=1)
    cosine = 1 - F.cosine_similarity(reconstruction, target, dim=1)
    if distance == "cosine":
        return cosine
    return (reconstruction - target).square().mean(dim=1) + cosine_weight * cosine


def fuse(maps: Sequence[Tensor], fusion: Fusion) -> Tensor:
    """Combine maps of equal shape (B, H, W) position by position: sum, mean or product over the levels."""
    stacked = torch.stack(list(maps))
    if fusion == "sum":
        return stacked.sum(dim=0)
    return stacked.mean(dim=0) if fusion == "mean" else stacked.prod(dim=0)


def image_scores(maps: Tensor, kind: ImageScore, *, pool_window: int = 16, top_k_fraction: float = 0.01) -> Tensor:
    """One score per image, (B,), from maps (B, H, W). Names as in `HeadConfig`; top_k takes at least one pixel."""
    flat = maps.flatten(1)
    if kind == "max":
        return flat.amax(dim=1)
    if kind == "mean":
        return flat.mean(dim=1)
    if kind == "std":
        return flat.std(dim=1, correction=0)
    if kind == "top_k":
        return flat.topk(max(1, int(top_k_fraction * flat.shape[1])), dim=1).values.mean(dim=1)
    if pool_window > min(maps.shape[-2:]):
        raise ValueError(
            f"head.pool_window is {pool_window} but the anomaly map is only {maps.shape[-2]}x{maps.shape[-1]} pixels; "
            "choose a window that fits, or another head.image_score."
        )
    return F.avg_pool2d(maps[:, None], pool_window, stride=1).flatten(1).amax(dim=1)


class AnomalyHead(nn.Module):
    """The steps of the module's text, for one `HeadConfig`. Nothing is trained and nothing enters the state dict."""

    def __init__(self, config: HeadConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HeadConfig()
        kernels = config.level_kernels or (None,) * len(config.level_sigmas)
        self.level_blurs = nn.ModuleList(
            GaussianBlur(sigma, kernel) for sigma, kernel in zip(config.level_sigmas, kernels, strict=True)
        )
        self.smoothing = (
            GaussianBlur(config.smoothing_sigma, config.smoothing_kernel, border=config.smoothing_border)
            if config.smoothing_sigma
            else nn.Identity()
        )

    def forward(
        self,
        pairs: Sequence[Pair],
        image_size: tuple[int, int],
        level_affine: tuple[Tensor, Tensor] | None = None,
    ) -> ScoredMaps:
        """pairs: one per level, lowest level first; image_size: (height, width) of the maps in pixels.

        level_affine: (scale, shift), each (levels,): level maps become scale * map + shift before anything else
        (ULSAD's quantile normalisation).
        """
        return self.score(self.level_maps(pairs), image_size, level_affine=level_affine)

    def level_maps(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Raw distance maps, float32 (B, H_l, W_l) each."""
        device = pairs[0].target.device.type
        with torch.autocast(device, enabled=False):
            return [distance_map(pair, self.config.distance, self.config.cosine_weight) for pair in pairs]

    def score(
        self,
        level_maps: Sequence[Tensor],
        image_size: tuple[int, int],
        *,
        selection: Sequence[int] | None = None,
        level_affine: tuple[Tensor, Tensor] | None = None,
    ) -> ScoredMaps:
        """The rest of the way from level maps.

        selection: positions in `level_maps` to fuse, each with its own blur; None = all. One run can so be scored with
        several subsets of its levels.
        """
        blurs: list[nn.Module] = list(self.level_blurs) or [nn.Identity()] * len(level_maps)
        if len(blurs) != len(level_maps):
            raise ValueError(
                f"head.level_sigmas has {len(blurs)} values but the network gives {len(level_maps)} level maps; "
                "give one per level, lowest first."
            )
        chosen = range(len(level_maps)) if selection is None else selection
        if not len(chosen) or any(not 0 <= index < len(level_maps) for index in chosen):
            raise ValueError(
                f"The levels to fuse must be a non-empty choice of positions 0..{len(level_maps) - 1}, "
                f"found {list(chosen)}."
            )
        height, width = image_size
        fusion_size = (height // self.config.fusion_stride, width // self.config.fusion_stride)
        with torch.autocast(level_maps[0].device.type, enabled=False):
            prepared = []
            for index in chosen:
                level_map = level_maps[index].float()
                if level_affine is not None:
                    level_map = level_map * level_affine[0][index] + level_affine[1][index]
                level_map = resize(level_map[:, None], fusion_size, self.config.align_corners)
                prepared.append(blurs[index](level_map)[:, 0])
            fused = fuse(prepared, self.config.fusion)
            maps = resize(fused[:, None], (height, width), self.config.fused_align_corners)[:, 0]
            if isinstance(self.config.map_size, tuple):
                maps = resize(maps[:, None], self.config.map_size, align_corners=False)[:, 0]
            smoothed = self.smoothing(maps)
            scores = image_scores(
                smoothed,
                self.config.image_score,
                pool_window=self.config.pool_window,
                top_k_fraction=self.config.top_k_fraction,
            )
        return ScoredMaps(smoothed if self.config.smoothing_target == "both" else maps, scores, list(level_maps))

    def extra_repr(self) -> str:
        config = self.config
        return f"distance={config.distance}, fusion={config.fusion}, image_score={config.image_score}"
