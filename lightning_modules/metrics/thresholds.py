"""Thresholds from normal images alone: how high a score must be before it is called a defect.

A threshold `t` calls a score a defect if it is *above* `t`. With the k-th highest of n held-out normal scores as `t`, a normal
image like them is called a defect with probability k / (n + 1) at most, whatever the distribution and however small n is
(split conformal prediction: Vovk et al., Algorithmic Learning in a Random World, 2005). The promise is an average over draws
of the held-out images, and it is void for images that were trained on.

The pixels of one image depend on each other, so what is promised of a pixel threshold is a risk per image: `k / (n + 1)` is
then the chance that a normal image has any pixel above it. It comes from the highest pixel of every normal image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT, CONFORMAL = "max", "conformal"
RULES: dict[str, str] = {
    DEFAULT: "the highest normal score",
    CONFORMAL: "the k-th highest of n normal scores, k = floor(alpha (n + 1)): false alarms of at most alpha",
    "mean_3sd": "mean + 3 standard deviations of the normal scores, or of all pixels of the normal maps (MVTec AD 2's baseline)",
    "p95_factor": "the 95th percentile of the normal scores, or of all pixels of the normal maps, times 1.421 (SuperADD)",
}
"""What each rule takes as threshold. Only `max` and `conformal` promise a rate of false alarms."""
DEVIATIONS = 3
"""Of `mean_3sd`: Heckler-Kram et al., The MVTec AD 2 Dataset, arXiv 2503.21622."""
PERCENTILE, FACTOR = 95, 1.421
"""Of `p95_factor`: released configuration of SuperADD, arXiv 2605.14808, which won the VAND 4.0 challenge's industrial track."""


class RateError(ValueError):
    """A rate of false alarms that so few normal images cannot promise."""


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it promises.

    Attributes:
        value: A score is a defect if it is above this; in units of the scores.
        rule: One of `RULES`.
        n: Normal images that it rests on.
        rate: False alarms per normal image that the rule promises at most, in (0, 1]; NaN for a rule without a promise.
    """

    value: float
    rule: str
    n: int
    rate: float


@dataclass(frozen=True)
class PixelStatistics:
    """All pixels of the normal maps of a category: their number, mean, standard deviation (of them all) and percentiles."""

    count: int
    mean: float
    sd: float
    p95: float
    p99: float
    highest: float


def lowest_rate(n: int) -> float:
    """The lowest rate of false alarms that n held-out normal images can promise: 1 / (n + 1)."""
    return 1 / (n + 1)


def images_needed(alpha: float) -> int:
    """How many held-out normal images the rate alpha needs at least: the smallest n with 1 / (n + 1) <= alpha."""
    return max(0, math.ceil(1 / alpha - 1e-9) - 1)


def check_rule(rule: str | None, alpha: float | None) -> str:
    """The rule that is meant: None is `conformal` with an alpha, else `max`.

    Raises:
        ValueError: an unknown rule, an alpha outside (0, 1), or a rule and an alpha that do not go together.
    """
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(
            f"alpha is {alpha}; it is the wanted rate of false alarms, above 0 and below 1, for example 0.01."
        )
    if rule is None:
        return DEFAULT if alpha is None else CONFORMAL
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; allowed are {', '.join(RULES)}.")
    if rule == CONFORMAL and alpha is None:
        raise ValueError("rule conformal needs alpha, the wanted rate of false alarms, for example 0.01.")
    if rule != CONFORMAL and alpha is not None:
        raise ValueError(f"rule {rule} takes no alpha (found {alpha}): leave one of them out, or take rule conformal.")
    return rule


def threshold(
    normal: Sequence[float] | np.ndarray,
    rule: str | None = None,
    alpha: float | None = None,
    pixels: PixelStatistics | None = None,
) -> Threshold:
    """The threshold that a rule makes of normal images.

    Args:
        normal: float (n,), one number per normal image: its score, or for a pixel threshold the highest pixel of its map.
        rule: One of `RULES`; None is `conformal` with an alpha, else `max`.
        alpha: Wanted rate of false alarms per normal image, in (0, 1).
        pixels: For a pixel threshold: `mean_3sd` and `p95_factor` are then of all pixels, as their authors have it.

    Raises:
        RateError: so few images cannot promise alpha; says what they can, and how many are needed.
        ValueError: no image, a score that is not finite, options as in `check_rule`, or a percentile that is not positive.
    """
    rule = check_rule(rule, alpha)
    scores = np.asarray(normal, dtype=np.float64)
    n = len(scores)
    if n == 0:
        raise ValueError("no normal score, so there is no threshold.")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {n} normal scores are not finite.")
    if rule in (DEFAULT, CONFORMAL):
        k = 1 if alpha is None else math.floor(alpha * (n + 1) + 1e-9)
        if alpha is not None and k < 1:
            raise RateError(
                f"{n} normal images cannot promise a rate of false alarms of {alpha:g}: the lowest that they can is "
                f"1/{n + 1} = {lowest_rate(n):.3g}; {alpha:g} needs {images_needed(alpha)}."
            )
        return Threshold(float(np.partition(scores, n - k)[n - k]), rule, n, k / (n + 1))
    if rule == "mean_3sd":
        mean, sd = (scores.mean(), scores.std()) if pixels is None else (pixels.mean, pixels.sd)
        return Threshold(float(mean + DEVIATIONS * sd), rule, n, math.nan)
    percentile = float(np.percentile(scores, PERCENTILE)) if pixels is None else pixels.p95
    if percentile <= 0:
        raise ValueError(f"rule p95_factor multiplies a percentile of the normal scores, but it is {percentile:g}.")
    return Threshold(percentile * FACTOR, rule, n, math.nan)


def p_values(scores: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """For each score how rare one as high is among normal images: (1 + k) / (1 + n), k of n normal scores being >= it.

    With held-out images this is the conformal p-value: a normal image like them gets one of at most p with probability p.
    None is below 1 / (n + 1). It is at most alpha exactly if the score is above the threshold `conformal` at alpha.

    Args:
        scores: float (N,).
        normal: float (n,).

    Returns:
        float64 (N,) in (0, 1]; NaN for a score that is NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    below = np.searchsorted(np.sort(normal), scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + len(normal) - below) / (1 + len(normal)))


