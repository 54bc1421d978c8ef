"""Regions of the whole-image graph: each operation computed on just the rows that are needed.

Coordinates are absolute, those of the whole image that the graph was exported for, so what is
computed here is a piece of the one pass over the whole, however large and wherever it begins.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from tilepipe.geometry import Region, mirror
from tilepipe.operations import NoRule, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from tilepipe.network import Graph, Node

    Fetch = Callable[[fx.Node, Region], Tensor]
    """Gives the rows of a node's tensor; the region lies inside it."""


def extents(graph: Graph, node: fx.Node) -> tuple[int, ...]:
    """Return the rows of a node's whole tensor along each spatial axis."""
    shape = shape_of(node)
    return tuple(shape[d] for d in graph.dims[node])


Rows = tuple[int, int]
"""Half-open rows along one axis."""


def rows_along(graph: Graph, axis: int, start: int, stop: int) -> dict[fx.Node, Rows]:
    """Return the rows of every node that output rows ``start:stop`` read, inside its tensor."""
    found = {graph.output: (start, stop)}
    for item in reversed(graph.nodes):
        if item.node in found:
            for source, rows in reads_along(graph, item, axis, found[item.node]):
                low, high = clip(rows, extents(graph, source)[axis])
                held = found.get(source, (low, high))
                found[source] = min(held[0], low), max(held[1], high)
    return found


def reads_along(graph: Graph, item: Node, axis: int, rows: Rows) -> list[tuple[fx.Node, Rows]]:
    """Return what an operation reads for some rows, those of its own padding included."""
    if (mode := _pad_mode(item)) is not None:
        source, before = item.operation.source, _pads(item)[0][axis]
        length = extents(graph, source)[axis]
        places = _padded(mode, rows[0] - before, rows[1] - before, length)
        return [(source, (min(places), max(places) + 1))]
    return [(a.source, a.rules[axis].need(*rows)) for a in item.reading.accesses]


def clip(rows: Rows, length: int) -> Rows:
    """Return the rows inside an axis; one at its edge where all of them are outside."""
    start = min(max(rows[0], 0), length - 1)
    return start, min(max(rows[1], start + 1), length)


def needs(graph: Graph, box: Region) -> dict[fx.Node, Region]:
    """Return the rows of every node that a region of the output reads, inside its tensor."""
    axes = [
        rows_along(graph, axis, a, b)
        for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True))
    ]
    return {node: _region([rows[node] for rows in axes]) for node in axes[0]}


def _region(rows: Sequence[Rows]) -> Region:
    return Region(tuple(a for a, _ in rows), tuple(b for _, b in rows))


def _reads(graph: Graph, item: Node, box: Region) -> list[tuple[fx.Node, Region]]:
    """Return what an operation reads for a region, rows of its own padding included."""
    axes = [
        reads_along(graph, item, axis, edges)
        for axis, edges in enumerate(zip(box.start, box.stop, strict=True))
    ]
    return [(each[0][0], _region([rows for _, rows in each])) for each in zip(*axes, strict=True)]


def _inside(graph: Graph, node: fx.Node, rows: Region) -> Region:
    """Return the rows that a node's tensor has."""
    edges = zip(rows.start, rows.stop, extents(graph, node), strict=True)
    return _region([clip((a, b), n) for a, b, n in edges])


