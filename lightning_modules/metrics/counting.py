"""Exact counts at the distinct scores of anomalous pixels, without sorting the other pixels.

Scores are float32 and are compared as 32-bit integers ("keys") of the same order. A `RankTable` is a bitmap of the
keys that occur among anomalous pixels, with the running number of set bits beside each 64-bit word: how many of them
are <= k is one look-up and one popcount. Counting all pixels by that number ("slot") gives, for every distinct
anomalous score, how many pixels are above it and how many equal it. Counts add up over images, which is what threads,
files on disk and processes use.

The pixels of an image are grouped once by the high 16 bits of their key (their "page") with scipy's counting sort (the
transposition of a one-row sparse matrix, a few ns per pixel). Then the key axis is worked through in windows of a few
pages, whose tables and counts stay in the cache of a core and whose pixels are slices of the groups.

Both loops over the pixels also exist as machine code (`kernels.py`), for evaluations that are worth the start of numba.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from types import ModuleType

import numpy as np
import torch
from scipy.sparse import csr_array

from .regions import Regions

SLICE = 1 << 14  # pixels looked up at a time: the temporaries stay in the first cache levels
PAGE_BITS = 16
KERNEL_PIXELS = 1 << 25  # numba's import and the load of its cache take about as long as it saves on these
INFINITY = 0x7F800000  # key of +inf; -inf has the key -INFINITY - 1, and NaN lies beyond one of the two


_kernels: dict[str, ModuleType | None] = {}  # "module" once numba was asked for
_lock = threading.Lock()


def kernels(pixels: int) -> ModuleType | None:
    """The compiled loops (`kernels.py`) for an evaluation of so many pixels.

    None for fewer than `KERNEL_PIXELS`, unless they are loaded already, and where numba cannot be imported or is told
    not to compile (NUMBA_DISABLE_JIT): numpy then counts the same, more slowly.
    """
    with _lock:
        if "module" not in _kernels and pixels >= KERNEL_PIXELS:
            try:
                from . import kernels as module

                _kernels["module"] = None if module.numba.config.DISABLE_JIT else module
            except ImportError:
                _kernels["module"] = None
    return _kernels.get("module")


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


def group_pages(keys: np.ndarray) -> np.ndarray:
    """The int32 keys (N,) with their pages (key >> 16) in ascending order."""
    if not len(keys):
        return keys
    pages = keys >> PAGE_BITS
    pages -= pages.min()
    return counting_sort(keys, pages, int(pages.max()) + 1)


class Workspace:
    """Scratch arrays of one thread. counts: integer type of the pixel counts; compiled: what `kernels` returned."""

    def __init__(self, counts: type, compiled: ModuleType | None = None) -> None:
        self.compiled = compiled
        self.spare = np.empty(0, dtype=np.int32)
        self.places = np.empty((1 << PAGE_BITS) + 1, dtype=np.int32)
        self.index = np.empty(SLICE, dtype=np.int64)
        self.a, self.b = (np.empty(SLICE, dtype=np.int32) for _ in range(2))
        self.words, self.shift = (np.empty(SLICE, dtype=np.uint64) for _ in range(2))
        self.bits, self.more = (np.empty(SLICE, dtype=np.uint8) for _ in range(2))
        self.ones = torch.from_numpy(np.ones(SLICE, dtype=counts))
        self._slots = np.empty(0, dtype=counts)

    def slots(self, size: int) -> np.ndarray:
        """(size,) zeros, in memory that is used again."""
        if len(self._slots) < size:
            self._slots = np.empty(size, dtype=self._slots.dtype)
        self._slots[:size] = 0
        return self._slots[:size]

    def arrange(self, keys: np.ndarray, regions: Regions) -> int:
        """Reorder the int32 keys of a map in place: normal pixels, by page, then anomalous pixels, run after run.

        Returns the number of normal pixels.
        """
        if self.compiled is not None:
            if len(self.spare) < len(keys):
                self.spare = np.empty(len(keys), dtype=np.int32)
            return self.compiled.arrange(keys, regions.starts, regions.lengths, self.spare, self.places)
        index = regions.index()
        if not len(index):
            keys[:] = group_pages(keys)
            return len(keys)
        outside = np.ones(len(keys), dtype=bool)
        outside[index] = False
        keys[:] = np.concatenate((group_pages(keys[outside]), keys[index]))
        return len(keys) - len(index)


class RankTable:
    """Slots of keys among a set of distinct keys.

    keys: arrays of ascending, distinct int32 keys; the set is their union and must not be empty. low: no key, member or
    not, is below it.
    The slot of a key k is 2 * (members <= k) - (1 if k is a member), 0 .. 2 * size.
    """

    def __init__(self, keys: Sequence[np.ndarray], low: int) -> None:
        keys = [k for k in keys if len(k)]
        self.low = low
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

    def members(self) -> np.ndarray:
        """int32 (size,): the set, ascending."""
        bits = np.unpackbits(self.words.view(np.uint8), bitorder="little")
        return (np.flatnonzero(bits) + self.low).astype(np.int32)

    def offsets(self, keys: np.ndarray) -> np.ndarray:
        """uint32 distances of int32 keys from `low` (wraps around: keys below `low` become very large)."""
        return keys.view(np.uint32) - np.uint32(self.low & 0xFFFFFFFF)

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

    def count(self, keys: Iterable[np.ndarray], space: Workspace) -> np.ndarray:
        """(2 * size + 1,), in memory of `space`: how many of the keys have this slot or a higher one.

        keys: int32 arrays, overwritten; none may hold a key below `low`.
        """
        slots = space.slots(2 * self.size + 1)
        target = torch.from_numpy(slots)
        for part in keys:
            offsets = part.view(np.uint32)
            np.subtract(offsets, np.uint32(self.low & 0xFFFFFFFF), out=offsets)
            np.minimum(offsets, np.uint32(self.span), out=offsets)
            for start in range(0, len(offsets), SLICE):
                slot = self.slots(offsets[start : start + SLICE], space)
                target.index_add_(0, torch.from_numpy(slot), space.ones[: len(slot)])
        return self._from_above(slots)

    def tally(self, places: Iterable[tuple[np.ndarray, np.ndarray]], space: Workspace) -> np.ndarray:
        """`count` with the compiled loop, of int32 keys that stay as they are.

        places: int64 addresses of contiguous keys and how many there are at each.
        """
        slots = space.slots(2 * self.size + 1)
        low, span = np.uint32(self.low & 0xFFFFFFFF), np.uint32(self.span)
        for addresses, sizes in places:
            space.compiled.tally(addresses, sizes, low, span, self.words, self.below, slots)
        return self._from_above(slots)

    @staticmethod
    def _from_above(slots: np.ndarray) -> np.ndarray:
        running = slots[::-1]
        np.cumsum(running, dtype=slots.dtype, out=running)
        return slots

    def positions(self, keys: np.ndarray, space: Workspace) -> np.ndarray:
        """int32 (N,): which member, ascending, each of the keys (all members) is."""
        offsets = self.offsets(keys)
        result = np.empty(len(keys), dtype=np.int32)
        for start in range(0, len(keys), SLICE):
            result[start : start + SLICE] = self.slots(offsets[start : start + SLICE], space) >> 1
        return result
