"""The networks of UniAD's "identical shortcut" study: plain ones that learn to copy their input.

You et al., NeurIPS 2022, section 3.1, https://arxiv.org/abs/2206.03687. The paper trains an MLP, a CNN and a
transformer on the same frozen features and shows both AUROCs rise, then fall while the loss goes to zero. Its widths
are not published; these are ours, matched to UniAD's 7.7 million parameters for 272 channels on a 14x14 grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor, nn

from models.layers.jitter import FeatureJitter
from models.layers.neck import ConcatenatedLevels
from models.reconstruction import Pair
from models.uniad import UniAD

Shortcut = Literal["mlp", "cnn", "transformer_no_query", "transformer_one_query", "uniad"]


class ConvolutionalShortcut(ConcatenatedLevels):
    """Three hidden layers with ReLU on the concatenated levels; no norm, no skip, no dropout, PyTorch's initialisation.

    Args:
        channels: Of each level.
        sizes: (height, width) of each level.
        kernel: 1 = the MLP, one token at a time; 3 = the CNN.
        hidden: width of the hidden layers, at least the number of channels, since a narrower network could not copy even
            if it wanted.
        grid: (height, width) of the token grid; None = the size of the highest level given.
        jitter_scale: as in `models.uniad.UniAD`; 0 = no jitter.
        jitter_probability: share of training batches that are jittered, in [0, 1].
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        kernel: int,
        hidden: int,
        grid: tuple[int, int] | None = None,
        jitter_scale: float = 0.0,
        jitter_probability: float = 1.0,
    ) -> None:
        super().__init__()
        width = sum(channels)
        if hidden < width:
            raise ValueError(
                f"The hidden width {hidden} is below the {width} feature channels, so the identity, which this network "
                f"is there to find, cannot be represented. Choose at least {width}."
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"The kernel must be a positive odd number, found {kernel}.")
        rows, columns = grid or sizes[-1]
        self.grid = (rows, columns)
        self.jitter = FeatureJitter(jitter_scale, jitter_probability, dim=1)
        widths = [width, hidden, hidden, hidden, width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: list[Tensor]) -> list[Pair]:
        """features: (B, C_l, H_l, W_l) per level. Returns one pair of (B, sum C_l, *grid)."""
        (target,) = self.prepare(features)
        return [Pair(target, self.layers(self.jitter(target)))]


def shortcut_network(
    kind: Shortcut,
    channels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    grid: tuple[int, int] | None = None,
    hidden: int | None = None,
    d_model: int = 256,
    dropout: float | None = None,
    jitter_scale: float | None = None,
    jitter_probability: float = 1.0,
) -> ConcatenatedLevels:
    """One network of the study, as a reconstruction network.

    kind: `mlp`, `cnn`, or UniAD's transformer without mask and with an ordinary decoder: `transformer_one_query`,
        `transformer_no_query`. `uniad` is UniAD itself, to compare with.
    hidden: width of the hidden layers (mlp: 1792, cnn: 512) or of the transformers' feed-forward part (1024).
    d_model: transformers only, width of their tokens.
    dropout: transformers only, 0.1; with 0 it is the control that shows what dropout itself prevents.
    jitter_scale, jitter_probability: 0 = off, the default except for `uniad` (20); an MLP with scale 20 is the control
        that separates denoising from architecture.
    Raises ValueError for an unknown kind, or dropout for a network that has none.
    """
    if kind not in get_args(Shortcut):
        raise ValueError(f'There is no shortcut network "{kind}"; choose from {", ".join(get_args(Shortcut))}.')
    if jitter_scale is None:
        jitter_scale = 20.0 if kind == "uniad" else 0.0
    jitter: dict[str, Any] = {"jitter_scale": jitter_scale, "jitter_probability": jitter_probability}
    if kind in ("mlp", "cnn"):
        if dropout:
            raise ValueError(f"The {kind} has no dropout; found dropout={dropout}. Only the transformers have.")
        kernel, width = (1, 1792) if kind == "mlp" else (3, 512)
        return ConvolutionalShortcut(channels, sizes, kernel=kernel, hidden=hidden or width, grid=grid, **jitter)
    study: dict[str, Any] = {} if kind == "uniad" else {"query": "first", "neighbor_size": None, "mask_places": ()}
    if kind == "transformer_no_query":
        study["query"] = "none"
    return UniAD(
        channels,
        sizes,
        grid=grid,
        d_model=d_model,
        feedforward=hidden or 1024,
        dropout=0.1 if dropout is None else dropout,
        **study,
        **jitter,
    )
