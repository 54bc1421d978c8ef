"""Where the channels of a network's output lie in the tensors that it is made of."""

from __future__ import annotations

import math

from tilepipe.graph.calls import Call

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


def before_move(call: Call, axis: Axis) -> Axis:
    """Return where channels lie before an operation that changes the shape."""
    source = call.source()
    old = source.shape if isinstance(source, Call) else None
    if axis is None:
        return None
    place, rank = axis
    if call.name == "permute":
        order = call.arguments.get("dims")
        if not isinstance(order, list) or place < 0:
            return axis if place < 0 else None
        found = order[place]
        return (found % rank, rank) if isinstance(found, int) else None
    if call.name == "transpose":
        a, b = (int(call.number(n, 0.0) or 0) % rank for n in ("dim0", "dim1"))
        return {a: b, b: a}.get(place, place), rank
    if call.name == "unsqueeze":
        return without_axis(axis, int(call.number("dim", 0.0) or 0))
    if call.name == "squeeze" and (dim := call.number("dim")) is not None and old is None:
        return with_axis((place, rank), int(dim)) if place >= 0 else None
    new = call.shape
    if old is None or new is None or place < 0:
        return None
    if call.name == "expand":
        return (place - (len(new) - len(old)), len(old)) if place >= len(new) - len(old) else None
    around = new[place], math.prod(new[:place]), math.prod(new[place + 1 :])
    for d, n in enumerate(old):
        if (n, math.prod(old[:d]), math.prod(old[d + 1 :])) == around:
            return d, len(old)
    return None


def is_whole_slice(call: Call) -> bool:
    """Whether a slice leaves nothing out."""
    source = call.source()
    if isinstance(source, Call) and source.shape is not None and call.shape is not None:
        return source.shape == call.shape
    end = call.arguments.get("end")
    reaches = end is None or (isinstance(end, int) and end >= 2**62)
    return reaches and call.number("start", 0.0) == 0 and call.number("step", 1.0) == 1