class PixelCollector:
    """Collects the pixels of normal maps for `PixelStatistics`: number, mean, deviation and highest of all.

    The percentiles are of at most `EACH` pixels of every map, evenly picked, so that a thousand maps need 64 MB at most.
    """

    EACH = 2**14

    def __init__(self) -> None:
        self._sums = np.zeros(3)  # number, sum and sum of squares
        self._parts: list[np.ndarray] = []
        self._highest = -math.inf

    def add(self, anomaly_map: np.ndarray) -> None:
        """Takes a map, float (H, W)."""
        pixels = np.asarray(anomaly_map).reshape(-1)
        exact = pixels.astype(np.float64)
        self._sums += exact.size, exact.sum(), np.square(exact).sum()
        self._highest = max(self._highest, float(exact.max()))
        picked = np.linspace(0, pixels.size - 1, min(pixels.size, self.EACH)).astype(np.int64)
        self._parts.append(pixels[picked].astype(np.float32))

    def merge(self, other: PixelCollector) -> None:
        """Takes over what another one, perhaps of another process, has collected."""
        self._sums += other._sums
        self._parts += other._parts
        self._highest = max(self._highest, other._highest)

    def statistics(self) -> PixelStatistics:
        """Of all maps so far.

        Raises:
            ValueError: no map was added.
        """
        count, total, squares = self._sums
        if not count:
            raise ValueError("no map of a normal image was added.")
        mean = total / count
        p95, p99 = np.percentile(np.concatenate(self._parts), (PERCENTILE, 99))
        sd = math.sqrt(max(0.0, squares / count - mean**2))
        return PixelStatistics(int(count), float(mean), sd, float(p95), float(p99), self._highest)
