"""What each operation of an exported graph reads, axis by axis.

One reader per family of ATen operations turns a node into rules of index arithmetic. Nothing
here runs a network, and nothing is guessed: an operation without a reader is refused by name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from tilepipe.graph.readings import Access, Flattened, NoRule, Operation, Reading, shape_of
from tilepipe.graph.rules import SAME, Rule, Sampling, convolution, transposed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx


def read_operation(operation: Operation) -> Reading:
    """Return what an operation reads; raise `NoRule` where that is not known."""
    for reader, names in _READERS.items():
        if f" {operation.name} " in f" {names} ":
            return reader(operation)
    raise NoRule(f"operation {operation.name} has no rule")


def _broadcast(operation: Operation) -> Reading:
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
            Rule(0, 1, 0, 0) if extent == 1 < shape[d] else SAME
            for extent, d in zip(extents, dims, strict=True)
        )
        accesses.append(Access(node, tuple(rules)))
    return Reading(tuple(accesses), dims)


def _convolution(operation: Operation) -> Reading:
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
    backwards = "transpose" in operation.name or bool(operation.arguments.get("transposed"))
    rule = transposed if backwards else convolution
    return operation.along(
        [rule(*sizes) for sizes in zip(kernel, stride, padding, dilation, strict=True)]
    )


def _pooling(operation: Operation) -> Reading:
    axes = int(operation.name.split("pool")[1][0])
    kernel = operation.window("kernel_size", axes)
    stride = operation.window("stride", axes, kernel)
    padding = operation.window("padding", axes, [0] * axes)
    dilation = operation.window("dilation", axes, [1] * axes)
    return operation.along(
        [convolution(*sizes) for sizes in zip(kernel, stride, padding, dilation, strict=True)]
    )


def samplings(operation: Operation) -> list[Sampling]:
    """Return where an interpolation samples, for each of the last dimensions of the tensor."""
    axes = int(operation.name[-2])
    mode = "linear" if "linear" in operation.name else "cubic"
    if "nearest" in operation.name:
        mode = "nearest-exact" if "exact" in operation.name else "nearest"
    align = bool(operation.arguments.get("align_corners"))
    sizes_in, sizes_out = operation.shape(operation.source)[-axes:], operation.shape()[-axes:]
    names = ["scales"] if axes == 1 else ["scales_d", "scales_h", "scales_w"][-axes:]
    scales = operation.arguments.get("scale_factors") or [operation.arguments.get(n) for n in names]
    return [
        Sampling(mode, a, b, scale, align)
        for a, b, scale in zip(sizes_in, sizes_out, cast("list[float | None]", scales), strict=True)
    ]


def _interpolation(operation: Operation) -> Reading:
    rules, resized = [], False
    for sampling in samplings(operation):
        resized |= sampling.size_in != sampling.size_out
        if (rule := sampling.rule()) is None:
            raise NoRule(f"operation {operation.name} on {sampling.size_out} rows has no rule")
        rules.append(rule)
    aligned = bool(operation.arguments.get("align_corners")) and resized
    lattice = "align_corners=True samples by the size of the whole image" if aligned else ""
    return operation.along(rules, lattice=lattice)


def _pad(operation: Operation) -> Reading:
    listed = operation.arguments.get("pad") or operation.arguments.get("padding")
    if operation.arguments.get("mode") == "circular":
        return operation.whole("circular padding")
    before = list(reversed(list(cast("Sequence[int]", listed))[0::2]))
    return operation.along([Rule(1, 1, -n, -n) for n in before])


def _slice(operation: Operation) -> Reading:
    shape, dims = operation.shape(operation.source), operation.dims[operation.source]
    dim, step = operation.number("dim") % len(shape), operation.number("step", 1)
    start = operation.number("start")
    start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    rules = tuple(Rule(step, 1, start, start) if d == dim else SAME for d in dims)
    return Reading((Access(operation.source, rules),), dims)


def _select(operation: Operation) -> Reading:
    dims = operation.dims[operation.source]
    dim = operation.number("dim") % len(operation.shape(operation.source))
    if dim in dims:
        raise Flattened("select takes a single row of the image")
    left = tuple(d - (d > dim) for d in dims)
    return Reading((Access(operation.source, (SAME,) * len(dims)),), left)


def _split(operation: Operation) -> Reading:
    dim = operation.number("dim") % len(operation.shape(operation.source))
    if dim in operation.dims[operation.source]:
        raise NoRule(f"operation {operation.name} along an axis of the image has no rule")
    return operation.pointwise()


def _cat(operation: Operation) -> Reading:
    tensors = cast("list[fx.Node]", operation.arguments["tensors"])
    dims = operation.dims[next(node for node in tensors if node in operation.dims)]
    dim = operation.number("dim") % len(operation.shape())
    accesses, position = [], 0
    for node in tensors:
        if node not in operation.dims:
            raise NoRule("operation cat with a constant has no rule")
        if operation.dims[node] != dims:
            return operation.whole("cat mixes axes of the image")
        rules = tuple(Rule(1, 1, -position, -position) if d == dim else SAME for d in dims)
        accesses.append(Access(node, rules))
        position += shape_of(node)[dim]
    return Reading(tuple(accesses), dims)


def _reduction(operation: Operation) -> Reading:
    """Read sums, means and extremes: pointwise unless an axis of the image is among the reduced.

    The larger of two tensors is read as their sum is.
    """
    if "other" in operation.arguments:
        return _broadcast(operation)
    rank, dims = len(operation.shape(operation.source)), operation.dims[operation.source]
    reduced = [d % rank for d in operation.window("dim", 1, range(rank))]
    if set(reduced) & set(dims):
        return operation.whole(f"{operation.name} over the whole image")
    if operation.arguments.get("keepdim"):
        return operation.pointwise()
    left = tuple(d - sum(r < d for r in reduced) for d in dims)
    return Reading((Access(operation.source, (SAME,) * len(dims)),), left)


def _along_dimension(operation: Operation) -> Reading:
    """Read softmax and running sums: pointwise unless their dimension is an axis of the image."""
    if operation.number("dim", -1) % len(operation.shape()) in operation.dims[operation.source]:
        return operation.whole(f"{operation.name} along an axis of the image")
    return operation.pointwise()


def _layer_norm(operation: Operation) -> Reading:
    last = len(operation.window("normalized_shape", 1))
    if max(operation.dims[operation.source]) >= len(operation.shape()) - last:
        return operation.whole("layer normalisation over the whole image")
    return operation.pointwise()


def _linear(operation: Operation) -> Reading:
    if operation.name == "einsum":  # which of its letters are the image's axes is not read
        raise NoRule("operation einsum has no rule")
    spatial = [node for node in operation.node.all_input_nodes if node in operation.dims]
    last = len(operation.shape()) - 1
    if spatial != [operation.source] or last in operation.dims[operation.source]:
        return operation.whole(f"{operation.name} mixes the whole image")
    return operation.pointwise()


def _batch_norm(operation: Operation) -> Reading:
    if operation.arguments.get("training") or operation.arguments.get("running_mean") is None:
        return operation.whole("batch normalisation without running statistics")
    return operation.pointwise()


def _instance_norm(operation: Operation) -> Reading:
    if operation.arguments.get("use_input_stats"):
        return operation.whole("instance normalisation over the whole image")
    return operation.pointwise()


def _group_norm(operation: Operation) -> Reading:
    return operation.whole("group normalisation over the whole image")


def _attention(operation: Operation) -> Reading:
    return operation.whole("attention over the whole image")


def _dropout(operation: Operation) -> Reading:
    if operation.arguments.get("train"):
        raise NoRule("dropout that is on in evaluation is random: it has no rule")
    return operation.pointwise()


def _adaptive_pooling(operation: Operation) -> Reading:
    if operation.shape() == operation.shape(operation.source):
        return operation.pointwise()
    return operation.whole("pooling over the whole image")


def _permute(operation: Operation) -> Reading:
    rank, dims = len(operation.shape()), operation.dims[operation.source]
    order = list(range(rank))
    if operation.name == "permute":
        order = [d % rank for d in operation.window("dims", rank)]
    else:
        a, b = operation.number("dim0") % rank, operation.number("dim1") % rank
        order[a], order[b] = order[b], order[a]
    access = Access(operation.source, (SAME,) * len(dims))
    return Reading((access,), tuple(order.index(d) for d in dims))


def _reshape(operation: Operation) -> Reading:
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


def _expand(operation: Operation) -> Reading:
    grown = len(operation.shape()) - len(operation.shape(operation.source))
    dims = operation.dims[operation.source]
    old, new = operation.shape(operation.source), operation.shape()
    rules = tuple(SAME if old[d] == new[d + grown] else Rule(0, 1, 0, 0) for d in dims)
    return Reading((Access(operation.source, rules),), tuple(d + grown for d in dims))


def _repeat(operation: Operation) -> Reading:
    """Read copies along other axes than the image's, such as of one channel for many."""
    repeats = operation.window("repeats", 1)
    dims = operation.dims[operation.source]
    grown = len(repeats) - len(operation.shape(operation.source))
    if any(repeats[d + grown] != 1 for d in dims):
        raise NoRule("operation repeat along an axis of the image has no rule")
    return Reading((Access(operation.source, (SAME,) * len(dims)),), tuple(d + grown for d in dims))


