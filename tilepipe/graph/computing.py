"""How operations are computed on a region that are not just called on the same rows.

Each function computes a region of one operation, from what ``fetch`` gives of those before it; the
table in `operations` says which of them computes which operation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from tilepipe.geometry import Region
from tilepipe.graph.bounds import extents, inside_of, pad_mode, padded_rows, pads_of, reads
from tilepipe.graph.interpolation import library_mode, sample
from tilepipe.graph.kernels import convolve, convolve_transposed, fit
from tilepipe.graph.readers import samplings
from tilepipe.graph.readings import shape_of

if TYPE_CHECKING:
    from torch import Tensor, fx

    from tilepipe.graph.evaluator import Fetch, RegionEvaluator
    from tilepipe.graph.graph import GraphNode


def compute_nothing(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Return the rows themselves, as pooling to the size that there is."""
    return fetch(item.operation.source, box)


def compute_reshape(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Reshape: the region's sizes stand in the place of the image's."""
    tensor = cast("Tensor", evaluator.values(item, box, fetch)[item.operation.source])
    return tensor.reshape(_shape_on(item, box))


def compute_expand(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Expand: the region's sizes stand in the place of the image's."""
    tensor = cast("Tensor", evaluator.values(item, box, fetch)[item.operation.source])
    return tensor.expand(_shape_on(item, box))


def _shape_on(item: GraphNode, box: Region) -> list[int]:
    """Return the shape of an operation's tensor on a region."""
    shape = list(shape_of(item.node))
    for d, size in zip(item.reading.dims, box.shape, strict=True):
        shape[d] = size
    return shape


def compute_convolution(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Convolve, given the rows outside the tensor where only one end has any."""
    if item.operation.is_transposed:
        return _transposed(evaluator, item, box, fetch)
    return _convolved(evaluator, item, box, fetch, None, None)


def convolve_joined(
    evaluator: RegionEvaluator, item: GraphNode, joined: GraphNode, box: Region, fetch: Fetch
) -> Tensor:
    """Convolve the tensors that a node concatenates, one after the other: it is not made."""
    total, first = None, 0
    for access in joined.reading.accesses:
        source, channels = access.source, shape_of(access.source)[1]
        held = partial(_fetch_of, fetch, source)
        total = _convolved(evaluator, item, box, held, (first, channels), total)
        first += channels
    assert total is not None
    return total


def _convolved(
    evaluator: RegionEvaluator,
    item: GraphNode,
    box: Region,
    fetch: Fetch,
    channels: tuple[int, int] | None,
    total: Tensor | None,
) -> Tensor:
    """Convolve some of the input's channels, and add that to the ``total`` of those before."""
    operation, axes = item.operation, len(box.start)
    tensor, _, padding = _padded(evaluator, item, box, fetch, 0.0)
    weight = cast("Tensor", evaluator.constants[cast("fx.Node", operation.arguments["weight"])])
    weight = evaluator.turned_weight(weight, channels)
    bias = cast("fx.Node | None", operation.arguments.get("bias"))
    added = None if bias is None else cast("Tensor", evaluator.constants[bias])
    convolution = partial(
        convolve,
        weight=weight,
        bias=added if total is None else None,
        stride=evaluator.order(operation.window("stride", axes, [1] * axes)),
        padding=evaluator.order(padding),
        dilation=evaluator.order(operation.window("dilation", axes, [1] * axes)),
        groups=operation.number("groups", 1),
        onto=None if total is None else evaluator.turn(total),
    )
    return evaluator.turned(tensor, convolution)


def compute_maxima(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Take the maximum over windows."""
    operation, axes = item.operation, len(box.start)
    tensor, _, padding = _padded(evaluator, item, box, fetch, float("-inf"))
    kernel = operation.window("kernel_size", axes)
    pool = F.max_pool2d if axes == 2 else F.max_pool3d
    maxima = evaluator.turned(
        tensor,
        lambda turned: pool(
            turned,
            evaluator.order(kernel),
            evaluator.order(operation.window("stride", axes, kernel)),
            evaluator.order(padding),
            evaluator.order(operation.window("dilation", axes, [1] * axes)),
        ),
    )
    return (maxima,) if item.operation.several else maxima


def compute_means(evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch) -> object:
    """Average over windows; those that reach outside the tensor count what they hold."""
    operation, axes = item.operation, len(box.start)
    tensor, rows, _ = _padded(evaluator, item, box, fetch, 0.0, explicit=True)
    kernel = operation.window("kernel_size", axes)
    stride = operation.window("stride", axes, kernel)
    pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
    total = evaluator.turned(
        tensor, lambda turned: pool(turned, evaluator.order(kernel), evaluator.order(stride))
    )
    if operation.arguments.get("divisor_override"):
        size = 1
        for k in kernel:
            size *= k
        return total * (size / operation.number("divisor_override"))
    padding = operation.window("padding", axes, [0] * axes)
    if not operation.arguments.get("count_include_pad", True):
        padding = [0] * axes
    whole = extents(evaluator.graph, operation.source)
    held = Region(
        tuple(-p for p in padding), tuple(n + p for n, p in zip(whole, padding, strict=True))
    )
    inside = rows.intersect(held)
    if inside == rows:
        return total
    counted = torch.zeros((1, 1, *rows.shape), dtype=tensor.dtype, device=tensor.device)
    place: tuple[int | slice, ...] = (0, 0, *inside.within(rows.start))
    counted[place] = 1
    return total / pool(counted, kernel, stride)


def _padded(
    evaluator: RegionEvaluator,
    item: GraphNode,
    box: Region,
    fetch: Fetch,
    value: float,
    *,
    explicit: bool = False,
) -> tuple[Tensor, Region, list[int]]:
    """Return the rows that windows over a region read, which they are, and the rest's padding.

    Rows outside the tensor that are as many at both ends are left to the operation.
    """
    [(source, rows)] = reads(evaluator.graph, item, box)
    inside, padding = inside_of(evaluator.graph, source, rows), [0] * len(box.start)
    wanted = [list(rows.start), list(rows.stop)]
    for axis, (a, b) in enumerate(zip(inside.start, inside.stop, strict=True)):
        missing = a - rows.start[axis]
        if not explicit and 0 < missing == rows.stop[axis] - b:
            padding[axis] = missing
            wanted[0][axis], wanted[1][axis] = a, b
    rows = Region(tuple(wanted[0]), tuple(wanted[1]))
    return (
        fit(fetch(source, inside), evaluator.graph.dims[source], inside, rows, value),
        rows,
        padding,
    )


def _transposed(evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch) -> object:
    """Convolve transposed: every input row writes its rows, the region is cut from them."""
    operation, axes = item.operation, len(box.start)
    values = evaluator.values(item, box, fetch)
    [(source, rows)] = reads(evaluator.graph, item, box)
    inside = inside_of(evaluator.graph, source, rows)
    weight = cast("Tensor", values[cast("fx.Node", operation.arguments["weight"])])
    stride = operation.window("stride", axes, [1] * axes)
    padding = operation.window("padding", axes, [0] * axes)
    dilation = operation.window("dilation", axes, [1] * axes)
    bias = cast("fx.Node | None", operation.arguments.get("bias"))
    start = tuple(a * s - p for a, s, p in zip(inside.start, stride, padding, strict=True))
    stop = tuple(
        (b - 1) * s - p + d * (k - 1) + 1
        for b, s, p, d, k in zip(
            inside.stop, stride, padding, dilation, weight.shape[2:], strict=True
        )
    )
    written = Region(start, stop)
    added = None if bias is None else cast("Tensor", values[bias])
    covered = written.intersect(box) == box
    full = evaluator.turned(
        cast("Tensor", values[source]),
        lambda turned: convolve_transposed(
            turned,
            evaluator.turned_weight(weight),
            added if covered else None,
            stride=evaluator.order(stride),
            groups=operation.number("groups", 1),
            dilation=evaluator.order(dilation),
        ),
    )
    result = fit(full, item.reading.dims, written, box, 0.0)
    if covered or added is None:
        return result
    return result + added.reshape(-1, *(1,) * axes)


def compute_slice(evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch) -> object:
    """Take rows out: a slice along an axis of the image is a place to read from."""
    operation = item.operation
    dim = operation.number("dim") % len(shape_of(item.node))
    if dim not in item.reading.dims:
        return evaluator.call(item, box, fetch)
    tensor = cast("Tensor", evaluator.values(item, box, fetch)[operation.source])
    step = operation.number("step", 1)
    return tensor[(*(slice(None),) * dim, slice(None, None, step))]


def compute_cat(evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch) -> object:
    """Concatenate: along an axis of the image, of those tensors that the region meets."""
    operation, parts = item.operation, []
    dim = operation.number("dim") % len(shape_of(item.node))
    for source, rows in reads(evaluator.graph, item, box):
        inside = rows.intersect(Region.whole(extents(evaluator.graph, source)))
        if inside.size:
            parts.append(fetch(source, inside))
    return torch.cat(parts, dim)


def compute_padding(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Pad: with a value, or with rows of the tensor itself."""
    source, dims = item.operation.source, item.reading.dims
    before, others = pads_of(item)
    [(_, rows)] = reads(evaluator.graph, item, box)
    whole = extents(evaluator.graph, source)
    inside = inside_of(evaluator.graph, source, rows)
    tensor = fetch(source, inside)
    if (mode := pad_mode(item)) is not None:
        for axis, (d, a, b) in enumerate(zip(dims, box.start, box.stop, strict=True)):
            n = before[axis]
            places = [p - inside.start[axis] for p in padded_rows(mode, a - n, b - n, whole[axis])]
            tensor = tensor.index_select(d, torch.tensor(places, device=tensor.device))
        return tensor
    value = float(cast("float", item.operation.arguments.get("value") or 0))
    return F.pad(fit(tensor, dims, inside, rows, value), others, value=value)


def compute_interpolation(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Interpolate: by the library where the scale is whole or an axis is, else row by row."""
    operation = item.operation
    [access] = item.reading.accesses
    [(source, rows)] = reads(evaluator.graph, item, box)
    inside = inside_of(evaluator.graph, source, rows)
    tensor = fetch(source, inside)
    align = bool(operation.arguments.get("align_corners"))
    factors = [r.den // r.num if r.num and r.den % r.num == 0 else 0 for r in access.rules]
    mode = library_mode(operation.kind.mode, tensor.ndim)
    # Of other factors the library's rows and weights depend on where a region begins.
    if all(f and f & (f - 1) == 0 for f in factors) and not align:
        scales = [float(f) for f in evaluator.order(factors)]
        full = evaluator.turned(
            tensor, lambda turned: F.interpolate(turned, scale_factor=scales, mode=mode)
        )
        start = tuple(a * f for a, f in zip(inside.start, factors, strict=True))
        stop = tuple(b * f for b, f in zip(inside.stop, factors, strict=True))
        return fit(full, item.reading.dims, Region(start, stop), box, 0.0)
    dims, samples = item.reading.dims, samplings(operation)
    for axis in reversed(evaluator.order(range(len(dims)))):  # whole rows are copied last
        sampling = samples[dims[axis] - 2]
        wanted = box.start[axis], box.stop[axis]
        held = inside.start[axis], inside.stop[axis]
        tensor = sample(tensor, sampling, dims[axis], wanted, held)
    return tensor


def compute_shuffle(
    evaluator: RegionEvaluator, item: GraphNode, box: Region, fetch: Fetch
) -> object:
    """Move channels into rows, of which the region is cut."""
    shuffled = cast("Tensor", evaluator.call(item, box, fetch))
    [(_, rows)] = reads(evaluator.graph, item, box)
    factor = item.operation.number("upscale_factor")
    full = Region(tuple(a * factor for a in rows.start), tuple(b * factor for b in rows.stop))
    return fit(shuffled, item.reading.dims, full, box, 0.0)


def _fetch_of(fetch: Fetch, source: fx.Node, _: fx.Node, rows: Region) -> Tensor:
    return fetch(source, rows)
