"""What the operations of an exported graph read, axis by axis.

Each function turns a call into rules of index arithmetic; the table in `operations` says which of
them reads which operation. Nothing here runs a network, and nothing is guessed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from tilepipe.graph.readings import Access, Flattened, NoRule, Operation, Reading, shape_of
from tilepipe.graph.rules import SAME, AxisRule, Sampling, convolution, transposed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx


def read_broadcast(operation: Operation) -> Reading:
    """Read elementwise, with broadcasting along axes of length 1."""
    shape = operation.shape()
    inputs = [node for node in operation.node.all_input_nodes if "val" in node.meta]
    sources = [node for node in inputs if node in operation.dims]
    missing = {node: len(shape) - len(shape_of(node)) for node in inputs}
    dims = tuple(missing[sources[0]] + d for d in operation.dims[sources[0]])
    accesses = []
    for node in inputs:
        extents = [1 if d < missing[node] else shape_of(node)[d - missing[node]] for d in dims]
        if node not in operation.dims:
            if any(extent > 1 for extent in extents):
                raise NoRule(f"operation {operation.name} with a constant of the image's size")
            continue
        if tuple(missing[node] + d for d in operation.dims[node]) != dims:
            return operation.whole(f"{operation.name} mixes axes of the image")
        rules = (
            AxisRule(0, 1, 0, 0) if extent == 1 < shape[d] else SAME
            for extent, d in zip(extents, dims, strict=True)
        )
        accesses.append(Access(node, tuple(rules)))
    return Reading(tuple(accesses), dims)


def read_convolution(operation: Operation) -> Reading:
    """Read the rows under the kernel, of a convolution or of a transposed one."""
    weight = cast("fx.Node", operation.arguments["weight"])
    if weight in operation.dims or operation.source not in operation.dims:
        return operation.whole("convolution with weights made from the image")
    kernel = shape_of(weight)[2:]
    axes = len(kernel)
    stride = operation.window("stride", axes, [1] * axes)
    dilation = operation.window("dilation", axes, [1] * axes)
    if isinstance(operation.arguments.get("padding"), str):
        same = operation.arguments["padding"] == "same"
        padding = [d * (k - 1) // 2 if same else 0 for k, d in zip(kernel, dilation, strict=True)]
    else:
        padding = operation.window("padding", axes, [0] * axes)
    rule = transposed if operation.is_transposed else convolution
    return operation.along(
        [rule(*sizes) for sizes in zip(kernel, stride, padding, dilation, strict=True)]
    )


def read_pooling(operation: Operation) -> Reading:
    """Read the rows under the window."""
    axes = operation.kind.axes
    kernel = operation.window("kernel_size", axes)
    stride = operation.window("stride", axes, kernel)
    padding = operation.window("padding", axes, [0] * axes)
    dilation = operation.window("dilation", axes, [1] * axes)
    return operation.along(
        [convolution(*sizes) for sizes in zip(kernel, stride, padding, dilation, strict=True)]
    )


def samplings(operation: Operation) -> list[Sampling]:
    """Return where an interpolation samples, for each of the last dimensions of the tensor."""
    axes, mode = operation.kind.axes, operation.kind.mode
    align = bool(operation.arguments.get("align_corners"))
    sizes_in, sizes_out = operation.shape(operation.source)[-axes:], operation.shape()[-axes:]
    names = ["scales"] if axes == 1 else ["scales_d", "scales_h", "scales_w"][-axes:]
    scales = operation.arguments.get("scale_factors") or [operation.arguments.get(n) for n in names]
    return [
        Sampling(mode, a, b, scale, align)
        for a, b, scale in zip(sizes_in, sizes_out, cast("list[float | None]", scales), strict=True)
    ]


def read_interpolation(operation: Operation) -> Reading:
    """Read the rows between which the library samples."""
    rules, resized = [], False
    for sampling in samplings(operation):
        resized |= sampling.size_in != sampling.size_out
        if (rule := sampling.rule()) is None:
            raise NoRule(f"operation {operation.name} on {sampling.size_out} rows has no rule")
        rules.append(rule)
    aligned = bool(operation.arguments.get("align_corners")) and resized
    lattice = "align_corners=True samples by the size of the whole image" if aligned else ""
    return operation.along(rules, lattice=lattice)


def read_pad(operation: Operation) -> Reading:
    """Read the tensor moved by what is padded before it."""
    listed = operation.arguments.get("pad") or operation.arguments.get("padding")
    if operation.arguments.get("mode") == "circular":
        return operation.whole("circular padding")
    before = list(reversed(list(cast("Sequence[int]", listed))[0::2]))
    return operation.along([AxisRule(1, 1, -n, -n) for n in before])


def read_slice(operation: Operation) -> Reading:
    """Read every so many rows from a first one on."""
    shape, dims = operation.shape(operation.source), operation.dims[operation.source]
    dim, step = operation.number("dim") % len(shape), operation.number("step", 1)
    start = operation.number("start")
    start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    rules = tuple(AxisRule(step, 1, start, start) if d == dim else SAME for d in dims)
    return Reading((Access(operation.source, rules),), dims)


def read_select(operation: Operation) -> Reading:
    """Read along other axes than the one of which a single row is taken."""
    dims = operation.dims[operation.source]
    dim = operation.number("dim") % len(operation.shape(operation.source))
    if dim in dims:
        raise Flattened("select takes a single row of the image")
    left = tuple(d - (d > dim) for d in dims)
    return Reading((Access(operation.source, (SAME,) * len(dims)),), left)


def read_split(operation: Operation) -> Reading:
    """Read each row from the same row, of pieces along other axes than those of the image."""
    dim = operation.number("dim") % len(operation.shape(operation.source))
    if dim in operation.dims[operation.source]:
        raise NoRule(f"operation {operation.name} along an axis of the image has no rule")
    return operation.pointwise()


def read_cat(operation: Operation) -> Reading:
    """Read tensors that are put one behind the other."""
    tensors = cast("list[fx.Node]", operation.arguments["tensors"])
    dims = operation.dims[next(node for node in tensors if node in operation.dims)]
    dim = operation.number("dim") % len(operation.shape())
    accesses, position = [], 0
    for node in tensors:
        if node not in operation.dims:
            raise NoRule(f"operation {operation.name} with a constant has no rule")
        if operation.dims[node] != dims:
            return operation.whole(f"{operation.name} mixes axes of the image")
        rules = tuple(AxisRule(1, 1, -position, -position) if d == dim else SAME for d in dims)
        accesses.append(Access(node, rules))
        position += shape_of(node)[dim]
    return Reading(tuple(accesses), dims)


def read_reduction(operation: Operation) -> Reading:
    """Read sums, means and extremes: pointwise unless an axis of the image is among the reduced.

    The larger of two tensors is read as their sum is.
    """
    if "other" in operation.arguments:
        return read_broadcast(operation)
    rank, dims = len(operation.shape(operation.source)), operation.dims[operation.source]
    reduced = [d % rank for d in operation.window("dim", 1, range(rank))]
    if set(reduced) & set(dims):
        return operation.whole(f"{operation.name} over the whole image")
    if operation.arguments.get("keepdim"):
        return operation.pointwise()
    left = tuple(d - sum(r < d for r in reduced) for d in dims)
    return Reading((Access(operation.source, (SAME,) * len(dims)),), left)


def read_along_dimension(operation: Operation) -> Reading:
    """Read softmax and running sums: pointwise unless their dimension is an axis of the image."""
    if operation.number("dim", -1) % len(operation.shape()) in operation.dims[operation.source]:
        return operation.whole(f"{operation.name} along an axis of the image")
    return operation.pointwise()


def read_layer_norm(operation: Operation) -> Reading:
    """Read each row from the same row, if the axes of the image are not normalised over."""
    last = len(operation.window("normalized_shape", 1))
    if max(operation.dims[operation.source]) >= len(operation.shape()) - last:
        return operation.whole("layer normalisation over the whole image")
    return operation.pointwise()


def read_linear(operation: Operation) -> Reading:
    """Read each row from the same row, if only one factor is made from the image."""
    spatial = [node for node in operation.node.all_input_nodes if node in operation.dims]
    last = len(operation.shape()) - 1
    if spatial != [operation.source] or last in operation.dims[operation.source]:
        return operation.whole(f"{operation.name} mixes the whole image")
    return operation.pointwise()


def read_batch_norm(operation: Operation) -> Reading:
    """Read each row from the same row, if the statistics are those that were learned."""
    if operation.arguments.get("training") or operation.arguments.get("running_mean") is None:
        return operation.whole("batch normalisation without running statistics")
    return operation.pointwise()


def read_instance_norm(operation: Operation) -> Reading:
    """Read each row from the same row, if the statistics are those that were learned."""
    if operation.arguments.get("use_input_stats"):
        return operation.whole("instance normalisation over the whole image")
    return operation.pointwise()


def read_group_norm(operation: Operation) -> Reading:
    """Read the whole image, of which the statistics are taken."""
    return operation.whole("group normalisation over the whole image")


def read_attention(operation: Operation) -> Reading:
    """Read the whole image, whose pieces are weighed against one another."""
    return operation.whole("attention over the whole image")


def read_dropout(operation: Operation) -> Reading:
    """Read each row from the same row, if nothing is dropped at random."""
    if operation.arguments.get("train"):
        raise NoRule("dropout that is on in evaluation is random: it has no rule")
    return operation.pointwise()


def read_adaptive_pooling(operation: Operation) -> Reading:
    """Read each row from the same row, if the size is that of the tensor already."""
    if operation.shape() == operation.shape(operation.source):
        return operation.pointwise()
    return operation.whole("pooling over the whole image")


def read_permute(operation: Operation) -> Reading:
    """Read a tensor whose dimensions are put in another order."""
    rank = len(operation.shape())
    return _reordered(operation, [d % rank for d in operation.window("dims", rank)])


def read_transpose(operation: Operation) -> Reading:
    """Read a tensor two of whose dimensions change places."""
    rank = len(operation.shape())
    order, a, b = (
        list(range(rank)),
        operation.number("dim0") % rank,
        operation.number("dim1") % rank,
    )
    order[a], order[b] = order[b], order[a]
    return _reordered(operation, order)


def _reordered(operation: Operation, order: list[int]) -> Reading:
    dims = operation.dims[operation.source]
    access = Access(operation.source, (SAME,) * len(dims))
    return Reading((access,), tuple(order.index(d) for d in dims))


def read_reshape(operation: Operation) -> Reading:
    """Read reshapes that leave each axis of the image whole, found by what lies round it."""
    old, new = operation.shape(operation.source), operation.shape()
    dims = []
    for d in operation.dims[operation.source]:
        around = old[d], math.prod(old[:d]), math.prod(old[d + 1 :])
        places = (
            e
            for e, n in enumerate(new)
            if (n, math.prod(new[:e]), math.prod(new[e + 1 :])) == around and e not in dims
        )
        place = next(places, None)
        if place is None:
            raise Flattened(f"{operation.name} folds an axis of the image into another")
        dims.append(place)
    return Reading((Access(operation.source, (SAME,) * len(dims)),), tuple(dims))


def read_expand(operation: Operation) -> Reading:
    """Read the only row of the axes that are expanded, and else the same row."""
    grown = len(operation.shape()) - len(operation.shape(operation.source))
    dims = operation.dims[operation.source]
    old, new = operation.shape(operation.source), operation.shape()
    rules = tuple(SAME if old[d] == new[d + grown] else AxisRule(0, 1, 0, 0) for d in dims)
    return Reading((Access(operation.source, rules),), tuple(d + grown for d in dims))


def read_repeat(operation: Operation) -> Reading:
    """Read copies along other axes than the image's, such as of one channel for many."""
    repeats = operation.window("repeats", 1)
    dims = operation.dims[operation.source]
    grown = len(repeats) - len(operation.shape(operation.source))
    if any(repeats[d + grown] != 1 for d in dims):
        raise NoRule("operation repeat along an axis of the image has no rule")
    return Reading((Access(operation.source, (SAME,) * len(dims)),), tuple(d + grown for d in dims))


def read_shuffle(operation: Operation) -> Reading:
    """Read a shuffle of channels into rows."""
    return operation.along([AxisRule(1, operation.number("upscale_factor"))] * 2)


def read_unshuffle(operation: Operation) -> Reading:
    """Read a shuffle of rows into channels."""
    factor = operation.number("downscale_factor")
    return operation.along([AxisRule(factor, 1, 0, factor - 1)] * 2)


def read_item(operation: Operation) -> Reading:
    """Read one of several tensors: each row from the same row."""
    return operation.pointwise()


def refuse(operation: Operation) -> Reading:
    """Raise `NoRule`: what the operation reads is not known."""
    raise NoRule(f"operation {operation.name} has no rule")