class RegionEvaluator:
    """Computes regions of the output of one exported graph, with a network's real weights."""

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        """``network`` is what the graph was exported from, on its device and in its precision.

        Raises `NoRule` for an operation that cannot be computed by regions.
        """
        self.graph = graph
        self._constants = _constants(graph, network)
        self._last: dict[fx.Node, list[fx.Node]] = {}
        unread = {graph.source, *(item.node for item in graph.nodes)}
        for item in reversed(graph.nodes):
            mine = [a.source for a in item.reading.accesses if a.source in unread]
            self._last[item.node] = list(dict.fromkeys(mine))
            unread -= set(mine)
            if item.reading.unbounded:
                raise NoRule(f"{item.reading.unbounded} ({item.place})")
            _compute_of(item)

    def __call__(self, box: Region, read: Callable[[Region], Tensor]) -> Tensor:
        """Return a region of the output, with batch and channels.

        ``read`` gives a region of the input, inside the whole image, with batch and channels.
        """
        need = needs(self.graph, box)
        source = self.graph.source
        held: dict[fx.Node, object] = {source: read(need[source])}

        def fetch(node: fx.Node, rows: Region) -> Tensor:
            return cast("Tensor", _crop(held[node], self.graph.dims[node], rows, need[node].start))

        for item in self.graph.nodes:
            if item.node in need:
                held[item.node] = _compute_of(item)(self, item, need[item.node], fetch)
                for node in self._last[item.node]:
                    held.pop(node, None)
        return cast("Tensor", held[self.graph.output])

    def computing(self, item: Node, fetch: Fetch, axis: int) -> Callable[[Region], object]:
        """Return what computes regions of an operation, with ``axis`` outermost in memory."""
        return lambda box: _compute_of(item)(self, item, box, fetch)

    def last_reads(self, item: Node) -> list[fx.Node]:
        """Return the nodes that no operation after this one reads."""
        return self._last[item.node]

    def _values(self, item: Node, box: Region, fetch: Fetch) -> dict[fx.Node, object]:
        """Return the tensors that an operation reads for a region, and its weights."""
        values = dict(self._constants)
        for source, rows in _reads(self.graph, item, box):
            values[source] = fetch(source, _inside(self.graph, source, rows))
        return values

    def same(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Call the operation itself: it takes each row from the same row."""
        values = self._values(item, box, fetch)
        return _call(item.node, values)

    def shaped(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Reshape and expand: the region's sizes stand in the place of the image's."""
        shape = list(shape_of(item.node))
        for d, size in zip(item.reading.dims, box.shape, strict=True):
            shape[d] = size
        tensor = cast("Tensor", self._values(item, box, fetch)[item.operation.source])
        return tensor.expand(shape) if item.operation.name == "expand" else tensor.reshape(shape)

    def windowed(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Convolve or take the maximum, with the rows outside the tensor given explicitly."""
        pooling = "pool" in item.operation.name
        tensor, _ = self._padded(item, box, fetch, float("-inf") if pooling else 0.0)
        named = isinstance(item.operation.arguments.get("padding"), str)
        replaced: dict[str, object] = {"padding": "valid" if named else [0] * len(box.start)}
        if pooling:
            replaced["ceil_mode"] = False
        return _call(item.node, {**self._constants, item.operation.source: tensor}, replaced)

    def averaged(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Average over windows; those that reach outside the tensor count what they hold."""
        operation, axes = item.operation, len(box.start)
        tensor, rows = self._padded(item, box, fetch, 0.0)
        kernel = operation.window("kernel_size", axes)
        stride = operation.window("stride", axes, kernel)
        pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
        total = pool(tensor, kernel, stride)
        if operation.arguments.get("divisor_override"):
            size = 1
            for k in kernel:
                size *= k
            return total * (size / operation.number("divisor_override"))
        padding = operation.window("padding", axes, [0] * axes)
        if not operation.arguments.get("count_include_pad", True):
            padding = [0] * axes
        whole = extents(self.graph, operation.source)
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

    def _padded(self, item: Node, box: Region, fetch: Fetch, value: float) -> tuple[Tensor, Region]:
        """Return all the rows that windows over a region read, and which they are."""
        [(source, rows)] = _reads(self.graph, item, box)
        inside = _inside(self.graph, source, rows)
        return _fit(fetch(source, inside), self.graph.dims[source], inside, rows, value), rows

    def transposed(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Convolve transposed: every input row writes its rows, the region is cut from them."""
        operation, axes = item.operation, len(box.start)
        values = self._values(item, box, fetch)
        [(source, rows)] = _reads(self.graph, item, box)
        inside = _inside(self.graph, source, rows)
        weight = cast("Tensor", values[cast("fx.Node", operation.arguments["weight"])])
        stride = operation.window("stride", axes, [1] * axes)
        padding = operation.window("padding", axes, [0] * axes)
        dilation = operation.window("dilation", axes, [1] * axes)
        replaced: dict[str, object] = {
            "padding": [0] * axes, "output_padding": [0] * axes, "bias": None
        }  # fmt: skip
        full = cast("Tensor", _call(item.node, values, replaced))
        start = tuple(a * s - p for a, s, p in zip(inside.start, stride, padding, strict=True))
        stop = tuple(
            (b - 1) * s - p + d * (k - 1) + 1
            for b, s, p, d, k in zip(
                inside.stop, stride, padding, dilation, weight.shape[2:], strict=True
            )
        )
        found = _fit(full, item.reading.dims, Region(start, stop), box, 0.0)
        bias = operation.arguments.get("bias")
        if bias is None:
            return found
        return found + cast("Tensor", values[cast("fx.Node", bias)]).reshape(-1, *(1,) * axes)

    def sliced(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Take rows out: a slice along an axis of the image is a place to read from."""
        operation = item.operation
        dim = operation.number("dim") % len(shape_of(item.node))
        if dim not in item.reading.dims:
            return self.same(item, box, fetch)
        tensor = cast("Tensor", self._values(item, box, fetch)[operation.source])
        step = operation.number("step", 1)
        return tensor[(*(slice(None),) * dim, slice(None, None, step))]

    def joined(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Concatenate: along an axis of the image, of those tensors that the region meets."""
        operation, parts = item.operation, []
        dim = operation.number("dim") % len(shape_of(item.node))
        for source, rows in _reads(self.graph, item, box):
            inside = rows.intersect(Region.whole(extents(self.graph, source)))
            if inside.size:
                parts.append(fetch(source, inside))
        return torch.cat(parts, dim)

    def padded(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Pad: with a value, or with rows of the tensor itself."""
        source, dims = item.operation.source, item.reading.dims
        before, others = _pads(item)
        [(_, rows)] = _reads(self.graph, item, box)
        whole = extents(self.graph, source)
        inside = _inside(self.graph, source, rows)
        tensor = fetch(source, inside)
        if (mode := _pad_mode(item)) is not None:
            for axis, (d, a, b) in enumerate(zip(dims, box.start, box.stop, strict=True)):
                n = before[axis]
                places = [p - inside.start[axis] for p in _padded(mode, a - n, b - n, whole[axis])]
                tensor = tensor.index_select(d, torch.tensor(places, device=tensor.device))
            return tensor
        value = float(cast("float", item.operation.arguments.get("value") or 0))
        return F.pad(_fit(tensor, dims, inside, rows, value), others, value=value)

    def interpolated(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Interpolate: by the library where the scale is whole, else row by row."""
        operation = item.operation
        [access] = item.reading.accesses
        [(source, rows)] = _reads(self.graph, item, box)
        inside = _inside(self.graph, source, rows)
        tensor = fetch(source, inside)
        align = bool(operation.arguments.get("align_corners"))
        factors = [r.den // r.num if r.num and r.den % r.num == 0 else 0 for r in access.rules]
        mode = _interpolation_mode(operation.name)
        if all(factors) and not align:
            full = F.interpolate(tensor, scale_factor=[float(f) for f in factors], mode=mode)
            start = tuple(a * f for a, f in zip(inside.start, factors, strict=True))
            stop = tuple(b * f for b, f in zip(inside.stop, factors, strict=True))
            return _fit(full, item.reading.dims, Region(start, stop), box, 0.0)
        if mode == "bicubic":
            raise NoRule(f"bicubic interpolation by no whole factor ({item.place})")
        sizes = extents(self.graph, source)
        for axis, d in enumerate(item.reading.dims):
            rule, last = access.rules[axis], sizes[axis] - 1
            place = torch.arange(box.start[axis], box.stop[axis], dtype=torch.float64)
            if "nearest" in mode:
                low = ((place * rule.num + rule.first) / rule.den).floor().long().clamp(0, last)
                tensor = tensor.index_select(d, (low - inside.start[axis]).to(tensor.device))
                continue
            place = ((place * rule.num + rule.first) / rule.den).clamp(0, last)
            low = place.floor().long()
            high = (low + 1).clamp(max=last)
            weight = (place - low).to(tensor.device, tensor.dtype)
            weight = weight.reshape(-1, *(1,) * (tensor.ndim - 1 - d))
            one, two = (
                tensor.index_select(d, (p - inside.start[axis]).to(tensor.device))
                for p in (low, high)
            )
            tensor = one + (two - one) * weight
        return tensor

    def shuffled(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Move pixels between channels and rows."""
        found = cast("Tensor", self.same(item, box, fetch))
        if item.operation.name == "pixel_unshuffle":
            return found
        [(_, rows)] = _reads(self.graph, item, box)
        factor = item.operation.number("upscale_factor")
        full = Region(tuple(a * factor for a in rows.start), tuple(b * factor for b in rows.stop))
        return _fit(found, item.reading.dims, full, box, 0.0)


def _compute_of(item: Node) -> Callable[[RegionEvaluator, Node, Region, Fetch], object]:
    """Return how an operation is computed on a region."""
    name, axes = item.operation.name, len(item.reading.dims)
    if "conv" in name or "pool" in name:
        plain = name == "convolution" or f"{axes}d" in name
        if not plain or len(shape_of(item.node)) != axes + 2:
            raise NoRule(f"operation {name} along other axes than the image's ({item.place})")
        if "transpose" in name or item.operation.arguments.get("transposed"):
            return RegionEvaluator.transposed
        return RegionEvaluator.averaged if "avg" in name else RegionEvaluator.windowed
    if "upsample" in name:
        return RegionEvaluator.interpolated
    if "pad" in name:
        return RegionEvaluator.padded
    special = {
        "slice": RegionEvaluator.sliced,
        "cat": RegionEvaluator.joined,
        "pixel_shuffle": RegionEvaluator.shuffled,
        "pixel_unshuffle": RegionEvaluator.shuffled,
    }
    shapes = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
              "expand")  # fmt: skip
    if name in shapes:
        return RegionEvaluator.shaped
    return special.get(name, RegionEvaluator.same)


def _interpolation_mode(name: str) -> str:
    if "nearest" in name:
        return "nearest-exact" if "exact" in name else "nearest"
    return next(m for m in ("trilinear", "bilinear", "bicubic", "linear") if m in name)


def _pad_mode(item: Node) -> str | None:
    """Return "reflect" or "replicate" for a padding that reads the tensor's own rows."""
    name, mode = item.operation.name, item.operation.arguments.get("mode")
    for known in ("reflect", "replicat"):
        if name.startswith(known) or (name == "pad" and str(mode).startswith(known)):
            return known
    return None


def _padded(mode: str, start: int, stop: int, length: int) -> list[int]:
    """Return which rows stand at ``start:stop`` of an axis that is padded with its own rows."""
    if mode == "reflect":
        return [int(n) for n in mirror(start, stop, length)]
    return [min(max(n, 0), length - 1) for n in range(start, stop)]


def _pads(item: Node) -> tuple[list[int], list[int]]:
    """Return the rows padded before each axis of the image, and the pads of other dimensions."""
    listed = item.operation.arguments.get("pad") or item.operation.arguments.get("padding")
    pads, rank = list(cast("Sequence[int]", listed)), len(shape_of(item.node))
    pads += [0] * (2 * rank - len(pads))
    before = [pads[2 * (rank - 1 - d)] for d in item.reading.dims]
    for d in item.reading.dims:
        pads[2 * (rank - 1 - d) : 2 * (rank - d)] = [0, 0]
    return before, pads


def _fit(tensor: Tensor, dims: Sequence[int], held: Region, wanted: Region, value: float) -> Tensor:
    """Return the wanted rows of a tensor that holds others: cut off, and filled with a value."""
    pads = [0] * (2 * tensor.ndim)
    for d, a, b, c, e in zip(dims, held.start, held.stop, wanted.start, wanted.stop, strict=True):
        pads[2 * (tensor.ndim - 1 - d)] = a - c
        pads[2 * (tensor.ndim - 1 - d) + 1] = e - b
    return F.pad(tensor, pads, value=value) if any(pads) else tensor


def _crop(value: object, dims: Sequence[int], rows: Region, origin: Sequence[int]) -> object:
    """Return rows of a tensor, or of each of several."""
    if isinstance(value, tuple | list):
        return tuple(_crop(one, dims, rows, origin) for one in value)
    tensor = cast("Tensor", value)
    for d, a, n, o in zip(dims, rows.start, rows.shape, origin, strict=True):
        if tensor.ndim > d and tensor.shape[d] != n:
            tensor = tensor.narrow(d, a - o, n)
    return tensor


def _call(
    node: fx.Node, values: Mapping[fx.Node, object], replaced: Mapping[str, object] | None = None
) -> object:
    """Call a node's operation on these values, with some of its arguments replaced by name."""
    target = cast("Callable[..., object]", node.target)
    args: list[object] = list(node.args)
    kwargs: dict[str, object] = dict(node.kwargs)
    if replaced:
        schema = cast("torch._ops.OpOverload", node.target)._schema
        for place, argument in enumerate(schema.arguments):
            if argument.name in replaced:
                if place < len(args):
                    args[place] = replaced[argument.name]
                else:
                    kwargs[argument.name] = replaced[argument.name]
    filled = tree_map(
        lambda leaf: values[leaf] if isinstance(leaf, fx.Node) else leaf, (args, kwargs)
    )
    return target(*filled[0], **filled[1])


def _constants(graph: Graph, network: nn.Module) -> dict[fx.Node, object]:
    """Return the values of the nodes that do not depend on the image."""
    signature = graph.program.graph_signature
    stored = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = next(iter(stored.values()))
    found: dict[fx.Node, object] = {}
    for node in graph.program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            found[node] = stored[names[node.name]]
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            value = graph.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            if value.device.type == "meta":
                raise NoRule("a tensor that is made while the network runs")
            found[node] = value.to(first.device)
        elif (
            node.op == "call_function"
            and node not in graph.dims
            and all(n in found for n in node.all_input_nodes)
        ):
            if not node.all_input_nodes:
                raise NoRule(f"operation {node.target} makes a tensor while the network runs")
            with torch.no_grad():
                found[node] = _call(node, found)
    return found
