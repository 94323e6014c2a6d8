"""Scores as integers of the same order: the one map from float32 scores to 32-bit keys and back."""

from __future__ import annotations

import numpy as np

INFINITY = 0x7F800000  # key of +inf; -inf has the key -INFINITY - 1, and NaN lies beyond one of the two
LOWEST, HIGHEST = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)  # below and above the keys of all finite scores


def float_to_key(scores: np.ndarray) -> np.ndarray:
    """int32 keys of float32 scores: a < b exactly if key(a) < key(b); -0.0 has the key of 0.0. Returns a copy.

    Raises ValueError if a score is not finite.
    """
    keys = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 = 0.0
    if not keys.size:
        return keys
    lowest = int(keys.min())
    if lowest < 0:
        np.bitwise_xor(keys, HIGHEST, out=keys, where=keys < 0)
        lowest = int(keys.min())
    if lowest <= -INFINITY - 1 or int(keys.max()) >= INFINITY:
        raise ValueError("scores are not finite")
    return keys


def key_to_float(key: int) -> float:
    """The float32 score of a key."""
    bits = np.array([key if key >= 0 else key ^ 0x7FFFFFFF], dtype=np.int32)
    return float(bits.view(np.float32)[0])
