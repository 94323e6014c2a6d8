"""Which class an image shows, from frozen features: a linear classifier that is fitted, not trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PooledClassifier(nn.Module):
    """Multinomial logistic regression on the mean and the maximum of each channel. Everything is a buffer.

    channels: of the feature map; classes: how many; penalty: of the squared weights, relative to the mean loss.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, classes: int, penalty: float = 1e-3) -> None:
        super().__init__()
        self.penalty = penalty
        self.register_buffer("weight", torch.zeros(classes, 2 * channels))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(2 * channels))
        self.register_buffer("scale", torch.ones(2 * channels))

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called, or a fitted state loaded; always true for a single class."""
        return len(self.bias) == 1 or bool(self.weight.any())

    @staticmethod
    def pool(features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2C) float32: means, then maxima."""
        features = features.float()
        return torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to the most likely class of each image, (B,) int64. Raises RuntimeError before `fit`."""
        if not self.fitted:
            raise RuntimeError("The classifier of classes was never fitted: train the model, or load a trained one.")
        return self.logits(self.pool(features)).argmax(1)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, 2C) to (B, classes)."""
        return (pooled - self.mean) / self.scale @ self.weight.T + self.bias

    @torch.inference_mode(False)
    def fit(self, pooled: Tensor, classes: Tensor) -> None:
        """Finds the minimum of mean cross-entropy + penalty * squared weights for pooled features (N, 2C) of known classes.

        Deterministic: the same data in the same order give the same classifier.
        """
        self.mean.copy_(pooled.mean(0))
        self.scale.copy_(pooled.std(0, correction=0).clamp_min(1e-6))
        inputs, classes = (pooled.detach() - self.mean) / self.scale, classes.to(pooled.device)
        weight = torch.zeros_like(self.weight, requires_grad=True)
        bias = torch.zeros_like(self.bias, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(inputs @ weight.T + bias, classes) + self.penalty * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(objective)
        self.weight.copy_(weight.detach())
        self.bias.copy_(bias.detach())
