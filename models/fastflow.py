"""FastFlow: a two-dimensional normalising flow per backbone level; what it maps far from the origin is anomalous.

Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows", arXiv 2021,
https://arxiv.org/abs/2111.07677. The authors released no code; the flows are anomalib's, which follow the third-party
implementation in use (gathierry/FastFlow). Training, map and score are this project's.

    level (B, C, H, W) -> LayerNorm over channels and positions -> flow of 3x3 and 1x1 convolutions -> z (B, C, H, W)
    map = mean over the levels of the mean over the channels of z^2 / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from models.reconstruction import FeatureNetwork

Map = Literal["energy", "probability"]


class Flowed(NamedTuple):
    """What a level's flow gives: z float32 (B, C, H, W), and the logarithm of its Jacobian's determinant (B,)."""

    z: Tensor
    log_determinant: Tensor


class FastFlow(FeatureNetwork):
    """Levels in, flowed levels out: 45,007,872 trained parameters for levels 2 to 4 of WideResNet50-2 at 256 pixels.

    The affine LayerNorm has a weight for every channel and position, so a trained network takes one image size.

    Args:
        channels, sizes: Channels and (height, width) of each level, as the feature extractor gives them.
        flow_steps: Coupling blocks of each flow.
        conv3x3_only: All blocks with 3x3 convolutions (the third party's ResNet18); else 3x3 and 1x1 in turn.
        hidden_ratio: Width of a block's hidden layer, relative to its input's.

    Raises:
        ValueError: numbers that leave no block or no hidden layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        flow_steps: int = 8,
        conv3x3_only: bool = False,
        hidden_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        if flow_steps < 1:
            raise ValueError(f"flow_steps must be at least 1, found {flow_steps}.")
        if int(min(channels) // 2 * hidden_ratio) < 1:
            raise ValueError(
                f"hidden_ratio is {hidden_ratio}, which leaves no hidden channel for {min(channels)} channels."
            )
        from anomalib.models.image.fastflow.torch_model import create_fast_flow_block

        shapes = [[width, *size] for width, size in zip(channels, sizes, strict=True)]
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
        self.flows = nn.ModuleList(
            create_fast_flow_block(shape, conv3x3_only, hidden_ratio, flow_steps) for shape in shapes
        )

    def forward(self, features: list[Tensor]) -> list[Flowed]:
        """Levels (B, C_l, H_l, W_l), lowest first -> their flows' outputs of the same shapes."""
        levels = zip(self.norms, self.flows, features, strict=True)
        return [Flowed(*flow(norm(level))) for norm, flow, level in levels]


def negative_log_likelihood(flowed: Sequence[Flowed]) -> Tensor:
    """Float32 scalar: over the levels the sum of |z|^2 / 2 - log determinant, averaged over the images.

    It is not divided by the number of values, as released: about -1e6 at the paper's sizes, up to a constant.
    """
    losses = [0.5 * level.z.square().sum(dim=(1, 2, 3)) - level.log_determinant for level in flowed]
    return torch.stack(losses).mean(dim=1).sum()


def level_maps(flowed: Sequence[Flowed], kind: Map = "energy") -> list[Tensor]:
    """Anomaly of every position, float32 (B, H_l, W_l) each.

    kind: `energy`, the mean over the channels of z^2 / 2; or `probability`, minus exp(-energy), as released: beyond an energy
        of 104 it is exactly 0 in float32, so that all worse defects tie.
    """
    if kind not in get_args(Map):
        raise ValueError(f'map is "{kind}"; choose one of {", ".join(get_args(Map))}.')
    energies = [0.5 * level.z.square().mean(dim=1) for level in flowed]
    return energies if kind == "energy" else [-(-energy).exp() for energy in energies]
