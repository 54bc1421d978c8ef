"""Order statistics of more values than memory holds, exact, from histograms of their bits.

A value's bits are turned into an integer without a sign that is ordered as the values are (of
floats: Terdiman 2000, Herf 2001). The first pass counts the highest 16 bits of all values; each
further pass looks only at the bins in which a wanted rank lies, and counts 16 bits more, or
gathers and sorts what is left where that is little. So types of up to 16 bits take one pass,
those of 32 two, those of 64 two where the values of a bin are few or span 16 bits, else up to four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    Blocks = Iterable[Sequence[NDArray[np.generic]]]
    """The values of every channel, block by block; flat, finite."""

DIGIT = 16
"""Bits that one pass counts."""
ROOM = 2**21
"""Values that are gathered and sorted at most, instead of being counted."""
_PIECE = 2**18


@dataclass(frozen=True, slots=True)
class Order:
    """What was found of one channel."""

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

    @property
    def bounds(self) -> tuple[int, int]:
        """The two keys."""
        return self.low, self.high


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
    bits = 8 * dtype.itemsize
    shift = max(0, bits - DIGIT)
    counts = np.zeros((channels, 2 ** (bits - shift)), np.int64)
    ends = [[2**bits - 1, 0] for _ in range(channels)]
    for block in scan():
        for channel, values in enumerate(block):
            if values.size:
                keys = _keys(values)
                counts[channel] += _histogram(keys >> shift, counts.shape[1])
                low, high = ends[channel]
                ends[channel] = [min(low, int(keys.min())), max(high, int(keys.max()))]
    searches: list[dict[int, _Search]] = []
    places: list[list[tuple[int, int, float]]] = []
    for channel in range(channels):
        total = int(counts[channel].sum())
        places.append([_place(fraction, total) for fraction in fractions] if total else [])
        ranks = {rank for first, second, _ in places[-1] for rank in (first, second)}
        found = {rank: _Search(rank, 0, 2**bits - 1, total) for rank in ranks}
        for search in found.values():
            _narrow(search, counts[channel], shift)
            search.low = max(search.low, ends[channel][0])
            search.high = min(search.high, ends[channel][1])
        searches.append(found)
    while any(search.low < search.high for found in searches for search in found.values()):
        _pass(scan, searches)
    orders = []
    for channel, found in enumerate(searches):
        low, high = (_value(key, dtype) for key in ends[channel])
        ranked = {rank: _value(search.low, dtype) for rank, search in found.items()}
        orders.append(
            Order(
                int(counts[channel].sum()),
                low,
                high,
                tuple((ranked[a], ranked[b], within) for a, b, within in places[channel]),
            )
        )
    return orders


def _place(fraction: float, total: int) -> tuple[int, int, float]:
    """Return the ranks on both sides of a fraction, and where it lies between them."""
    exact = fraction * (total - 1)
    first = math.floor(exact)
    return first, min(first + 1, total - 1), exact - first


def _pass(scan: Callable[[], Blocks], searches: list[dict[int, _Search]]) -> None:
    """Read all values once; count those between the keys of each search, or sort them."""
    ranges = [
        {search.bounds: search.held for search in found.values() if search.low < search.high}
        for found in searches
    ]
    few = sum(held for found in ranges for held in found.values()) <= ROOM
    gathered: list[dict[tuple[int, int], list[NDArray[np.unsignedinteger]]]] = [
        {bounds: [] for bounds in found} for found in ranges
    ]
    counts = [
        {bounds: np.zeros(0 if few else 2**DIGIT, np.int64) for bounds in found} for found in ranges
    ]
    for block in scan():
        for channel, values in enumerate(block):
            if not ranges[channel]:
                continue
            keys = _keys(values)
            for low, high in ranges[channel]:
                inside = keys[(keys >= low) & (keys <= high)]
                if few:
                    gathered[channel][low, high].append(inside)
                else:
                    digits = (inside - inside.dtype.type(low)) >> _shift(low, high)
                    counts[channel][low, high] += _histogram(digits, 2**DIGIT)
    for channel, found in enumerate(searches):
        ordered = {
            bounds: np.sort(np.concatenate(parts))
            for bounds, parts in gathered[channel].items()
            if few
        }
        for search in found.values():
            bounds = search.bounds
            if search.low == search.high:
                continue
            if few:
                search.low = search.high = int(ordered[bounds][search.rank])
            else:
                _narrow(search, counts[channel][bounds], _shift(*bounds))


def _shift(low: int, high: int) -> int:
    """Return how many bits are left when the highest ones between two keys are known."""
    return max(0, (high - low).bit_length() - DIGIT)


def _narrow(search: _Search, counts: NDArray[np.int64], shift: int) -> None:
    """Go on in the bin of a search's range in which its rank lies."""
    total = np.cumsum(counts)
    place = int(np.searchsorted(total, search.rank, side="right"))
    search.held = int(counts[place])
    search.rank -= int(total[place]) - search.held
    search.low += place << shift
    search.high = min(search.high, search.low + (1 << shift) - 1)


def _histogram(digits: NDArray[np.generic], bins: int) -> NDArray[np.int64]:
    """Count whole numbers below ``bins``, without a wide copy of all of them."""
    counts = np.zeros(bins, np.int64)
    for start in range(0, digits.size, _PIECE):
        counts += np.bincount(digits[start : start + _PIECE].astype(np.int64), minlength=bins)
    return counts


def _keys(values: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """Return integers without a sign that are ordered as the values are."""
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    keys: NDArray[np.unsignedinteger] = values.view(f"u{values.dtype.itemsize}")
    top = keys.dtype.type(1 << (bits - 1))
    if kind == "i":
        keys = keys ^ top
    elif kind == "f":
        signs = (values.view(f"i{values.dtype.itemsize}") >> (bits - 1)).view(keys.dtype)
        keys = keys ^ (signs | top)
    return keys


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
