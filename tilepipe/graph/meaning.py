"""What the values that a network gives mean: probabilities, or logits that are yet to be activated.

Bounds are carried from the operations near the output to the output itself. Whatever the image,
a sigmoid gives 0 to 1, and so does ``1 / (1 + exp(-y))``; a crop, a clone or ``* 1.0`` keep that,
``* 255`` does not. A softmax gives channels that add up to 1, too. Nothing is taken from names or
from what a network gives for some image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tilepipe.graph.calls import Call
from tilepipe.graph.channels import (
    before_move,
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

if TYPE_CHECKING:
    from tilepipe.graph.channels import Axis

DEPTH = 100
"""Operations in a row, without weights between them, after which nothing is said."""
MOST_LABELS = 65535
"""Of a network that numbers the classes itself, where the graph does not say how many there are."""

_KEEPING = (
    "alias clone contiguous detach lift_fresh_copy to _to_copy type_as dropout feature_dropout"
    " alpha_dropout feature_alpha_dropout native_dropout"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d"
    " _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d"
    " upsample_trilinear3d upsample_bicubic2d"  # which overshoots, but means what it did
    " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
    " reflection_pad1d reflection_pad2d reflection_pad3d"
    " replication_pad1d replication_pad2d replication_pad3d"
)
"""Operations after which values are what they were, or means of those near them."""
_EXTREMES = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices"
    " adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pixel_shuffle pixel_unshuffle"
)
"""Operations that give some of the values, each channel or voxel another one."""
_REDUCING = "mean amax amin max min"
_MOVING = "permute transpose squeeze unsqueeze view reshape _unsafe_view flatten expand"
_PARTS = "slice narrow select split split_with_sizes chunk unbind"
_YES_OR_NO = "gt ge lt le eq ne logical_and logical_or logical_not isnan isinf isfinite bitwise_not"
_WEIGHTED = (
    "convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d"
    " conv_transpose3d linear matmul mm bmm einsum addmm baddbmm batch_norm cudnn_batch_norm"
    " _native_batch_norm_legit_no_training instance_norm group_norm native_group_norm layer_norm"
    " native_layer_norm rms_norm scaled_dot_product_attention logit"
)
"""Operations that weigh or shift what they read, so that their values may be any."""
_ANY = "elu selu celu gelu silu mish leaky_relu prelu _prelu_kernel rrelu hardswish"
"""Functions that let values pass, more or less."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a network gives, whatever the image."""

    activation: str = ""
    """"sigmoid" or "softmax" where it gives probabilities, else an empty string."""
    apart: bool = False
    """Whether each of several channels is a probability of its own: classes may overlap."""
    low: float | None = None
    """No value is below this; None where there is no bound."""
    high: float | None = None
    weighted: bool = False
    """Whether the graph is known back to operations with weights, which may give any value."""
    logarithm: bool = False
    """Whether it gives the logarithm of a probability, which is none and no logit either."""
    mixed: bool = False
    """Whether some channels are probabilities, and others are not known to be."""

    @property
    def strange(self) -> str:
        """Return what it gives, in words, where that is neither logits nor probabilities."""
        if self.logarithm:
            return "logarithms of probabilities"
        if self.mixed:
            return "probabilities in some channels and other values in others"
        if self.activation or self.low is None or self.high is None or self.low < 0:
            return ""
        return f"values of {self.low:g} to {self.high:g}"


def read_meaning(output: Call, axes: int) -> Meaning:
    """Return what the output of a network of so many spatial axes means."""
    found = _Walk().of(output, (1, axes + 2))
    if found.log:
        return Meaning(weighted=True, logarithm=found.log == "apart")
    single = output.shape is not None and output.shape[1] == 1
    if found.is_probability and found.adds_up and not single:
        return Meaning("softmax", low=0.0, high=1.0)
    low, high = (edge if math.isfinite(edge) else None for edge in (found.low, found.high))
    name = ("softmax" if found.softmax else "sigmoid") if found.is_probability else ""
    return Meaning(
        name, apart=bool(name), low=low, high=high, weighted=found.known, mixed=found.mixed
    )


