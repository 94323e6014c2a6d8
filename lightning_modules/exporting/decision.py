"""The thresholds of a run, as a file's metadata hold them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_modules.decisions import HELD_OUT, Decider
from lightning_modules.metrics.thresholds import Threshold


def thresholds(
    record: Path, run: dict[str, Any], category: str, rule: str | None = None, alpha: float | None = None
) -> dict[str, Any]:
    """What decides, per category: an image is a defect if its score is above the threshold, a pixel likewise.

    Args:
        record: The run's record.
        run: The section of its configuration, with the run's own `rule` and `alpha`.
        category: The only one that counts; "" for all.
        rule, alpha: Others than the run's own.

    Raises:
        ValueError: the kept normal images cannot promise what is asked for.
    """
    asked = rule is not None or alpha is not None
    if not asked:
        rule, alpha = run.get("rule"), run.get("alpha")
    try:
        decider = Decider.of(record, rule, alpha, category)
        why = "" if decider else "the record keeps no scores of normal images"
    except ValueError as error:
        if asked:
            raise
        decider, why = None, str(error)
    if decider is None:
        return {"reason": why, "thresholds": {}}
    names = [decider.given] if decider.given else decider.names
    return {"rule": decider.rule, "alpha": alpha, "thresholds": {name: _of_category(decider, name) for name in names}}


def _of_category(decider: Decider, name: str) -> dict[str, Any]:
    decision, scale = decider.decide(0.0, name), decider.colour_scale(name)
    threshold = None if decision.reason else decision.threshold
    return {
        "image": threshold.value if threshold else None,
        "pixel": decision.pixel_threshold.value if decision.pixel_threshold else None,
        "false_alarms_at_most": _rate(threshold, decision.basis) if threshold else None,
        "normal_images": decider.count(name),
        "basis": decision.basis,
        "reason": decision.reason,
        "colour_scale": scale and list(scale),
    }


def _rate(threshold: Threshold, basis: str) -> float | None:
    """What the rule promises per good image; None for a rule without a promise, and of images that were not held out."""
    return None if math.isnan(threshold.rate) or basis != HELD_OUT else threshold.rate
