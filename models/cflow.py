"""CFLOW: a normalising flow per backbone level gives the likelihood of every feature vector, told where in the image it lies.

Gudovskiy et al., "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows", WACV
2022, https://arxiv.org/abs/2107.12571. The flows, the position codes and the likelihood are anomalib's, which follow the released
code up to the permutation; training, scale and map are this project's.

    level (B, C, H, W) -> fibres (B H W, C), each with the code of its position -> flow -> log-likelihood per channel (B, H, W)
    map = minus the sum over the levels of exp(log-likelihood - the largest one of a training image)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.tracing import in_parts, tracing
from models.reconstruction import FeatureNetwork

Map = Literal["probability", "log"]
ROWS = 2**13
"""Fibres that are scored at a time."""


class CFLOW(FeatureNetwork):
    """Levels in, log-likelihoods out: 81,647,616 trained parameters for levels 3 to 5 of WideResNet50-2.

    What differs from anomalib: the released map subtracts the largest log-likelihood of the whole test set and anomalib's that
    of the batch, twice, so that an image's map depends on the images beside it. Here it is the largest one of a training image,
    `highest`, estimated once, and the map is the image's own. Scores are neither clamped nor squashed.

    Args:
        channels, sizes: Channels and (height, width) of each level, as the feature extractor gives them.
        coupling_blocks: Coupling blocks of each flow.
        clamp: Of the logarithm of a block's scales (`affine_clamping`).
        condition: Numbers of a position's code, half of the column and half of the row; a multiple of 4.
        permute_soft: Random rotations between the blocks, as released; they take minutes to make above 512 channels. Else
            random permutations, as in anomalib.

    Raises:
        ValueError: `condition` is no multiple of 4, or there is no block.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        coupling_blocks: int = 8,
        clamp: float = 1.9,
        condition: int = 128,
        permute_soft: bool = False,
    ) -> None:
        super().__init__()
        if condition < 4 or condition % 4:
            raise ValueError(f"condition is {condition}; sines and cosines of two axes need a multiple of 4.")
        if coupling_blocks < 1:
            raise ValueError(f"coupling_blocks must be at least 1, found {coupling_blocks}.")
        from anomalib.models.image.cflow.utils import cflow_head, get_logp, positional_encoding_2d

        self._likelihood, self.permute_soft = get_logp, permute_soft
        self.flows = nn.ModuleList(
            cflow_head(condition, coupling_blocks, clamp, width, permute_soft=permute_soft) for width in channels
        )
        for level, (height, width) in enumerate(sizes):
            codes = positional_encoding_2d(condition, height, width).flatten(1).T.contiguous()
            self.register_buffer(f"positions_{level}", codes, persistent=False)
        self.register_buffer("highest", torch.full((len(channels),), torch.nan, dtype=torch.float64))

    def fibres(self, level: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """A level's feature vectors (B H W, C), image by image and row by row, and their position codes (B H W, condition)."""
        codes = self.get_buffer(f"positions_{level}")
        return features.flatten(2).transpose(1, 2).flatten(0, 1), codes.repeat(features.shape[0], 1)

    def log_likelihood(self, level: int, vectors: Tensor, codes: Tensor) -> Tensor:
        """Log-likelihood in nats per channel (N,) of vectors (N, C) with position codes (N, condition)."""
        z, log_determinant = self.flows[level](vectors, [codes])
        return self._likelihood(vectors.shape[1], z, log_determinant) / vectors.shape[1]

    def loss(self, level: int, vectors: Tensor, codes: Tensor) -> Tensor:
        """Mean over the vectors of -log sigmoid(log-likelihood per channel), a float32 scalar."""
        return -F.logsigmoid(self.log_likelihood(level, vectors, codes)).mean()

    @torch.no_grad()
    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Levels (B, C_l, H_l, W_l) -> log-likelihoods per channel, float64 (B, H_l, W_l) each."""
        found = []
        for level, values in enumerate(features):
            parts = zip(*(in_parts(part, ROWS) for part in self.fibres(level, values)), strict=True)
            rows = torch.cat([self.log_likelihood(level, *part) for part in parts])
            found.append(rows.double().view(values.shape[0], *values.shape[2:]))
        return found

    def level_maps(self, likelihoods: Sequence[Tensor], kind: Map = "probability") -> list[Tensor]:
        """Anomaly of every position, float64 (B, H_l, W_l) each, on the scale of the training images.

        kind: `probability`, minus exp(log-likelihood - highest), in [-1, 0] but for what is likelier than any training
            vector; or `log`, highest - log-likelihood, which does not saturate and is in no paper.

        Raises RuntimeError before `highest` is known.
        """
        if kind not in get_args(Map):
            raise ValueError(f'map is "{kind}"; choose one of {", ".join(get_args(Map))}.')
        if not tracing() and self.highest.isnan().any():
            raise RuntimeError(
                "CFLOW has no scale yet: it is estimated from the training images at the end of fit and stored in the "
                "checkpoint. Train the run, or give a checkpoint."
            )
        below = [values - top for values, top in zip(likelihoods, self.highest, strict=True)]
        return [-values if kind == "log" else -values.exp() for values in below]
