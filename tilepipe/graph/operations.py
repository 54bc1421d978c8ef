"""ONE table of operations: what is known of each operation that a network may be made of.

Each row names the operations of one kind and says what they read, how they are computed if they are
not just called, what is known of their values, and what they cost. Every other file asks the table;
none compares names. To add an operation, add its name to a row, or a row with a function of
`readers`, `computing` or `values` where its arithmetic is new. What is not in the table is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from tilepipe.graph import channels, computing, readers, values
from tilepipe.graph.kernels import rectify
from tilepipe.graph.readings import (
    Attending,
    Operation,
    OperationKind,
    Padding,
    Windowing,
    shape_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from tilepipe.graph.readings import Value


def _of_kernel(operation: Operation) -> int:
    """Return the multiply-adds of a convolution for each row and column: its weights."""
    return math.prod(shape_of(cast("fx.Node", operation.arguments["weight"])))


def _of_matrix(operation: Operation) -> int:
    """Return the multiply-adds of a product with a matrix for each row and column: its weights."""
    matrices = (n for n in operation.node.all_input_nodes if n.meta["val"].ndim == 2)
    return max((math.prod(shape_of(n)) for n in matrices), default=0)


TABLE: tuple[OperationKind, ...] = (
    # Convolutions and products with weights.
    OperationKind(
        names="conv1d conv2d conv3d convolution _convolution",
        reads=readers.read_convolution,
        computes=computing.compute_convolution,
        values=values.any_value,
        multiply_adds=_of_kernel,
        window=Windowing.CONVOLUTION,
        last=True,
    ),
    OperationKind(
        names="conv_transpose1d conv_transpose2d conv_transpose3d",
        reads=readers.read_convolution,
        computes=computing.compute_convolution,
        values=values.any_value,
        multiply_adds=_of_kernel,
        window=Windowing.CONVOLUTION,
        transposed=True,
        last=True,
    ),
    OperationKind(
        names="linear matmul mm bmm addmm baddbmm",
        reads=readers.read_linear,
        values=values.any_value,
        multiply_adds=_of_matrix,
    ),
    # Which letters of an einsum are the image's axes is not read.
    OperationKind(names="einsum", reads=readers.refuse, values=values.any_value),
    OperationKind(
        names="scaled_dot_product_attention",
        reads=readers.read_attention,
        values=values.any_value,
        attends=Attending.ALWAYS,
    ),
    # Pooling.
    OperationKind(
        names="max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices",
        reads=readers.read_pooling,
        computes=computing.compute_maxima,
        values=values.picked,
        window=Windowing.POOLING,
        last=True,
    ),
    OperationKind(
        names="avg_pool1d avg_pool2d avg_pool3d",
        reads=readers.read_pooling,
        computes=computing.compute_means,
        values=values.unchanged,
        window=Windowing.POOLING,
        last=True,
    ),
    OperationKind(
        names="adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        reads=readers.read_adaptive_pooling,
        computes=computing.compute_nothing,
        values=values.picked,
        window=Windowing.POOLING,
        last=True,
    ),
    OperationKind(
        names="adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
        " _adaptive_avg_pool2d _adaptive_avg_pool3d",
        reads=readers.read_adaptive_pooling,
        computes=computing.compute_nothing,
        values=values.unchanged,
        window=Windowing.POOLING,
        last=True,
    ),
    # Interpolation. Cubic overshoots, but its values mean what they did.
    OperationKind(
        names="upsample_nearest1d upsample_nearest2d upsample_nearest3d",
        reads=readers.read_interpolation,
        computes=computing.compute_interpolation,
        values=values.unchanged,
        mode="nearest",
        beside=2,
        last=True,
    ),
    OperationKind(
        names="_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
        reads=readers.read_interpolation,
        computes=computing.compute_interpolation,
        values=values.unchanged,
        mode="nearest-exact",
        beside=2,
        last=True,
    ),
    OperationKind(
        names="upsample_linear1d upsample_bilinear2d upsample_trilinear3d",
        reads=readers.read_interpolation,
        computes=computing.compute_interpolation,
        values=values.unchanged,
        mode="linear",
        beside=5,
        last=True,
    ),
    OperationKind(
        names="upsample_bicubic2d",
        reads=readers.read_interpolation,
        computes=computing.compute_interpolation,
        values=values.unchanged,
        mode="cubic",
        beside=5,
        last=True,
    ),
    OperationKind(
        names="pixel_shuffle",
        reads=readers.read_shuffle,
        computes=computing.compute_shuffle,
        values=values.shuffled,
        last=True,
    ),
    OperationKind(
        names="pixel_unshuffle", reads=readers.read_unshuffle, values=values.shuffled, last=True
    ),
    # Padding, and parts of a tensor.
    OperationKind(
        names="pad",
        reads=readers.read_pad,
        computes=computing.compute_padding,
        values=values.padded,
        padding=Padding.ARGUMENT,
    ),
    OperationKind(
        names="constant_pad_nd",
        reads=readers.read_pad,
        computes=computing.compute_padding,
        values=values.padded,
        padding=Padding.CONSTANT,
    ),
    OperationKind(
        names="reflection_pad1d reflection_pad2d reflection_pad3d",
        reads=readers.read_pad,
        computes=computing.compute_padding,
        values=values.unchanged,
        padding=Padding.REFLECT,
    ),
    OperationKind(
        names="replication_pad1d replication_pad2d replication_pad3d",
        reads=readers.read_pad,
        computes=computing.compute_padding,
        values=values.unchanged,
        padding=Padding.REPLICATE,
    ),
    OperationKind(
        names="slice",
        reads=readers.read_slice,
        computes=computing.compute_slice,
        values=values.sliced,
        crops=True,
    ),
    OperationKind(
        names="narrow",
        reads=readers.read_slice,
        computes=computing.compute_slice,
        values=values.part,
        crops=True,
    ),
    OperationKind(names="select", reads=readers.read_select, values=values.single),
    OperationKind(
        names="split split_with_sizes chunk", reads=readers.read_split, values=values.pieces
    ),
    OperationKind(names="unbind", reads=readers.refuse, values=values.singles),
    OperationKind(names="getitem", reads=readers.read_item, values=values.item),
    # Several tensors as one.
    OperationKind(
        names="cat concat",
        reads=readers.read_cat,
        computes=computing.compute_cat,
        values=values.joined,
        joins=True,
    ),
    OperationKind(names="stack", reads=readers.refuse, values=values.stacked),
    # Dimensions in another order, or of other lengths.
    OperationKind(
        names="permute",
        reads=readers.read_permute,
        values=values.moved(channels.before_permute),
    ),
    OperationKind(
        names="transpose",
        reads=readers.read_transpose,
        values=values.moved(channels.before_transpose),
    ),
    OperationKind(
        names="squeeze",
        reads=readers.read_reshape,
        computes=computing.compute_reshape,
        values=values.moved(channels.before_squeeze),
    ),
    OperationKind(
        names="unsqueeze",
        reads=readers.read_reshape,
        computes=computing.compute_reshape,
        values=values.moved(channels.before_unsqueeze),
    ),
    OperationKind(
        names="view reshape _unsafe_view flatten unflatten",
        reads=readers.read_reshape,
        computes=computing.compute_reshape,
        values=values.moved(channels.before_reshape),
    ),
    OperationKind(
        names="expand",
        reads=readers.read_expand,
        computes=computing.compute_expand,
        values=values.moved(channels.before_expand),
    ),
    OperationKind(names="repeat", reads=readers.read_repeat, values=values.unknown),
    # Normalisation, and what is off when a network is not trained.
    OperationKind(
        names="batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm",
        reads=readers.read_batch_norm,
        values=values.any_value,
    ),
    OperationKind(names="instance_norm", reads=readers.read_instance_norm, values=values.any_value),
    OperationKind(
        names="group_norm native_group_norm",
        reads=readers.read_group_norm,
        values=values.any_value,
    ),
    OperationKind(
        names="layer_norm native_layer_norm rms_norm",
        reads=readers.read_layer_norm,
        values=values.any_value,
    ),
    OperationKind(
        names="dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
        reads=readers.read_dropout,
        values=values.unchanged,
    ),
    # Along one dimension.
    OperationKind(
        names="softmax _softmax",
        reads=readers.read_along_dimension,
        values=values.softmaxed,
        attends=Attending.OF_MATRICES,
    ),
    OperationKind(
        names="log_softmax _log_softmax",
        reads=readers.read_along_dimension,
        values=values.log_softmaxed,
    ),
    OperationKind(
        names="cumsum cumprod glu", reads=readers.read_along_dimension, values=values.unknown
    ),
    # Reductions.
    OperationKind(names="mean", reads=readers.read_reduction, values=values.averaged),
    OperationKind(names="sum", reads=readers.read_reduction, values=values.summed),
    OperationKind(names="amax amin", reads=readers.read_reduction, values=values.reduced),
    OperationKind(names="max", reads=readers.read_reduction, values=values.extreme(max)),
    OperationKind(names="min", reads=readers.read_reduction, values=values.extreme(min)),
    OperationKind(names="argmax argmin", reads=readers.read_reduction, values=values.numbered),
    OperationKind(
        names="var std prod logsumexp linalg_vector_norm",
        reads=readers.read_reduction,
        values=values.unknown,
    ),
    # Elementwise.
    OperationKind(
        names="relu",
        reads=readers.read_broadcast,
        values=values.rectified(0.0),
        into=rectify,
    ),
    OperationKind(names="relu6", reads=readers.read_broadcast, values=values.rectified(0.0, 6.0)),
    OperationKind(
        names="hardtanh", reads=readers.read_broadcast, values=values.rectified(-1.0, 1.0)
    ),
    OperationKind(
        names="clamp clamp_max clamp_min", reads=readers.read_broadcast, values=values.clamped
    ),
    OperationKind(
        names="celu elu gelu hardswish leaky_relu logit mish prelu _prelu_kernel rrelu selu silu",
        reads=readers.read_broadcast,
        values=values.any_value,
    ),
    OperationKind(
        names="hardsigmoid sigmoid bitwise_not eq ge gt isfinite isinf isnan le logical_and"
        " logical_not logical_or lt ne",
        reads=readers.read_broadcast,
        values=values.bounded(0.0, 1.0),
    ),
    OperationKind(
        names="cos erf sin tanh", reads=readers.read_broadcast, values=values.bounded(-1.0, 1.0)
    ),
    OperationKind(
        names="softplus square", reads=readers.read_broadcast, values=values.bounded(0.0, math.inf)
    ),
    OperationKind(
        names="alias clone contiguous detach lift_fresh_copy to _to_copy type_as",
        reads=readers.read_broadcast,
        values=values.unchanged,
    ),
    OperationKind(names="add", reads=readers.read_broadcast, values=values.added),
    OperationKind(names="sub", reads=readers.read_broadcast, values=values.subtracted),
    OperationKind(names="rsub", reads=readers.read_broadcast, values=values.subtracted_from),
    OperationKind(names="mul", reads=readers.read_broadcast, values=values.multiplied),
    OperationKind(names="div", reads=readers.read_broadcast, values=values.divided),
    OperationKind(names="maximum", reads=readers.read_broadcast, values=values.extreme(max)),
    OperationKind(names="minimum", reads=readers.read_broadcast, values=values.extreme(min)),
    OperationKind(names="where", reads=readers.read_broadcast, values=values.chosen),
    OperationKind(names="exp", reads=readers.read_broadcast, values=values.exponential),
    OperationKind(names="log", reads=readers.read_broadcast, values=values.logarithm),
    OperationKind(names="log_sigmoid", reads=readers.read_broadcast, values=values.log_sigmoid),
    OperationKind(names="log_sigmoid_forward", reads=readers.refuse, values=values.log_sigmoid),
    OperationKind(names="reciprocal", reads=readers.read_broadcast, values=values.reciprocal),
    OperationKind(names="neg", reads=readers.read_broadcast, values=values.negative),
    OperationKind(names="abs", reads=readers.read_broadcast, values=values.absolute),
    OperationKind(names="sqrt", reads=readers.read_broadcast, values=values.square_root),
    OperationKind(
        names="addcdiv addcmul atan2 bitwise_and bitwise_or ceil cosh erfc exp2 expm1 floor"
        " floor_divide fmod full_like hardshrink lerp log10 log1p log2 masked_fill nan_to_num"
        " ones_like positive pow remainder round rsqrt sgn sign sinh softshrink tan threshold"
        " zeros_like",
        reads=readers.read_broadcast,
        values=values.unknown,
    ),
)
"""All operations that are known."""

_UNLISTED = OperationKind(names="", reads=readers.refuse, values=values.unknown)


def _axes_in(name: str) -> int:
    digit = re.search(r"(\d)d", name)
    return int(digit[1]) if digit else 0


_BY_NAME: Mapping[str, OperationKind] = {
    name: replace(kind, axes=_axes_in(name)) for kind in TABLE for name in kind.names.split()
}


def kind_of(name: str) -> OperationKind:
    """Return the row of an operation, with the axes in its name; one that refuses if it has none.

    >>> kind_of("conv2d").axes, kind_of("unheard_of").names
    (2, '')
    """
    return _BY_NAME.get(name, _UNLISTED)


def name_of(target: object) -> str:
    """Return the name of what a node calls, without overload and underscore of in-place variants.

    >>> name_of(torch.ops.aten.relu_.default)
    'relu'
    """
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    return target._schema.name.split("::")[1].rstrip("_")


def operation_of(node: fx.Node, dims: Mapping[fx.Node, tuple[int, ...]]) -> Operation:
    """Return a node's call, its arguments bound to the names in the operation's schema.

    ``dims`` are the spatial dimensions of the nodes before it.
    """
    name = name_of(node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        numbered: dict[str, Value] = {str(i): value for i, value in enumerate(node.args)}
        return Operation(node, name, kind_of(name), numbered, dims)
    names = [argument.name for argument in node.target._schema.arguments]
    bound: dict[str, Value] = dict(zip(names, node.args, strict=False))
    return Operation(node, name, kind_of(name), bound | dict(node.kwargs), dims)