def _is(name: str, names: str) -> bool:
    return f" {name} " in f" {names} "


class _Walk:
    """A walk from the output towards the image that ends at weights and activations."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Axis], Range] = {}
        self._depth = 0

    def of(self, value: object, axis: Axis) -> Range:
        """Return the range of a value; ``axis`` says where the channels of the output lie."""
        if isinstance(value, bool | int | float):
            return Range(float(value), float(value))
        if not isinstance(value, Call) or self._depth > DEPTH:
            return UNKNOWN
        key = id(value), axis
        if key not in self._known:
            self._depth += 1
            self._known[key] = self._read(value, axis)
            self._depth -= 1
        return self._known[key]

    def _read(self, call: Call, axis: Axis) -> Range:
        name = call.name
        if _is(name, _KEEPING):
            return self.of(call.source(), axis)
        if _is(name, _EXTREMES):
            found = self.of(call.source(), None if "shuffle" in name else axis)
            return unsummed(found)
        if _is(name, _MOVING):
            return self.of(call.source(), before_move(call, axis))
        if _is(name, _PARTS):
            return self._part(call, axis)
        if _is(name, _REDUCING) and "other" not in call.arguments:
            return self._reduced(call, axis)
        if _is(name, _WEIGHTED) or _is(name, _ANY):
            return Range()
        if _is(name, _YES_OR_NO):
            return WITHIN
        if name in ("softmax", "_softmax", "log_softmax", "_log_softmax"):
            return _softmax(call, axis)
        if name in ("cat", "concat", "stack"):
            return self._joined(call, axis)
        if name == "getitem":
            return self._item(call, axis)
        if name in ("pad", "constant_pad_nd"):
            return self._padded(call, axis)
        if name == "sum":
            return self._summed(call, axis)
        if name == "constant":
            values = call.arguments["values"]
            assert isinstance(values, list)
            return Range(min(values), max(values))
        return self._arithmetic(call, axis)

    def _arithmetic(self, call: Call, axis: Axis) -> Range:
        one = self.of(call.source(), axis)
        low, high, name = one.low, one.high, call.name
        if name in ("add", "sub", "rsub"):
            other = self.of(call.arguments.get("other"), axis)
            by = call.number("alpha", 1.0) or 0.0
            if name == "rsub":
                one, other = other, one
            return plus(one, times(other, by if name == "add" else -by))
        if name in ("mul", "div") and call.arguments.get("rounding_mode") is None:
            other = self.of(call.arguments.get("other"), axis)
            if name == "div":
                return self._quotient(call, one, other, axis)
            return times(one, other.low) if other.low == other.high else (
                times(other, low) if low == high else product(one, other)
            )  # fmt: skip
        if name in ("sigmoid", "hardsigmoid"):
            return WITHIN
        if name in ("tanh", "erf", "sin", "cos"):
            return Range(-1.0, 1.0)
        if name == "exp":
            bounded = one.bounded(exp(low), exp(high))
            return replace(bounded, total=1.0, softmax=True) if one.log == "all" else bounded
        if name in ("log", "log_sigmoid", "log_sigmoid_forward"):
            if name != "log":
                return Range(high=0.0, log="apart")
            low, high = (math.log(edge) if edge > 0 else -math.inf for edge in (low, high))
            log = ("all" if one.adds_up else "apart") if one.is_probability else ""
            return replace(one.bounded(low, high), log=log)
        if name == "reciprocal":
            return one.bounded(1 / high, 1 / low if low > 0 else math.inf) if low >= 0 else Range()
        if name == "neg":
            return times(one, -1.0)
        if name in ("relu", "relu6", "clamp", "clamp_min", "clamp_max", "hardtanh"):
            return self._clamped(call, one)
        if name in ("maximum", "minimum", "max", "min"):
            other, choose = self.of(call.arguments.get("other"), axis), max if "a" in name else min
            edges = choose(low, other.low), choose(high, other.high)
            return replace(one.bounded(*edges), known=one.known and other.known)
        if name == "where":
            pair = [self.of(call.arguments.get(n), axis) for n in ("self", "other")]
            return either(pair)
        if name in ("abs", "softplus", "square"):
            return Range(0.0, max(abs(low), abs(high)) if name == "abs" else math.inf)
        if name == "sqrt" and low >= 0:
            return one.bounded(math.sqrt(low), math.sqrt(high))
        if name in ("argmax", "argmin"):
            return self._places(call)
        return UNKNOWN

    def _places(self, call: Call) -> Range:
        """Return the numbers of channels; how many there are is not known in TorchScript."""
        source, dim = call.source(), call.number("dim")
        if not isinstance(source, Call) or source.shape is None or dim is None:
            return Range(0.0, MOST_LABELS)
        return Range(0.0, float(source.shape[int(dim)] - 1))

    def _clamped(self, call: Call, one: Range) -> Range:
        least = {"relu": 0.0, "relu6": 0.0, "hardtanh": -1.0}.get(call.name)
        most = {"relu6": 6.0, "hardtanh": 1.0}.get(call.name)
        low = call.number("min", call.number("min_val", least))
        high = call.number("max", call.number("max_val", most))
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        if low <= one.low and one.high <= high:
            return one
        if one.is_probability and low <= SMALL and high >= 1 - SMALL:
            return replace(one, low=max(low, one.low), high=min(high, one.high))
        bounded = one.bounded(min(max(one.low, low), high), max(min(one.high, high), low))
        return replace(bounded, softmax=one.softmax)

    def _quotient(self, call: Call, one: Range, other: Range, axis: Axis) -> Range:
        if other.low == other.high:
            return times(one, 1 / other.low) if other.low else UNKNOWN
        over, under = call.source(), call.arguments.get("other")
        while isinstance(under, Call) and under.name in ("clamp", "clamp_min", "clamp_max"):
            under = under.source()
        if one.low >= 0 and isinstance(under, Call):
            if under.name == "add":
                sides = [under.source(), under.arguments.get("other")]
                for side, rest in (sides, sides[::-1]):
                    if self.of(rest, axis).low >= 0 and same(side, over):
                        return WITHIN  # x / (x + c)
                    if isinstance(side, Call) and side.name == "sum" and _is_small(rest):
                        under = side  # a small number that keeps it from being 0
            dims = dims_of(under) if isinstance(under, Call) and under.name == "sum" else []
            if isinstance(under, Call) and same(under.source(), over) and axis and len(dims) == 1:
                keeps = under.arguments.get("keepdim")
                if keeps and dims[0] % axis[1] == axis[0]:
                    return replace(WITHIN, total=1.0, softmax=True)
        if other.low < 0:
            return UNKNOWN
        edges = [
            a / b if b else math.copysign(math.inf, a)
            for a in (one.low, one.high)
            for b in (other.low, other.high)
        ]
        edges = [0.0 if math.isnan(edge) else edge for edge in edges]
        return replace(one.bounded(min(edges), max(edges)), known=False)

    def _part(self, call: Call, axis: Axis) -> Range:
        """Read a part of the rows or of the channels."""
        dim = int(call.number("dim", 0.0) or 0)
        before = with_axis(axis, dim) if call.name in ("select", "unbind") else axis
        found = self.of(call.source(), before)
        if before is not None and dim % before[1] != before[0]:
            return found
        if call.name == "slice" and is_whole_slice(call):
            return found
        return unsummed(found)

    def _item(self, call: Call, axis: Axis) -> Range:
        source, place = call.source(), call.arguments.get("1")
        pieces = ("split", "split_with_sizes", "chunk", "unbind")
        if place != 0 and not (isinstance(source, Call) and source.name in pieces):
            return UNKNOWN  # such as the places of maxima
        return self.of(source, axis)

    def _joined(self, call: Call, axis: Axis) -> Range:
        parts = call.arguments.get("tensors")
        if not isinstance(parts, list) or not parts:
            return UNKNOWN
        dim = int(call.number("dim", 0.0) or 0)
        rank = axis[1] if axis else None
        if call.name == "stack":
            within = without_axis(axis, dim)
            ranges = [self.of(part, within) for part in parts]
            along = rank is None or within is None or within[0] < 0
        else:
            ranges = [self.of(part, axis) for part in parts]
            along = rank is None or axis is None or dim % rank == axis[0]
        found = either(ranges)
        kinds = {part.is_probability for part in ranges}
        if along and (len(kinds) > 1 or any(part.mixed for part in ranges)):
            found = replace(found, mixed=True)
        if not along:
            totals = {found.total for found in ranges}
            return replace(found, total=totals.pop() if len(totals) == 1 else None)
        if len(parts) == 2 and found.is_probability and _is_rest(*parts):
            return replace(found, total=1.0)
        return found

    def _padded(self, call: Call, axis: Axis) -> Range:
        found = self.of(call.source(), axis)
        mode, pads = call.arguments.get("mode") or "constant", call.arguments.get("pad")
        if mode != "constant":
            return found
        value = call.number("value", 0.0) or 0.0
        if not isinstance(pads, list) or axis is None or len(pads) // 2 > axis[1] - 1 - axis[0]:
            found = replace(found, total=None)
        if isinstance(pads, list) and all(isinstance(n, int) and n <= 0 for n in pads):
            return found  # a crop
        if found.is_probability and 0 <= value <= 1:
            return found  # what is outside is no object, or one
        return found.bounded(min(found.low, value), max(found.high, value))

    def _reduced(self, call: Call, axis: Axis) -> Range:
        """Read means and extremes: within the bounds of what they are of."""
        before, over_channels = before_reduction(call, axis)
        found = self.of(call.source(), before)
        keeps = call.name == "mean" and not over_channels
        return found if keeps and not found.log else unsummed(found)

    def _summed(self, call: Call, axis: Axis) -> Range:
        before, over_channels = before_reduction(call, axis)
        found = self.of(call.source(), before)
        if over_channels and found.total is not None and len(dims_of(call)) == 1:
            return Range(found.total, found.total, known=found.known)
        edges = (0.0 if found.low >= 0 else -math.inf), (0.0 if found.high <= 0 else math.inf)
        return found.bounded(*edges)


def same(one: object, other: object, depth: int = 0) -> bool:
    """Whether two values are the same, as an expression that was written twice is."""
    if one is other:
        return True
    if isinstance(one, Call) and isinstance(other, Call):
        return (
            depth < 20
            and one.name == other.name not in ("input", "weight")
            and list(one.arguments) == list(other.arguments)
            and all(
                same(one.arguments[name], other.arguments[name], depth + 1)
                for name in one.arguments
            )
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            same(a, b, depth + 1) for a, b in zip(one, other, strict=True)
        )
    return type(one) is type(other) and not isinstance(one, Call) and one == other


def _is_rest(one: object, other: object) -> bool:
    """Whether one of two values is 1 less the other."""
    for whole, rest in ((one, other), (other, one)):
        if isinstance(rest, Call) and rest.name in ("rsub", "sub"):
            pair = rest.source(), rest.arguments.get("other")
            less, begin = pair if rest.name == "rsub" else pair[::-1]
            if begin in (1, 1.0) and same(less, whole):
                return True
    return False


def _softmax(call: Call, axis: Axis) -> Range:
    dim = call.number("dim")
    if axis is None or dim is None or int(dim) % axis[1] != axis[0]:
        return UNKNOWN  # over the image: no class is meant by it
    if "log" in call.name:
        return Range(high=0.0, log="all")
    return replace(WITHIN, total=1.0, softmax=True)


def _is_small(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= SMALL
