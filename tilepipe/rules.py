"""Index arithmetic along one axis: which input rows does a range of output rows need."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Rule:
    """Output row ``i`` along one axis reads input rows ``lo(i)`` to ``hi(i)``, both included.

    ``lo(i) = floor((i * num + first) / den)`` and ``hi(i) = floor((i * num + last) / den)``, in
    absolute coordinates; rows outside the input are the operation's own padding. A 3-wide
    convolution with padding 1 is ``Rule(1, 1, -1, 1)``; ``num == 0`` reads the same rows always.

    >>> Rule(2, 1, 0, 1).need(3, 5)
    (6, 10)
    >>> Rule(1, 2, 0, 0).need(3, 5)
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


SAME = Rule()


def convolution(kernel: int, stride: int, padding: int, dilation: int) -> Rule:
    """Return the rule of a convolution or a pooling along one axis."""
    return Rule(stride, 1, -padding, dilation * (kernel - 1) - padding)


def transposed(kernel: int, stride: int, padding: int, dilation: int) -> Rule:
    """Return the rule of a transposed convolution: input ``j`` writes ``j * stride - padding + t``.

    >>> transposed(2, 2, 0, 1).need(0, 4)
    (0, 2)
    """
    reach = dilation * (kernel - 1)
    return Rule(1, stride, padding - reach + stride - 1, padding)


def interpolation(
    mode: str, size_in: int, size_out: int, scale: float | None, *, align: bool
) -> Rule:
    """Return the rule of ``torch.nn.functional.interpolate`` along one axis."""
    if align:
        ratio = Fraction(size_in - 1, size_out - 1) if size_out > 1 else Fraction(0)
        num, den, shift = ratio.numerator, ratio.denominator, 0
    else:
        ratio = Fraction(size_in, size_out)
        if scale:
            ratio = 1 / Fraction(scale).limit_denominator(1024)
        num, den, shift = 2 * ratio.numerator, 2 * ratio.denominator, 0
        if mode == "nearest":
            num, den = ratio.numerator, ratio.denominator
        elif mode == "nearest-exact":
            shift = ratio.numerator
        else:
            shift = ratio.numerator - ratio.denominator
    reach = {"nearest": (0, 0), "nearest-exact": (0, 0), "linear": (0, 1), "cubic": (-1, 2)}[mode]
    return Rule(num, den, shift + reach[0] * den, shift + reach[1] * den)