def _shuffle(operation: Operation) -> Reading:
    if operation.name == "pixel_shuffle":
        return operation.along([Rule(1, operation.number("upscale_factor"))] * 2)
    factor = operation.number("downscale_factor")
    return operation.along([Rule(factor, 1, 0, factor - 1)] * 2)


def _first(operation: Operation) -> Reading:
    return operation.pointwise()


_READERS: dict[Callable[[Operation], Reading], str] = {
    _broadcast: (
        "abs add addcdiv addcmul alias atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp"
        " clamp_max clamp_min clone contiguous cos cosh detach div elu eq erf erfc exp exp2 expm1"
        " floor floor_divide fmod full_like ge gelu gt hardshrink hardsigmoid hardswish hardtanh"
        " isfinite isinf isnan le leaky_relu lerp lift_fresh_copy log log10 log1p log2 log_sigmoid"
        " logical_and logical_not logical_or logit lt masked_fill maximum minimum mish mul"
        " nan_to_num ne neg ones_like positive pow prelu _prelu_kernel reciprocal relu relu6"
        " remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink"
        " sqrt square sub tan tanh threshold to _to_copy type_as where zeros_like"
    ),
    _convolution: (
        "conv1d conv2d conv3d convolution _convolution"
        " conv_transpose1d conv_transpose2d conv_transpose3d"
    ),
    _pooling: (
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices"
        " avg_pool1d avg_pool2d avg_pool3d"
    ),
    _interpolation: (
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d"
        " _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d"
        " upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
    ),
    _pad: (
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d"
    ),
    _slice: "slice narrow",
    _select: "select",
    _split: "split split_with_sizes chunk",
    _cat: "cat concat",
    _reduction: (
        "mean sum amax amin max min var std argmax argmin prod logsumexp linalg_vector_norm"
    ),
    _along_dimension: "softmax log_softmax _softmax _log_softmax cumsum cumprod glu",
    _layer_norm: "layer_norm native_layer_norm rms_norm",
    _linear: "linear matmul mm bmm einsum addmm baddbmm",
    _batch_norm: "batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm",
    _instance_norm: "instance_norm",
    _group_norm: "group_norm native_group_norm",
    _attention: "scaled_dot_product_attention",
    _dropout: "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
    _adaptive_pooling: (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d"
        " _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    ),
    _permute: "permute transpose",
    _reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze",
    _expand: "expand",
    _repeat: "repeat",
    _shuffle: "pixel_shuffle pixel_unshuffle",
    _first: "getitem",
}
