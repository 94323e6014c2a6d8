"""Exact counts at the distinct scores of anomalous pixels, without sorting the other pixels.

Scores are float32 and are compared as 32-bit integers ("keys") of the same order. A `RankTable` is a bitmap of the
keys that occur among anomalous pixels, with the running number of set bits beside each 64-bit word: how many of them
are <= k is one look-up and one popcount. Counting all pixels by that number ("slot") gives, for every distinct
anomalous score, how many pixels are above it and how many equal it. Counts add up over images, which is what threads,
files on disk and processes use.

Pixels are first grouped by the high bits of their key with scipy's counting sort (the transposition of a one-row sparse
matrix, a few ns per pixel), so that the look-ups walk through the table instead of jumping about in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array

SLICE = 1 << 14  # pixels looked up at a time: the temporaries stay in the first cache levels
GROUP_BITS = 12  # pixels are grouped into at most 4,096 stretches of the key axis


INFINITY = 0x7F800000  # key of +inf; -inf has the key -INFINITY - 1, and NaN lies beyond one of the two


def float_to_key(scores: np.ndarray) -> np.ndarray:
    """int32 keys of float32 scores: a < b exactly if key(a) < key(b); -0.0 has the key of 0.0. Returns a copy.

    Raises ValueError if a score is not finite.
    """
    keys = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 = 0.0
    if not keys.size:
        return keys
    lowest = int(keys.min())
    if lowest < 0:
        np.bitwise_xor(keys, np.int32(0x7FFFFFFF), out=keys, where=keys < 0)
        lowest = int(keys.min())
    if lowest <= -INFINITY - 1 or int(keys.max()) >= INFINITY:
        raise ValueError("scores are not finite")
    return keys


def torch_float_to_key(scores: torch.Tensor) -> torch.Tensor:
    """`float_to_key` of a float32 tensor, on its device."""
    keys = (scores + 0.0).view(torch.int32)
    keys = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    if bool(((keys <= -INFINITY - 1) | (keys >= INFINITY)).any()):
        raise ValueError("scores are not finite")
    return keys


def key_to_float(key: int) -> float:
    """The float32 score of a key."""
    bits = np.array([key if key >= 0 else key ^ 0x7FFFFFFF], dtype=np.int32)
    return float(bits.view(np.float32)[0])


def counting_sort(values: np.ndarray, digits: np.ndarray, n_digits: int) -> np.ndarray:
    """`values` (N,) in stable ascending order of `digits` (int32 (N,), in [0, n_digits)). Linear time."""
    row = csr_array((values, digits, np.array([0, len(values)], dtype=np.int32)), shape=(1, n_digits))
    return row.tocsc().data


def key_order(keys: np.ndarray) -> np.ndarray:
    """int32 (N,): the permutation that sorts int32 keys ascending. Two counting passes of 16 bits each."""
    if not len(keys):
        return np.zeros(0, dtype=np.int32)
    offsets = (keys - keys.min()).view(np.uint32)  # wraps around correctly
    low = (offsets & np.uint32(0xFFFF)).view(np.int32)
    order = counting_sort(np.arange(len(keys), dtype=np.int32), low, 1 << 16)
    high = (offsets >> np.uint32(16)).view(np.int32)[order]
    return counting_sort(order, high, int(high.max()) + 1)


def first_of_each(ordered: np.ndarray) -> np.ndarray:
    """Positions where a new value begins in an ordered array."""
    new = np.empty(len(ordered), dtype=bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


class Workspace:
    """Scratch arrays of one thread for `SLICE` pixels."""

    def __init__(self) -> None:
        self.index = np.empty(SLICE, dtype=np.int64)
        self.a, self.b = (np.empty(SLICE, dtype=np.int32) for _ in range(2))
        self.words, self.shift = (np.empty(SLICE, dtype=np.uint64) for _ in range(2))
        self.bits, self.more = (np.empty(SLICE, dtype=np.uint8) for _ in range(2))
        self.ones = torch.ones(SLICE, dtype=torch.int32)
        self._slots = np.empty(0, dtype=np.int32)

    def slots(self, size: int) -> np.ndarray:
        """int32 (size,) zeros, in memory that is used again."""
        if len(self._slots) < size:
            self._slots = np.empty(size, dtype=np.int32)
        self._slots[:size] = 0
        return self._slots[:size]


class RankTable:
    """Slots of keys among a set of distinct keys.

    keys: arrays of ascending, distinct int32 keys; the set is their union and must not be empty. low: no key that is
    looked up is below it (default: one below the lowest member).
    The slot of a key k is 2 * (members <= k) - (1 if k is a member), 0 .. 2 * size.
    """

    def __init__(self, keys: Sequence[np.ndarray], low: int | None = None) -> None:
        keys = [k for k in keys if len(k)]
        self.low = min(int(k[0]) for k in keys) - 1 if low is None else low
        self.span = max(int(k[-1]) for k in keys) + 1 - self.low  # all higher keys have the slot of this offset
        self.words = np.zeros((self.span >> 6) + 1, dtype=np.uint64)
        for k in keys:
            offsets = self.offsets(k)
            index = offsets >> np.uint32(6)
            first = first_of_each(index)
            bits = np.uint64(1) << (offsets & np.uint32(63)).astype(np.uint64)
            self.words[index[first]] |= np.bitwise_or.reduceat(bits, first)
        bits = np.bitwise_count(self.words)
        self.below = np.cumsum(bits, dtype=np.int32)  # members in lower words, twice
        self.size = int(self.below[-1])
        self.below -= bits
        self.below *= 2
        self.group_shift = max(0, self.span.bit_length() - GROUP_BITS)

    def members(self) -> np.ndarray:
        """int32 (size,): the set, ascending."""
        bits = np.unpackbits(self.words.view(np.uint8), bitorder="little")
        return (np.flatnonzero(bits) + self.low).astype(np.int32)

    def offsets(self, keys: np.ndarray) -> np.ndarray:
        """uint32 distances of int32 keys from `low` (wraps around: keys below `low` become very large)."""
        return keys.view(np.uint32) - np.uint32(self.low & 0xFFFFFFFF)

    def group(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets (uint32 (N,), overwritten), cut at the span, grouped by their high bits."""
        np.minimum(offsets, np.uint32(self.span), out=offsets)
        digits = (offsets >> np.uint32(self.group_shift)).view(np.int32)
        return counting_sort(offsets, digits, (self.span >> self.group_shift) + 1)

    def slots(self, offsets: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 slots, in `space.a`, of at most SLICE offsets (uint32, at most the span)."""
        n = len(offsets)
        slots, b, index, shift = space.a[:n], space.b[:n], space.index[:n], space.shift[:n]
        words, bits, more = space.words[:n], space.bits[:n], space.more[:n]
        np.right_shift(offsets, np.uint32(6), out=b.view(np.uint32))
        np.copyto(index, b)
        np.take(self.words, index, out=words, mode="clip")
        np.take(self.below, index, out=slots, mode="clip")
        np.invert(offsets, out=b.view(np.uint32))
        np.bitwise_and(b, 63, out=b)  # 63 - (offset & 63)
        np.copyto(shift, b, casting="unsafe")
        np.left_shift(words, shift, out=words)  # keeps the bits up to the key's, which is now the highest
        np.bitwise_count(words, out=bits)
        np.left_shift(words, np.uint64(1), out=words)  # drops the key's own bit
        np.bitwise_count(words, out=more)
        np.add(bits, more, out=bits)
        np.add(slots, bits, out=slots)
        return slots

    def count(self, offsets: np.ndarray, slots: np.ndarray, space: Workspace) -> None:
        """Adds to `slots` (int32 (2 * size + 1,)) the number of offsets (uint32 (N,), overwritten) in each slot."""
        target = torch.from_numpy(slots)
        grouped = self.group(offsets)
        for start in range(0, len(grouped), SLICE):
            slot = self.slots(grouped[start : start + SLICE], space)
            target.index_add_(0, torch.from_numpy(slot), space.ones[: len(slot)])

    def positions(self, keys: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 (N,): which member, ascending, each of the keys (all members) is."""
        offsets = self.offsets(keys)
        result = np.empty(len(keys), dtype=np.int32)
        for start in range(0, len(keys), SLICE):
            result[start : start + SLICE] = self.slots(offsets[start : start + SLICE], space) >> 1
        return result
