"""Bounds of values, and what is left of them by arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SMALL = 0.01
"""What is added to a probability, or clamped away, without a change of its meaning."""


@dataclass(frozen=True, slots=True)
class Range:
    """What is known of the values of a tensor."""

    low: float = -math.inf
    high: float = math.inf
    total: float | None = None
    """The sum of the channels, where it is the same for every voxel."""
    log: str = ""
    """``all`` for the logarithm of channels that add up to 1, ``apart`` for that of others."""
    known: bool = True
    """Whether all operations back to weights are known here."""
    softmax: bool = False
    """Whether a softmax over channels is what keeps the values in their bounds."""
    mixed: bool = False
    """Whether some channels are probabilities, and others are not known to be."""

    @property
    def is_probability(self) -> bool:
        """Whether all values lie in 0 to 1, but for a small number that was added."""
        return self.low >= -SMALL and self.high <= 1 + SMALL and not self.log

    @property
    def adds_up(self) -> bool:
        """Whether the channels add up to 1, but for a small number that was added."""
        return self.total is not None and abs(self.total - 1) <= SMALL

    def bounded(self, low: float, high: float) -> Range:
        """Return the range with other bounds, of channels that no longer add up."""
        low, high = (0.0 if math.isnan(edge) else edge for edge in (low, high))
        return Range(low, high, known=self.known)


UNKNOWN = Range(known=False)
WITHIN = Range(0.0, 1.0)


def unsummed(whole: Range) -> Range:
    """Return the range of some of the channels."""
    return replace(whole, total=None, log="apart" if whole.log else "")


def times(values: Range, factor: float) -> Range:
    """Return the range of values times a number.

    >>> times(Range(0.0, 1.0), -2.0).low
    -2.0
    """
    if factor == 1:
        return values
    low, high = sorted(
        0.0 if math.isnan(edge * factor) else edge * factor for edge in (values.low, values.high)
    )
    total = None if values.total is None else values.total * factor
    return Range(low, high, total, known=values.known, softmax=values.softmax)


def plus(first: Range, second: Range) -> Range:
    """Return the range of a sum; too wide where the two depend on one another, never too narrow."""
    for side, shift in ((first, second), (second, first)):
        if shift.low == shift.high and abs(shift.low) <= SMALL and side.total is not None:
            return replace(side, low=side.low + shift.low, high=side.high + shift.low)
        if shift.low == shift.high == 0:
            return side
    both = first.total is not None and second.total is not None
    total = (first.total or 0) + (second.total or 0) if both else None
    softmax, known = first.softmax or second.softmax, first.known and second.known
    return Range(
        first.low + second.low, first.high + second.high, total, known=known, softmax=softmax
    )


def product(first: Range, second: Range) -> Range:
    """Return the range of a product."""
    edges = [a * b for a in (first.low, first.high) for b in (second.low, second.high)]
    edges = [0.0 if math.isnan(edge) else edge for edge in edges]
    return replace(first.bounded(min(edges), max(edges)), known=first.known and second.known)


def either(ranges: Iterable[Range]) -> Range:
    """Return the range of values that are taken from any of several tensors."""
    parts = list(ranges)
    return Range(
        min(part.low for part in parts),
        max(part.high for part in parts),
        known=all(part.known for part in parts),
        softmax=all(part.softmax for part in parts),
    )


def exp(edge: float) -> float:
    """Return the exponential of a bound; infinity where it is too large."""
    return math.exp(edge) if edge < 700 else math.inf
