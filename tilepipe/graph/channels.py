"""Where the channels of a network's output lie in the tensors that it is made of."""

from __future__ import annotations

import math

from tilepipe.graph.readings import Call

Axis = tuple[int, int] | None
"""Where the output's channels lie in a tensor, and its rank; -1: they are an axis that is added
later. None where that is not known."""


def dims_of(call: Call) -> list[int]:
    """Return the dimensions that a reduction runs over; none where it is all of them."""
    value = call.arguments.get("dim")
    if isinstance(value, list):
        return [d for d in value if isinstance(d, int)]
    return [value] if isinstance(value, int) else []


def before_reduction(call: Call, axis: Axis) -> tuple[Axis, bool]:
    """Return where the channels lie before a reduction, and whether it runs over them."""
    dims = dims_of(call)
    if axis is None or not dims:
        return None, True
    place, rank = axis
    if call.arguments.get("keepdim"):
        return axis, place in [d % rank for d in dims]
    if len(dims) > 1:
        return None, True
    before = with_axis(axis, dims[0])
    return before, before is not None and dims[0] % before[1] == before[0]


def with_axis(axis: Axis, dim: int) -> Axis:
    """Return where channels lie in a tensor that has ``dim`` besides; it is theirs if none is."""
    if axis is None:
        return None
    place, rank = axis
    dim %= rank + 1
    return (dim if place < 0 else place + (dim <= place)), rank + 1


def without_axis(axis: Axis, dim: int) -> Axis:
    """Return where channels lie in a tensor that has no ``dim`` yet."""
    if axis is None:
        return None
    place, rank = axis
    dim %= rank
    return (-1 if dim == place or place < 0 else place - (dim < place)), rank - 1


def before_permute(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before dimensions are put in another order."""
    order = call.arguments.get("dims")
    if axis is None or axis[0] < 0:
        return axis
    place = order[axis[0]] if isinstance(order, list) else None
    return (place % axis[1], axis[1]) if isinstance(place, int) else None


def before_transpose(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before two dimensions change places."""
    if axis is None:
        return None
    place, rank = axis
    a, b = (int(call.number(name, 0.0) or 0) % rank for name in ("dim0", "dim1"))
    return {a: b, b: a}.get(place, place), rank


def before_unsqueeze(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before a dimension is added."""
    return without_axis(axis, int(call.number("dim", 0.0) or 0))


def before_squeeze(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before dimensions of length 1 are taken out."""
    dim = call.number("dim")
    if axis is None or dim is None or _shape_before(call) is not None:
        return before_reshape(call, axis)
    return with_axis(axis, int(dim)) if axis[0] >= 0 else None


def before_expand(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before dimensions are added in front."""
    old, new = _shape_before(call), call.shape
    if axis is None or axis[0] < 0 or old is None or new is None:
        return None
    grown = len(new) - len(old)
    return (axis[0] - grown, len(old)) if axis[0] >= grown else None


def before_reshape(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before a reshape that leaves their dimension whole."""
    old, new = _shape_before(call), call.shape
    if axis is None or axis[0] < 0 or old is None or new is None:
        return None
    place = axis[0]
    around = new[place], math.prod(new[:place]), math.prod(new[place + 1 :])
    for d, n in enumerate(old):
        if (n, math.prod(old[:d]), math.prod(old[d + 1 :])) == around:
            return d, len(old)
    return None


def _shape_before(call: Call) -> tuple[int, ...] | None:
    source = call.source()
    return source.shape if isinstance(source, Call) else None


def is_whole_slice(call: Call) -> bool:
    """Whether a slice leaves nothing out."""
    source = call.source()
    if isinstance(source, Call) and source.shape is not None and call.shape is not None:
        return source.shape == call.shape
    end = call.arguments.get("end")
    reaches = end is None or (isinstance(end, int) and end >= 2**62)
    return reaches and call.number("start", 0.0) == 0 and call.number("step", 1.0) == 1
