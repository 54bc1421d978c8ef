"""Calls of ATen operations on parts of an image, with the fastest kernel that the library has."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tilepipe.geometry import Region


def call_node(node: fx.Node, values: Mapping[fx.Node, object], device: torch.device) -> object:
    """Call a node's operation on these values; what it makes lies on the ``device``.

    The graph was exported on another, ``meta``, which its operations may name.
    """
    target = cast("Callable[..., object]", node.target)

    def value(leaf: object) -> object:
        if isinstance(leaf, torch.device):
            return device
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    args, kwargs = tree_map(value, (node.args, node.kwargs))
    return target(*args, **kwargs)


def convolve(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    onto: Tensor | None = None,
) -> Tensor:
    """Convolve, and add it to ``onto`` in place where that is given.

    On a CPU by oneDNN always in 3D, as the library does for large tensors only, and in one pass
    where it is added.
    """
    sizes = list(padding), list(stride), list(dilation), groups
    by_onednn = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
    if onto is not None and by_onednn is not None and _suits_onednn(tensor):
        added = by_onednn.binary(onto, tensor, weight, bias, *sizes, "add", 1.0, None, [], None)
        return cast("Tensor", added)
    if tensor.ndim == 5 and _suits_onednn(tensor):
        result = torch.mkldnn_convolution(tensor, weight, bias, *sizes)
    else:
        function = F.conv2d if tensor.ndim == 4 else F.conv3d
        result = function(tensor, weight, bias, sizes[1], sizes[0], sizes[2], groups)
    return result if onto is None else onto.add_(result)


def convolve_transposed(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve transposed without padding; in 3D on a CPU by oneDNN, as `convolve`."""
    by_onednn = getattr(torch.ops.mkldnn, "_convolution_transpose_pointwise", None)
    if groups == 1 and by_onednn is not None and tensor.ndim == 5 and _suits_onednn(tensor):
        none = [0] * len(stride)
        sizes = none, none, list(stride), list(dilation)
        return cast("Tensor", by_onednn(tensor, weight, bias, *sizes, groups, "none", [], ""))
    function = F.conv_transpose2d if tensor.ndim == 4 else F.conv_transpose3d
    return function(tensor, weight, bias, list(stride), 0, 0, groups, list(dilation))


def rectify(tensor: Tensor, out: Tensor) -> Tensor:
    """Write a tensor without its negative values into the memory of another."""
    return torch.clamp_min(tensor, 0, out=out)


def _suits_onednn(tensor: Tensor) -> bool:
    plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available()


def crop(value: object, dims: Sequence[int], rows: Region, origin: Sequence[int]) -> object:
    """Return rows of a tensor, or of each of several."""
    if isinstance(value, tuple | list):
        return tuple(crop(part, dims, rows, origin) for part in value)
    tensor = cast("Tensor", value)
    for d, a, n, o in zip(dims, rows.start, rows.shape, origin, strict=True):
        if tensor.ndim > d and tensor.shape[d] != n:
            tensor = tensor.narrow(d, a - o, n)
    return tensor


def fit(tensor: Tensor, dims: Sequence[int], held: Region, wanted: Region, value: float) -> Tensor:
    """Return the wanted rows of a tensor that holds others: cut off, and filled with a value."""
    pads = [0] * (2 * tensor.ndim)
    for d, a, b, c, e in zip(dims, held.start, held.stop, wanted.start, wanted.stop, strict=True):
        pads[2 * (tensor.ndim - 1 - d)] = a - c
        pads[2 * (tensor.ndim - 1 - d) + 1] = e - b
    if max(pads) > 0:
        return F.pad(tensor, pads, value=value)
    for d, a, c, n in zip(dims, held.start, wanted.start, wanted.shape, strict=True):
        tensor = tensor.narrow(d, c - a, n)
    return tensor


def empty(like: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Return memory for a tensor: batch, ``dims`` from the outermost inwards, then the rest."""
    rest = [d for d in range(len(shape)) if d not in dims]
    order = [*rest[:1], *dims, *rest[1:]]
    memory = like.new_empty([shape[d] for d in order])
    return memory.permute([order.index(d) for d in range(len(shape))])


def join(parts: Sequence[Tensor], dims: Sequence[int], axis: int) -> Tensor:
    """Concatenate along one of ``dims``, which is outermost in memory, the channels innermost."""
    dim, shape, place = dims[axis], list(parts[0].shape), 0
    shape[dim] = sum(part.shape[dim] for part in parts)
    joined = empty(parts[0], shape, [dim, *(d for d in dims if d != dim)])
    for part in parts:
        joined.narrow(dim, place, part.shape[dim]).copy_(part)
        place += part.shape[dim]
    return joined
