"""What a file says of itself: everything that a program needs besides the graph, as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_modules.exporting.agreement import Deviation
from lightning_modules.exporting.formats import INPUT
from lightning_modules.running.loading import TrainedModel
from results.aggregator.records import StoredRecord
from results.common.pair import label

VERSION = 1
PILLOW = {
    "pil_bilinear": {"call": "resize", "filter": "BILINEAR", "largest_difference": 0},
    "pil_lanczos": {"call": "resize", "filter": "LANCZOS", "largest_difference": 0},
    "pil_nearest": {"call": "resize", "filter": "NEAREST", "largest_difference": 0},
    "opencv_bilinear": {"call": "transform", "filter": "BILINEAR", "largest_difference": 1},
}
"""How Pillow makes what the run's resize makes, and by how many of 256 levels a pixel may differ then.

OpenCV's bilinear resize does not average when it shrinks. Pillow's affine transform samples at the same places, and cuts
fractions off where OpenCV rounds.
"""


def describe(
    model: TrainedModel, names: Sequence[str], stored: StoredRecord, decision: dict[str, Any]
) -> dict[str, Any]:
    """The metadata before the check.

    Args:
        model: The run's.
        names: Of the file's outputs.
        stored: Its record.
        decision: Thresholds, see `lightning_modules.exporting.decision`.
    """
    preparation, record = model.preparation, stored.record
    several = len(record.datasets) > 1
    categories = [label(dataset if several else "", name) for dataset, name in record.category_keys]
    outputs: dict[str, Any] = {
        "maps": {"dtype": "float32", "axes": ["batch", "height", "width"]},
        "image_scores": {"dtype": "float32", "axes": ["batch"]},
    }
    return {
        "version": VERSION,
        "run": stored.name,
        "method": record.method,
        "backbone": {key: record.backbone.get(key) for key in ("name", "weights", "sha256")},
        "image_size": list(preparation.size),
        "resize_to": list(preparation.crop_from or preparation.size),
        "resize": {"rule": preparation.resize, "pillow": PILLOW[preparation.resize]},
        "bit_depth": preparation.bit_depth,
        "normalisation": {"mean": list(preparation.mean), "std": list(preparation.std), "inside": True},
        "input": {"name": INPUT, "dtype": "uint8", "axes": ["batch", "height", "width", "RGB"]},
        "outputs": {name: outputs[name] for name in names},
        "precision": {"file": "float32", "run": model.precision},
        "categories": [model.category] if model.category else categories,
        "decision": decision,
    }


def checked(images: str, program: str, deviations: Sequence[Deviation]) -> dict[str, Any]:
    """What the check found, for the metadata."""
    found = {
        d.name: {"largest_difference": d.largest, "tolerance": d.tolerance, "range": [d.low, d.high]}
        for d in deviations
    }
    return {"images": images, "by": program, "outputs": found}
