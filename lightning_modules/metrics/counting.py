"""Exact counts at the distinct scores of anomalous pixels, without sorting the other pixels.

Scores are float32 and are compared as 32-bit integers ("keys") of the same order. A `RankTable` is a bitmap of the
keys that occur among anomalous pixels, in pages of 65,536 keys, with the running number of set bits beside each 64-bit
word: how many of them are <= k is one look-up and one popcount. Counting all pixels by that number ("slot") gives, for
every distinct anomalous score, how many pixels are above it and how many equal it. Counts add up over images, which is
what threads, files on disk and processes use.

Pixels are first grouped by the high bits of their key with scipy's counting sort (the transposition of a one-row sparse
matrix, a few ns per pixel), so that the look-ups walk through the table instead of jumping about in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array

PAGE_BITS = 16
WORD_BITS = 6
PAGE_WORDS = 1 << (PAGE_BITS - WORD_BITS)
SLICE = 1 << 14  # pixels looked up at a time: the temporaries stay in the first cache levels
GROUP_BITS = 12  # pixels are grouped into at most 4,096 stretches of the key axis


def float_to_key(scores: np.ndarray) -> np.ndarray:
    """int32 keys of float32 scores: a < b exactly if key(a) < key(b); -0.0 has the key of 0.0. Returns a copy."""
    keys = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 = 0.0
    if keys.size and keys.min() < 0:
        np.bitwise_xor(keys, np.int32(0x7FFFFFFF), out=keys, where=keys < 0)
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
        self.a, self.b, self.c = (np.empty(SLICE, dtype=np.int32) for _ in range(3))
        self.words, self.shift = (np.empty(SLICE, dtype=np.uint64) for _ in range(2))
        self.bits = np.empty(SLICE, dtype=np.uint8)
        self.ones = torch.ones(SLICE, dtype=torch.int64)
        self.ones32 = torch.ones(SLICE, dtype=torch.int32)


class BitRanks:
    """A set of bit positions with a running count.

    words: uint64 (W,); `count(index, position)` gives, for bit `position & 63` of word `index`, the number of set bits
    up to and including it, and the bit itself.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.words = words
        bits = np.bitwise_count(words)
        self.below = np.cumsum(bits, dtype=np.int32)
        self.below -= bits

    def count(self, space: Workspace, n: int, position: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Reads word indices from `space.index[:n]`; overwrites `position`; fills `out` (counts), returns the bits."""
        index, words, shift, bits = space.index[:n], space.words[:n], space.shift[:n], space.bits[:n]
        np.take(self.words, index, out=words, mode="clip")
        np.take(self.below, index, out=out, mode="clip")
        np.bitwise_and(position, 63, out=position)
        np.subtract(63, position, out=position)
        np.copyto(shift, position, casting="unsafe")
        np.left_shift(words, shift, out=words)  # the wanted bit is now the highest, the bits above it are gone
        np.bitwise_count(words, out=bits)
        np.add(out, bits, out=out)
        np.right_shift(words, np.uint64(63), out=words)
        np.copyto(position, words, casting="unsafe")
        return position


class RankTable:
    """Slots of keys among a set of distinct keys.

    keys: arrays of ascending, distinct int32 keys; the set is their union and must not be empty.
    The slot of a key k is 2 * (members <= k) - (1 if k is a member), 0 .. 2 * size.
    """

    def __init__(self, keys: Sequence[np.ndarray]) -> None:
        keys = [k for k in keys if len(k)]
        self.low = min(int(k[0]) for k in keys) - 1  # everything outside has the slot of these two
        self.high = max(int(k[-1]) for k in keys) + 1
        n_pages = ((self.high - self.low) >> PAGE_BITS) + 1
        offsets = [self._offsets(k) for k in keys]
        occupied = np.zeros(n_pages, dtype=bool)
        for offset in offsets:
            occupied[offset >> PAGE_BITS] = True
        sizes = np.where(occupied, PAGE_WORDS, 1)  # a page without members needs one word, for its running count
        self.page_start = (np.cumsum(sizes) - sizes).astype(np.int32)
        self.page_mask = (sizes - 1).astype(np.int32)
        words = np.zeros(int(sizes.sum()), dtype=np.uint64)
        for offset in offsets:
            index = self.page_start[offset >> PAGE_BITS] + ((offset >> WORD_BITS) & (PAGE_WORDS - 1))
            first = first_of_each(index)
            bits = np.uint64(1) << (offset & 63).astype(np.uint64)
            words[index[first]] |= np.bitwise_or.reduceat(bits, first)
        self.ranks = BitRanks(words)
        self.size = int(self.ranks.below[-1]) + int(np.bitwise_count(words[-1]))
        self.group_shift = max(0, (self.high - self.low).bit_length() - GROUP_BITS)

    def _offsets(self, keys: np.ndarray) -> np.ndarray:
        return (keys.view(np.uint32) - np.uint32(self.low & 0xFFFFFFFF)).astype(np.int64)

    def group(self, keys: np.ndarray) -> np.ndarray:
        """Offsets (uint32) of `keys` (int32 (N,), overwritten) from `low`, grouped by their high bits."""
        np.clip(keys, self.low, self.high, out=keys)
        offsets = keys.view(np.uint32)
        np.subtract(offsets, np.uint32(self.low & 0xFFFFFFFF), out=offsets)
        digits = (offsets >> np.uint32(self.group_shift)).view(np.int32)
        return counting_sort(offsets, digits, ((self.high - self.low) >> self.group_shift) + 1)

    def slots(self, offsets: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 slots, in `space.a`, of at most SLICE offsets."""
        n = len(offsets)
        start, inside, slots, index = space.b[:n], space.c[:n], space.a[:n], space.index[:n]
        np.right_shift(offsets, np.uint32(PAGE_BITS), out=start.view(np.uint32))
        np.copyto(index, start)
        np.take(self.page_start, index, out=start, mode="clip")
        np.take(self.page_mask, index, out=inside, mode="clip")
        np.right_shift(offsets, np.uint32(WORD_BITS), out=slots.view(np.uint32))
        np.bitwise_and(slots, inside, out=slots)
        np.add(slots, start, out=slots)
        np.copyto(index, slots)
        np.copyto(inside.view(np.uint32), offsets)
        bit = self.ranks.count(space, n, inside, slots)
        np.add(slots, slots, out=slots)
        np.subtract(slots, bit, out=slots)
        return slots

    def positions(self, keys: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 (N,): which member each key is (ascending, distinct members)."""
        result = np.empty(len(keys), dtype=np.int32)
        for start in range(0, len(keys), SLICE):
            offsets = self._offsets(keys[start : start + SLICE]).astype(np.uint32)
            result[start : start + SLICE] = self.slots(offsets, space) >> 1
        return result


class SubsetTable:
    """Slots among some members of a `RankTable`, computed from the slots of the whole table.

    positions: int32 (U,), ascending: which members belong to the subset; size: number of members of the whole table.
    """

    def __init__(self, positions: np.ndarray, size: int) -> None:
        bits = np.zeros(((size >> 6) + 1) << 6, dtype=np.uint8)
        bits[positions.astype(np.int64) + 1] = 1  # bit i + 1, so that "members <= i" counts the bits up to i + 1
        self.ranks = BitRanks(np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64))
        self.size = len(positions)

    def slots(self, slots: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 slots, in `space.a`, from slots of the whole table (in `space.a` as well; overwritten)."""
        n = len(slots)
        equal, position, index = space.b[:n], space.c[:n], space.index[:n]
        np.bitwise_and(slots, 1, out=equal)
        np.add(slots, equal, out=position)
        np.right_shift(position, 1, out=position)
        np.right_shift(position, WORD_BITS, out=slots)
        np.copyto(index, slots)
        bit = self.ranks.count(space, n, position, slots)
        np.bitwise_and(bit, equal, out=bit)
        np.add(slots, slots, out=slots)
        np.subtract(slots, bit, out=slots)
        return slots


def counts_from_slots(slots: np.ndarray, above: int) -> tuple[np.ndarray, np.ndarray]:
    """(at or above, above) for each member, ascending, int64 (U,), from the number of pixels in each slot (2U + 1,).

    above: pixels that lie above everything counted in `slots`.
    """
    running = np.cumsum(slots[:0:-1], dtype=np.int64)[::-1] + above  # pixels in this slot or a higher one
    return running[0::2], running[1::2]
