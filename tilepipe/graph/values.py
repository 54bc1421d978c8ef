"""What is known of the values that operations give, from the ranges of what they take.

Each function answers for one call: ``range_of`` gives the range of a value, and ``axis`` says where
the channels of the network's output lie. The table in `operations` says which function answers for
which operation; an operation whose values are not known ends the walk of `meaning`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tilepipe.graph.channels import (
    before_reduction,
    dims_of,
    is_whole_slice,
    with_axis,
    without_axis,
)
from tilepipe.graph.ranges import (
    SMALL,
    UNKNOWN,
    WITHIN,
    Range,
    either,
    exp,
    plus,
    product,
    times,
    unsummed,
)
from tilepipe.graph.readings import Call

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.graph.channels import Axis
    from tilepipe.graph.readings import RangeOf, Values

MOST_LABELS = 65535
"""Of a network that numbers the classes itself, where the graph does not say how many there are."""


def unknown(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return that nothing is known."""
    return UNKNOWN


def any_value(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return that values may be any: of weights that shift, and of functions that let pass."""
    return Range()


def bounded(low: float, high: float) -> Values:
    """Return the function of an operation that gives values between two bounds always."""
    return lambda range_of, call, axis: Range(low, high)


def unchanged(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of the source: values are what they were, or means of those near them."""
    return range_of(call.source(), axis)


def picked(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of some of the values, for each channel or voxel another one."""
    return unsummed(range_of(call.source(), axis))


def shuffled(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of values that go from channels to rows or back."""
    return unsummed(range_of(call.source(), None))


def moved(before: Callable[[Call, Axis], Axis]) -> Values:
    """Return the function of a change of shape; ``before`` says where channels were before it."""
    return lambda range_of, call, axis: range_of(call.source(), before(call, axis))


def part(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of some of the rows or channels."""
    return _part(range_of, call, axis, axis)


def single(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of one row or channel, without its dimension."""
    return _part(range_of, call, axis, with_axis(axis, _dim_of(call)))


def sliced(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a slice, which may leave nothing out."""
    return range_of(call.source(), axis) if is_whole_slice(call) else part(range_of, call, axis)


def pieces(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of pieces along a dimension, each as that of a part."""
    return _part(range_of, call, axis, axis)


def singles(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of all rows or channels, each without its dimension."""
    return single(range_of, call, axis)


def item(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of one of several tensors: of any piece, else of the first alone."""
    source = call.source()
    in_pieces = isinstance(source, Call) and source.kind.values in (pieces, singles)
    if call.arguments.get("1") != 0 and not in_pieces:
        return UNKNOWN  # such as the places of maxima
    return range_of(source, axis)


def _part(range_of: RangeOf, call: Call, axis: Axis, before: Axis) -> Range:
    source = range_of(call.source(), before)
    if before is not None and _dim_of(call) % before[1] != before[0]:
        return source
    return unsummed(source)


def _dim_of(call: Call) -> int:
    return int(call.number("dim", 0.0) or 0)


def reduced(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of extremes: within the bounds of what they are of."""
    before, _ = before_reduction(call, axis)
    return unsummed(range_of(call.source(), before))


def averaged(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of means: within the bounds of what they are of."""
    before, over_channels = before_reduction(call, axis)
    source = range_of(call.source(), before)
    return unsummed(source) if over_channels or source.log else source


def summed(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of sums, which is a number where all channels that add up are summed."""
    before, over_channels = before_reduction(call, axis)
    source = range_of(call.source(), before)
    if over_channels and source.total is not None and len(dims_of(call)) == 1:
        return Range(source.total, source.total, known=source.known)
    edges = (0.0 if source.low >= 0 else -math.inf), (0.0 if source.high <= 0 else math.inf)
    return source.bounded(*edges)


def extreme(choose: Callable[[float, float], float]) -> Values:
    """Return the function of the larger or the smaller of two tensors, or of one along axes."""

    def values(range_of: RangeOf, call: Call, axis: Axis) -> Range:
        if "other" not in call.arguments:
            return reduced(range_of, call, axis)
        source, other = range_of(call.source(), axis), _other(range_of, call, axis)
        edges = choose(source.low, other.low), choose(source.high, other.high)
        return replace(source.bounded(*edges), known=source.known and other.known)

    return values


def numbered(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of numbers of channels; how many there are is not known in TorchScript."""
    source, dim = call.source(), call.number("dim")
    if not isinstance(source, Call) or source.shape is None or dim is None:
        return Range(0.0, MOST_LABELS)
    return Range(0.0, float(source.shape[int(dim)] - 1))


def softmaxed(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return that channels add up to 1, of a softmax over channels."""
    return replace(WITHIN, total=1.0, softmax=True) if _is_over_channels(call, axis) else UNKNOWN


def log_softmaxed(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return that these are logarithms of channels that add up to 1, of a softmax over channels."""
    return Range(high=0.0, log="all") if _is_over_channels(call, axis) else UNKNOWN


def _is_over_channels(call: Call, axis: Axis) -> bool:
    """Whether a softmax runs over channels; over the image, no class is meant by it."""
    dim = call.number("dim")
    return axis is not None and dim is not None and int(dim) % axis[1] == axis[0]


def joined(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of tensors that are put one behind the other along a dimension."""
    along = axis is None or _dim_of(call) % axis[1] == axis[0]
    return _joined(range_of, call, axis, along=along)


def stacked(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of tensors that are put one behind the other along a new dimension."""
    within = without_axis(axis, _dim_of(call))
    return _joined(range_of, call, within, along=within is None or within[0] < 0)


def _joined(range_of: RangeOf, call: Call, axis: Axis, *, along: bool) -> Range:
    """``along``: the tensors are channels of the result; ``axis`` is that of each tensor."""
    parts = call.arguments.get("tensors")
    if not isinstance(parts, list) or not parts:
        return UNKNOWN
    ranges = [range_of(part, axis) for part in parts]
    whole = either(ranges)
    kinds = {part.is_probability for part in ranges}
    if along and (len(kinds) > 1 or any(part.mixed for part in ranges)):
        whole = replace(whole, mixed=True)
    if not along:
        totals = {part.total for part in ranges}
        return replace(whole, total=totals.pop() if len(totals) == 1 else None)
    if len(parts) == 2 and whole.is_probability and _is_rest(*parts):
        return replace(whole, total=1.0)
    return whole


def _is_rest(first: object, second: object) -> bool:
    """Whether one of two values is 1 less the other."""
    for whole, rest in ((first, second), (second, first)):
        if isinstance(rest, Call) and rest.kind.values in (subtracted, subtracted_from):
            pair = rest.source(), rest.arguments.get("other")
            less, begin = pair if rest.kind.values is subtracted_from else pair[::-1]
            if begin in (1, 1.0) and same(less, whole):
                return True
    return False


def padded(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a padding, with a value or with rows of the tensor."""
    source = range_of(call.source(), axis)
    mode, pads = call.arguments.get("mode") or "constant", call.arguments.get("pad")
    if mode != "constant":
        return source
    value = call.number("value", 0.0) or 0.0
    if not isinstance(pads, list) or axis is None or len(pads) // 2 > axis[1] - 1 - axis[0]:
        source = replace(source, total=None)
    if isinstance(pads, list) and all(isinstance(n, int) and n <= 0 for n in pads):
        return source  # a crop
    if source.is_probability and 0 <= value <= 1:
        return source  # what is outside is no object, or one
    return source.bounded(min(source.low, value), max(source.high, value))


def _other(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    return range_of(call.arguments.get("other"), axis)


def added(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a sum of two."""
    by = call.number("alpha", 1.0) or 0.0
    return plus(range_of(call.source(), axis), times(_other(range_of, call, axis), by))


def subtracted(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a difference."""
    by = call.number("alpha", 1.0) or 0.0
    return plus(range_of(call.source(), axis), times(_other(range_of, call, axis), -by))


def subtracted_from(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a difference whose second number stands first."""
    by = call.number("alpha", 1.0) or 0.0
    return plus(_other(range_of, call, axis), times(range_of(call.source(), axis), -by))


def multiplied(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a product of two."""
    source, other = range_of(call.source(), axis), _other(range_of, call, axis)
    if other.low == other.high:
        return times(source, other.low)
    return times(other, source.low) if source.low == source.high else product(source, other)


def divided(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of a quotient; a number over a sum that holds it lies in 0 to 1."""
    if call.arguments.get("rounding_mode") is not None:
        return UNKNOWN
    source, other = range_of(call.source(), axis), _other(range_of, call, axis)
    if other.low == other.high:
        return times(source, 1 / other.low) if other.low else UNKNOWN
    over, under = call.source(), call.arguments.get("other")
    while isinstance(under, Call) and under.kind.values is clamped:
        under = under.source()
    if source.low >= 0 and isinstance(under, Call):
        if under.kind.values is added:
            sides = [under.source(), under.arguments.get("other")]
            for side, rest in (sides, sides[::-1]):
                if range_of(rest, axis).low >= 0 and same(side, over):
                    return WITHIN  # x / (x + c)
                if isinstance(side, Call) and side.kind.values is summed and _is_small(rest):
                    under = side  # a small number that keeps it from being 0
        sums = isinstance(under, Call) and under.kind.values is summed
        dims = dims_of(under) if isinstance(under, Call) and sums else []
        if isinstance(under, Call) and same(under.source(), over) and axis and len(dims) == 1:
            keeps = under.arguments.get("keepdim")
            if keeps and dims[0] % axis[1] == axis[0]:
                return replace(WITHIN, total=1.0, softmax=True)
    if other.low < 0:
        return UNKNOWN
    edges = [
        a / b if b else math.copysign(math.inf, a)
        for a in (source.low, source.high)
        for b in (other.low, other.high)
    ]
    edges = [0.0 if math.isnan(edge) else edge for edge in edges]
    return replace(source.bounded(min(edges), max(edges)), known=False)


def _is_small(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= SMALL


def clamped(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of values that are clamped to bounds in the arguments."""
    return _clamped(range_of(call.source(), axis), call.number("min"), call.number("max"))


def rectified(least: float, most: float | None = None) -> Values:
    """Return the function of a clamp to bounds that the operation has, where no argument does."""

    def values(range_of: RangeOf, call: Call, axis: Axis) -> Range:
        low, high = call.number("min_val", least), call.number("max_val", most)
        return _clamped(range_of(call.source(), axis), low, high)

    return values


def _clamped(source: Range, low: float | None, high: float | None) -> Range:
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if low <= source.low and source.high <= high:
        return source
    if source.is_probability and low <= SMALL and high >= 1 - SMALL:
        return replace(source, low=max(low, source.low), high=min(high, source.high))
    clamp = source.bounded(min(max(source.low, low), high), max(min(source.high, high), low))
    return replace(clamp, softmax=source.softmax)


def exponential(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of exponentials: of logarithms of channels that add up, these channels."""
    source = range_of(call.source(), axis)
    result = source.bounded(exp(source.low), exp(source.high))
    return replace(result, total=1.0, softmax=True) if source.log == "all" else result


def logarithm(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of logarithms, and of what they are."""
    source = range_of(call.source(), axis)
    low, high = (math.log(edge) if edge > 0 else -math.inf for edge in (source.low, source.high))
    log = ("all" if source.adds_up else "apart") if source.is_probability else ""
    return replace(source.bounded(low, high), log=log)


def log_sigmoid(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return that these are logarithms of probabilities."""
    return Range(high=0.0, log="apart")


def reciprocal(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of 1 over values that are not negative."""
    source = range_of(call.source(), axis)
    if source.low < 0:
        return Range()
    return source.bounded(1 / source.high, 1 / source.low if source.low > 0 else math.inf)


def negative(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of values with the other sign."""
    return times(range_of(call.source(), axis), -1.0)


def absolute(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of values without their sign."""
    source = range_of(call.source(), axis)
    return Range(0.0, max(abs(source.low), abs(source.high)))


def square_root(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of square roots of values that are not negative."""
    source = range_of(call.source(), axis)
    if source.low < 0:
        return UNKNOWN
    return source.bounded(math.sqrt(source.low), math.sqrt(source.high))


def chosen(range_of: RangeOf, call: Call, axis: Axis) -> Range:
    """Return the range of values that are taken from one of two tensors."""
    return either(range_of(call.arguments.get(name), axis) for name in ("self", "other"))


def same(first: object, second: object, depth: int = 0) -> bool:
    """Whether two values are the same, as an expression that was written twice is."""
    if first is second:
        return True
    if isinstance(first, Call) and isinstance(second, Call):
        return (
            depth < 20
            and first.name == second.name not in ("input", "weight")
            and first.values == second.values
            and list(first.arguments) == list(second.arguments)
            and all(
                same(first.arguments[name], second.arguments[name], depth + 1)
                for name in first.arguments
            )
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(
            same(a, b, depth + 1) for a, b in zip(first, second, strict=True)
        )
    return type(first) is type(second) and not isinstance(first, Call) and first == second
