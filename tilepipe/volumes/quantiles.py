"""Order statistics of more values than memory holds, exact, from histograms of their bits.

A value's bits are turned into a key, an integer without a sign that is ordered as the values are
(of floats: Terdiman 2000, Herf 2001). The first pass counts all keys in 2**16 bins that grow wider
as keys further apart come; each further pass looks only at the bins in which a wanted rank lies,
and counts 16 bits more, or gathers and sorts what is left where that is little. So values that
span 16 bits take one pass, those of 32 bits at most two, those of 64 two where the values of a bin
are few, else up to four. All is done in pieces that the processor's caches hold.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    Blocks = Iterable[Sequence[NDArray[np.generic]]]
    """The values of every channel, block by block; flat, finite."""
    _Bounds = tuple[int, int, int]
    """A channel, and the least and the greatest key that are looked for in it."""

DIGIT = 16
"""Bits that one pass counts."""
ROOM = 2**21
"""Values that are gathered and sorted at most, instead of being counted."""
PIECE = 2**17
"""Values that are worked on at once."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order statistics of one channel."""

    count: int
    """Values; where there are none, the rest says nothing."""
    least: float
    greatest: float
    neighbours: tuple[tuple[float, float, float], ...]
    """For each fraction: the values round it, and how far it lies from the first to the second."""


@dataclass(slots=True)
class _Search:
    """A value wanted by its rank: between which keys it lies, and its rank among the keys there."""

    rank: int
    low: int
    high: int
    held: int
    """Values between the two keys."""


