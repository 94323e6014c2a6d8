"""A run as one graph: resized photographs in, maps and image scores out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.running.loading import TrainedModel


class Scorer(nn.Module):
    """Normalisation, backbone, network and head of a run, in float32.

    Args:
        model: The run's. A method that must be told the category gets the model's; it is then a constant of the graph.

    Attributes:
        outputs: Names of what `forward` returns: `maps`, unless the method has none, and `image_scores`.

    Raises:
        ValueError: no graph can compute the method's scores; says why.
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.module = model.module
        if self.module.unexported:
            raise ValueError(f"{self.module.method} cannot be exported: {self.module.unexported}.")
        if (tiles := model.preparation.tiles) is not None:
            raise ValueError(
                f"this run cannot be exported: it scores {tiles} of a photograph and stitches their maps, and a graph scores one "
                "image. Use load_run, or train without data.init_args.tiles."
            )
        self.outputs = ("maps", "image_scores") if self.module.has_map else ("image_scores",)
        self.category, self.dataset = model.category, model.dataset
        for name in ("mean", "std"):
            values = torch.tensor(getattr(model.preparation, name))
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Scores images, uint8 (B, height, width, 3), RGB, of the run's size.

        Returns:
            `outputs`: maps, float32 (B, h, w), and image scores, float32 (B,). Higher is more anomalous.
        """
        normalised = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        batch: dict[str, Any] = {"image": normalised}
        if self.category:
            batch |= {"category": [self.category], "dataset": [self.dataset]}  # one stands for all
        scored = self.module.evaluate(batch)[""]
        return tuple(getattr(scored, name) for name in self.outputs)
