"""What timm's extractor of vision transformers leaves out: class and register tokens, and Dinomaly's position codes."""

from __future__ import annotations

import types

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional as F


class PrefixGetterNet(FeatureGetterNet):
    """timm's getter of a ViT's blocks, with class and register tokens.

    Returns the maps (B, C, H, W) of all blocks asked for, then the prefix tokens of each as (B, C, 1, P), the class token
    first, in the form in which maps are cached and handed on.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        blocks = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, intermediates_only=True, return_prefix_tokens=True
        )
        maps, prefixes = zip(*blocks, strict=True)
        return [*maps, *(prefix.transpose(1, 2).unsqueeze(2) for prefix in prefixes)]


def released_position(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's position codes (1, H0, W0, C) on another grid, as Dinomaly and INP-Former resample them: (1, H * W, C).

    Bicubic without antialiasing, with scale factor (grid + 0.1) / native grid, so that it samples every
    native / (grid + 0.1) codes; timm samples every native / grid, antialiased.
    """
    height, width = patches.shape[1:3]
    if (height, width) != tuple(grid):
        scale = ((grid[0] + 0.1) / height, (grid[1] + 0.1) / width)
        patches = F.interpolate(patches.permute(0, 3, 1, 2), scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1)
    return patches.flatten(1, 2)


def use_released_position(vit: nn.Module, name: str) -> None:
    """From now on a timm ViT, built with `dynamic_img_size`, resamples its position codes by `released_position`.

    Raises ValueError for a backbone without learned absolute position codes (DINOv3's are rotary).
    """
    if getattr(vit, "pos_embed", None) is None or not getattr(vit, "dynamic_img_size", False):
        raise ValueError(
            f'backbone.position="released" is a rule for learned position codes of a vision transformer, as DINOv2 has; '
            f"{name} has none. Use position `timm`."
        )
    vit._pos_embed = types.MethodType(_with_released_position, vit)


def _with_released_position(vit: nn.Module, x: Tensor) -> Tensor:
    """(B, H, W, C) patches to (B, P + H * W, C) tokens."""
    batch, height, width, channels = x.shape
    own = 0 if vit.no_embed_class else vit.num_prefix_tokens  # codes that belong to prefix tokens
    prefix_codes, patch_codes = vit.pos_embed[:, :own], vit.pos_embed[:, own:]
    patch_codes = released_position(patch_codes.unflatten(1, tuple(vit.patch_embed.grid_size)), (height, width))
    tokens = x.reshape(batch, -1, channels) + patch_codes
    prefix = [token.expand(batch, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    if not prefix:
        return vit.pos_drop(tokens)
    prefix = torch.cat(prefix, dim=1)
    return vit.pos_drop(torch.cat([prefix + prefix_codes if own else prefix, tokens], dim=1))
