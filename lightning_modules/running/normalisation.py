"""Pixels are normalised as the backbone's weights were trained, unless the user says otherwise."""

from __future__ import annotations

import warnings
from typing import Any

from datamodules import UnifiedDataModule
from lightning_modules.base import ReconstructionModule


def follow_weights(model: ReconstructionModule, data: UnifiedDataModule, options: Any) -> None:
    """Gives the data module the weights' mean and std where none are given, and writes them into its `options`.

    Given ones are kept; if they are not the weights' own, a warning says so.
    """
    data.normalise(model.extractor.mean, model.extractor.std)
    options.mean, options.std = data.mean, data.std
    for note in notes(model, data):
        warnings.warn(note, stacklevel=2)


def described(model: ReconstructionModule, data: UnifiedDataModule) -> str:
    """What the network gets to see, in one line: size, resize rule, normalisation, and how its backbone pads.

    Args:
        model: The method.
        data: Its data, set up.
    """
    padding = model.extractor.provenance.get("padding")
    return (
        f"Images: {data.image_size[0]}x{data.image_size[1]} ({data.resizing}), mean {_text(data.mean)}, std {_text(data.std)}"
        + (f"; backbone's padding: {padding}" if padding else "")
    )


def notes(model: ReconstructionModule, data: UnifiedDataModule) -> list[str]:
    """What a reader of the run's numbers must know: that pixels are not normalised as the weights expect."""
    extractor = model.extractor
    if (data.mean, data.std) == (extractor.mean, extractor.std):
        return []
    return [
        f"pixels are normalised with mean {_text(data.mean)}, std {_text(data.std)} as given, but the weights of "
        f"{extractor.provenance['name']} expect mean {_text(extractor.mean)}, std {_text(extractor.std)}"
    ]


def _text(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
