"""Index arithmetic along one axis: which input rows does a range of output rows need."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class AxisRule:
    """Output row ``i`` along one axis reads input rows ``lo(i)`` to ``hi(i)``, both included.

    ``lo(i) = floor((i * num + first) / den)`` and ``hi(i) = floor((i * num + last) / den)``, in
    absolute coordinates; rows outside the input are the operation's own padding. A 3-wide
    convolution with padding 1 is ``AxisRule(1, 1, -1, 1)``; a rule whose ``num`` is 0 reads the
    same rows always.

    >>> AxisRule(2, 1, 0, 1).need(3, 5)
    (6, 10)
    >>> AxisRule(1, 2, 0, 0).need(3, 5)
    (1, 3)
    """

    num: int = 1
    den: int = 1
    first: int = 0
    last: int = 0

    def need(self, start: int, stop: int) -> tuple[int, int]:
        """Return the input rows that output rows ``start:stop`` read (not empty)."""
        return (
            (start * self.num + self.first) // self.den,
            ((stop - 1) * self.num + self.last) // self.den + 1,
        )


SAME = AxisRule()


def convolution(kernel: int, stride: int, padding: int, dilation: int) -> AxisRule:
    """Return the rule of a convolution or a pooling along one axis."""
    return AxisRule(stride, 1, -padding, dilation * (kernel - 1) - padding)


def transposed(kernel: int, stride: int, padding: int, dilation: int) -> AxisRule:
    """Return the rule of a transposed convolution: input ``j`` writes ``j * stride - padding + t``.

    >>> transposed(2, 2, 0, 1).need(0, 4)
    (0, 2)
    """
    reach = dilation * (kernel - 1)
    return AxisRule(1, stride, padding - reach + stride - 1, padding)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Where ``torch.nn.functional.interpolate`` samples one axis, as the library computes it."""

    mode: str
    """``nearest``, ``nearest-exact``, ``linear`` or ``cubic``."""
    size_in: int
    size_out: int
    scale: float | None
    """The factor that was asked for; None where a size was, whose ratio is the factor then."""
    align: bool

    def rule(self) -> AxisRule | None:
        """Return which rows are read; None where no rule fits what the library computes.

        Nearest rows are one wider on each side where the library's arithmetic, in float32 or
        float64, takes another row than that of whole numbers.
        """
        if self.same:
            return SAME
        num, den, shift = self._line
        first, last = {"linear": (0, 1), "cubic": (-1, 2)}.get(self.mode, (0, 0))
        exact = AxisRule(num, den, shift + first * den, shift + last * den)
        if "nearest" not in self.mode:
            return exact
        wider = AxisRule(num, den, exact.first - den, exact.last + den)
        return next((rule for rule in (exact, wider) if self._fits(rule)), None)

    @property
    def same(self) -> bool:
        """Whether the axis is left as it is."""
        return self.size_in == self.size_out and not self.scale

    @property
    def _line(self) -> tuple[int, int, int]:
        """``num``, ``den`` and ``shift``: row ``i`` is sampled at ``(i * num + shift) / den``."""
        if self.align:
            ratio = Fraction(self.size_in - 1, max(self.size_out - 1, 1))
            ratio = ratio if self.size_out > 1 else Fraction(0)
            return ratio.numerator, ratio.denominator, 0
        ratio = Fraction(self.size_in, self.size_out)
        if self.scale:
            factor = Fraction(self.scale)
            short = factor.limit_denominator(1024)
            exact = abs(short - factor) < factor / (1 << 40)
            ratio = 1 / (short if exact else factor.limit_denominator(1 << 20))
        num, den = ratio.numerator, ratio.denominator
        if self.mode == "nearest":
            return num, den, 0
        return 2 * num, 2 * den, num - (0 if self.mode == "nearest-exact" else den)

    def lows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the row at or before the place of output rows, by arithmetic of whole numbers."""
        num, den, shift = self._line
        return (np.arange(start, stop, dtype=np.int64) * num + shift) // den

    def places(self, start: int, stop: int, *, double: bool) -> NDArray[np.floating]:
        """Return where output rows are sampled, in float64 or in float32 as most types are."""
        kind = np.dtype(np.float64 if double else np.float32)
        rows, half = np.arange(start, stop).astype(kind), np.array(0.5, kind)
        if self.align:
            ratio = np.array(self.size_in - 1, kind) / np.array(max(self.size_out - 1, 1), kind)
            return rows * (ratio if self.size_out > 1 else np.array(0, kind))
        if self.scale:
            ratio = np.array(1.0 / self.scale, kind)
        else:
            ratio = np.array(self.size_in, kind) / np.array(self.size_out, kind)
        if self.mode == "nearest":
            return rows * ratio
        middles = rows + half
        if self.mode == "nearest-exact":
            return middles * ratio
        # The product is not rounded before the half is taken off: processors do both at once.
        return (middles.astype(np.float64) * ratio.astype(np.float64) - 0.5).astype(kind)

    def nearest(self, start: int, stop: int, *, double: bool) -> NDArray[np.int64]:
        """Return the rows that nearest output rows are copies of, which the library rounds down."""
        places = self.places(start, stop, double=double).astype(np.float32)
        return np.minimum(np.floor(places).astype(np.int64), self.size_in - 1)

    def _fits(self, rule: AxisRule) -> bool:
        """Whether all rows that nearest output rows are copies of are those that a rule reads."""
        rows = np.arange(self.size_out, dtype=np.int64) * rule.num
        low = np.clip((rows + rule.first) // rule.den, 0, self.size_in - 1)
        high = np.clip((rows + rule.last) // rule.den, 0, self.size_in - 1)
        taken = [self.nearest(0, self.size_out, double=double) for double in (False, True)]
        return all(bool(((low <= row) & (row <= high)).all()) for row in taken)