@dataclass(slots=True)
class _Histogram:
    """How many keys lie in each of 2**16 bins, of ``2**shift`` keys each."""

    shift: int = 0
    first: int = 0
    """What the keys of bin 0 are without their lowest ``shift`` bits."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2**DIGIT, np.int64))
    least: int = 2**64
    greatest: int = -1

    def add(self, keys: NDArray[np.unsignedinteger]) -> None:
        """Count keys, one at least."""
        low, high = int(keys.min()), int(keys.max())
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        bins = range(self.first, self.first + self.counts.size)
        if low >> self.shift not in bins or high >> self.shift not in bins:
            self._widen()
        bottom = low >> self.shift
        counts = np.bincount(((keys >> self.shift) - keys.dtype.type(bottom)).astype(np.intp))
        self.counts[bottom - self.first :][: counts.size] += counts

    def _widen(self) -> None:
        """Choose the narrowest bins that hold the least and the greatest key, these in the middle.

        Law: each bin so far lies within one of the new ones.
        """
        shift = self.shift
        while (self.greatest >> shift) - (self.least >> shift) >= 2**DIGIT:
            shift += 1
        low, high, grown = self.least >> shift, self.greatest >> shift, shift - self.shift
        first = low - (2**DIGIT - 1 - (high - low)) // 2
        earlier, filled = self.counts, np.flatnonzero(self.counts)
        self.counts = np.zeros_like(earlier)
        if filled.size:
            above, below = self.first >> grown, self.first % (1 << grown)
            places = ((filled + below) >> grown) + (above - first)
            np.add.at(self.counts, places, earlier[filled])
        self.shift, self.first = shift, first


def order_statistics(
    scan: Callable[[], Blocks],
    dtype: np.dtype[np.generic],
    channels: int,
    fractions: Sequence[float],
) -> list[Order]:
    """Return of each channel the values on both sides of fractions (0 to 1) of its sorted values.

    ``scan`` begins a pass over all values. Integers come back as integers, whatever their width.
    Law: linear interpolation between the neighbours equals ``numpy.percentile``.
    """
    histograms = [_Histogram() for _ in range(channels)]
    for block in scan():
        for histogram, values in zip(histograms, block, strict=True):
            for keys in _keys(values):
                histogram.add(keys)
    searches: list[dict[int, _Search]] = []
    places: list[list[tuple[int, int, float]]] = []
    for histogram in histograms:
        total = int(histogram.counts.sum())
        places.append([_place(fraction, total) for fraction in fractions] if total else [])
        ranks = {rank for first, second, _ in places[-1] for rank in (first, second)}
        by_rank = {rank: _Search(rank, 0, 0, total) for rank in ranks}
        for search in by_rank.values():
            _narrow(search, histogram)
        searches.append(by_rank)
    while any(search.low < search.high for by_rank in searches for search in by_rank.values()):
        _pass(scan, searches)
    orders = []
    for histogram, neighbours, by_rank in zip(histograms, places, searches, strict=True):
        total = int(histogram.counts.sum())
        low, high = (
            _value(key, dtype) if total else 0 for key in (histogram.least, histogram.greatest)
        )
        ranked = {rank: _value(search.low, dtype) for rank, search in by_rank.items()}
        around = tuple((ranked[a], ranked[b], within) for a, b, within in neighbours)
        orders.append(Order(total, low, high, around))
    return orders


def _place(fraction: float, total: int) -> tuple[int, int, float]:
    """Return the ranks on both sides of a fraction, and where it lies between them."""
    exact = fraction * (total - 1)
    first = math.floor(exact)
    return first, min(first + 1, total - 1), exact - first


def _pass(scan: Callable[[], Blocks], searches: list[dict[int, _Search]]) -> None:
    """Read all values once; sort those between the keys of a search where few, else count them."""
    counts = {
        (channel, search.low, search.high): search.held
        for channel, by_rank in enumerate(searches)
        for search in by_rank.values()
        if search.low < search.high
    }
    smallest = sorted(counts, key=counts.__getitem__)
    totals = itertools.accumulate(counts[bounds] for bounds in smallest)
    gathered: dict[_Bounds, list[NDArray[np.unsignedinteger]]] = {
        bounds: [] for bounds, total in zip(smallest, totals, strict=True) if total <= ROOM
    }
    histograms = {bounds: _Histogram() for bounds in counts if bounds not in gathered}
    for block in scan():
        for bounds, keys in _keys_between(counts, block):
            if bounds in gathered:
                gathered[bounds].append(keys)
            else:
                histograms[bounds].add(keys)
    ordered = {bounds: np.sort(np.concatenate(parts)) for bounds, parts in gathered.items()}
    for channel, by_rank in enumerate(searches):
        for search in by_rank.values():
            bounds = channel, search.low, search.high
            if bounds in ordered:
                search.low = search.high = int(ordered[bounds][search.rank])
            elif bounds in histograms:
                _narrow(search, histograms[bounds])


def _keys_between(
    intervals: Iterable[_Bounds], block: Sequence[NDArray[np.generic]]
) -> Iterator[tuple[_Bounds, NDArray[np.unsignedinteger]]]:
    """Yield the keys of a block that lie between bounds, with these; those that there are."""
    for channel, values in enumerate(block):
        ranges = [bounds for bounds in intervals if bounds[0] == channel]
        for keys in _keys(values) if ranges else ():
            for bounds in ranges:
                inside = keys.compress((keys >= bounds[1]) & (keys <= bounds[2]))
                if inside.size:
                    yield bounds, inside


def _narrow(search: _Search, histogram: _Histogram) -> None:
    """Go on in the bin in which a search's rank lies."""
    total, shift = np.cumsum(histogram.counts), histogram.shift
    place = int(np.searchsorted(total, search.rank, side="right"))
    search.held = int(histogram.counts[place])
    search.rank -= int(total[place]) - search.held
    search.low = max((histogram.first + place) << shift, histogram.least)
    search.high = min(((histogram.first + place + 1) << shift) - 1, histogram.greatest)


def _keys(values: NDArray[np.generic]) -> Iterator[NDArray[np.unsignedinteger]]:
    """Yield integers without a sign that are ordered as the values are, piece by piece."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    top = np.dtype(f"u{size}").type(1 << (8 * size - 1))
    for start in range(0, values.size, PIECE):
        piece = values[start : start + PIECE]
        keys: NDArray[np.unsignedinteger] = piece.view(f"u{size}")
        if kind == "i":
            keys = keys ^ top
        elif kind == "f":
            flips = (piece.view(f"i{size}") >> (8 * size - 1)).view(keys.dtype)
            flips |= top
            flips ^= keys
            keys = flips
        yield keys


def _value(key: int, dtype: np.dtype[np.generic]) -> float:
    """Return the value, an integer of integers, to which a key belongs."""
    bits = 8 * dtype.itemsize
    top, full = 1 << (bits - 1), (1 << bits) - 1
    if dtype.kind == "i":
        key ^= top
    elif dtype.kind == "f":
        key ^= top if key & top else full
    value: float = np.array([key], f"u{dtype.itemsize}").view(dtype)[0].item()
    return value
