"""Whether a written file gives the maps and scores of its run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.dataset import normalise, normalised_levels
from lightning_modules.exporting.formats import Runner
from lightning_modules.exporting.images import CheckImages
from lightning_modules.exporting.rounding import tolerances
from lightning_modules.running.loading import TrainedModel

BATCH = 8
"""Images that are scored at a time; the file also scores the first image alone."""


@dataclass(frozen=True)
class Deviation:
    """Of one output.

    Attributes:
        name: `maps` or `image_scores`.
        largest: Largest absolute difference of file and run over all values.
        tolerance: The largest that rounding explains, see `lightning_modules.exporting.rounding`.
        low, high: Range of the run's values.
        recorded: Largest absolute difference of the file's image scores and those in the run's record, which another machine
            may have computed; None where there are none.
    """

    name: str
    largest: float
    tolerance: float
    low: float
    high: float
    recorded: float | None = None


class Disagreement(ValueError):
    """A file does not give what its run gives."""


@torch.no_grad()
def compare(model: TrainedModel, outputs: Sequence[str], images: CheckImages, run: Runner) -> list[Deviation]:
    """The deviations of a file from the run in float32, within their tolerances.

    Args:
        model: The run's.
        outputs: Names of the file's outputs, in their order.
        images: What both score.
        run: Runs the file.

    Raises:
        Disagreement: one is larger, or not a number; names the output and the image.
    """
    levels = normalised_levels(model.preparation.mean, model.preparation.std)
    normalised = torch.stack([normalise(pixels.numpy(), levels) for pixels in images.pixels])

    def score() -> tuple[Tensor, ...]:
        parts = [model.score(part) for part in normalised.split(BATCH)]
        return tuple(torch.cat([getattr(part, name) for part in parts]) for name in outputs)

    expected, allowed = score(), tolerances(score)
    found = [np.concatenate(parts) for parts in zip(*_batches(run, images.pixels.numpy()), strict=True)]
    alone = run(images.pixels[:1].numpy())
    deviations = []
    for name, values, one, many, tolerance in zip(outputs, expected, alone, found, allowed, strict=True):
        wanted = values.numpy()
        if many.shape != wanted.shape:
            raise Disagreement(
                f"The file's {name} have shape {many.shape}, the run's {wanted.shape}: nothing is exported."
            )
        differences = np.abs(many - wanted)
        differences[0] = np.maximum(differences[0], np.abs(one[0] - wanted[0]))
        per_image = differences.reshape(len(wanted), -1).max(axis=1)
        worst = int(per_image.argmax())  # also a NaN
        if not per_image[worst] <= tolerance:
            raise Disagreement(
                f"The file's {name} differ from the run's by {per_image[worst]:.2g} on {images.names[worst]}, and rounding "
                f"explains {tolerance:.2g}: nothing is exported."
            )
        recorded = None
        if name == "image_scores" and images.recorded is not None:
            recorded = float(np.abs(many - images.recorded).max())
        span = float(wanted.min()), float(wanted.max())
        deviations.append(Deviation(name, float(per_image[worst]), tolerance, *span, recorded))
    return deviations


def _batches(run: Runner, pixels: np.ndarray) -> Iterator[Any]:
    for first in range(0, len(pixels), BATCH):
        yield run(pixels[first : first + BATCH])
