"""Whether a run done again gives its reference record's numbers, up to what another machine's rounding can move.

Another processor, number of threads or library adds the same numbers in another order. Features and a few training steps then
differ by a relative error, and with them every image's score: by `NOISE` at most. What a metric may move follows by
counting. A ranking changes only where two scores closer than the noise change places: of n anomalous and m normal images each
such pair moves the AUROC by 1 / (n m), and average precision by at most the share of anomalous images that have such a
neighbour. A record holds no pixel's score, so that for pixels the share of close pairs is bounded: it is the noise times the
density of scores, which for scores that spread over a tenth of their size is below ten (`PIXELS`).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass

from results.aggregator.records import StoredRecord

NOISE = 1e-4
"""Largest relative difference of an image's score. Measured over the small cells: 2.3e-7 between one and two threads."""
PIXELS = 10 * NOISE
"""Largest difference of a pixel metric, as a fraction."""
SCORES = "image_scores.csv"
COMPARED = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_aupro")


@dataclass(frozen=True)
class Outcome:
    """score: largest relative difference of an image's score; problems: a line per number beyond its tolerance."""

    score: float
    metric: float
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every number lies within its tolerance."""
        return not self.problems

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        told = f"image scores differ by at most {self.score:.1e} (allowed {NOISE:.0e}), metrics by {100 * self.metric:.2f} points"
        return f"agrees; {told}" if self.agrees else f"DIFFERS; {told}: {'; '.join(self.problems)}"


def compare(reference: StoredRecord, again: StoredRecord) -> Outcome:
    """Compare image scores and metrics of a run with those of its reference record."""
    before, now = _scores(reference), _scores(again)
    problems = []
    if set(before) != set(now):
        problems.append(f"{len(set(before) ^ set(now))} images are in one of the two only")
    scale = {category: _spread([s for (c, _), (s, _) in before.items() if c == category]) for category, _ in before}
    score = max(
        (
            abs(now[key][0] - value) / max(abs(value), scale[key[0]], 1e-12)
            for key, (value, _) in before.items()
            if key in now
        ),
        default=0.0,
    )
    if score > NOISE:
        problems.append(f"an image's score differs by {score:.1e}")
    largest = 0.0
    for (variant, scope, dataset, category, metric), (value, _) in reference.scores.items():
        if scope != "category" or variant or metric not in COMPARED or math.isnan(value):
            continue
        other = again.scores.get((variant, scope, dataset, category, metric), (math.nan, ""))[0]
        pairs = [item for (c, _), item in before.items() if c == category]
        allowed = tolerance(metric, pairs)
        difference = abs(other - value)
        largest = max(largest, difference)
        if not difference <= allowed:  # also NaN
            problems.append(
                f"{metric} of {category}: {100 * value:.2f}, now {100 * other:.2f}, allowed {100 * allowed:.2f}"
            )
    return Outcome(score, largest, tuple(problems))


def tolerance(metric: str, images: list[tuple[float, bool]]) -> float:
    """How far a metric of a category may move, as a fraction.

    images: score and whether it is anomalous, of every test image of the category in the reference record.
    """
    if metric.startswith("pixel"):
        return PIXELS
    good = [score for score, anomalous in images if not anomalous]
    bad = [score for score, anomalous in images if anomalous]
    scale = _spread([score for score, _ in images])
    near = [(b, g) for b in bad for g in good if abs(b - g) <= 2 * NOISE * max(abs(b), abs(g), scale)]
    if metric == "image_auroc":
        return len(near) / max(1, len(bad) * len(good)) + 1e-9
    return len({b for b, _ in near}) / max(1, len(bad)) + 1e-9


def _spread(values: list[float]) -> float:
    """Distance between the lowest and the highest value: scores around zero have no size of their own."""
    return max(values) - min(values) if values else 0.0


def _scores(stored: StoredRecord) -> dict[tuple[str, str], tuple[float, bool]]:
    """(category, file) -> (image score, anomalous)."""
    with (stored.path / SCORES).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["category"], "/".join(row["path"].split("/")[-3:])): (float(row["image_score"]), row["label"] == "1")
        for row in rows
    }
