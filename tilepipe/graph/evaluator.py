"""Regions of the whole-image graph: each operation computed on just the rows that are needed.

Coordinates are absolute, those of the whole image that the graph was exported for, so what is
computed here is a piece of the one pass over the whole, however large and wherever it begins.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tilepipe.errors import TileError
from tilepipe.geometry import Region
from tilepipe.graph.bounds import extents, inside_of, needs, pad_mode, padded_rows, pads_of, reads
from tilepipe.graph.constants import constants_of
from tilepipe.graph.interpolation import sample
from tilepipe.graph.kernels import call, convolve, convolve_transposed, crop, fit
from tilepipe.graph.operations import samplings
from tilepipe.graph.readings import NoRule, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from tilepipe.graph.graph import Graph, Node

    Fetch = Callable[[fx.Node, Region], Tensor]
    """Gives the rows of a node's tensor; the region lies inside it."""


class RegionEvaluator:
    """Computes regions of the output of one exported graph, with a network's real weights."""

    def __init__(self, graph: Graph, network: nn.Module) -> None:
        """``network`` is what the graph was exported from, on its device and in its precision.

        Raises `NoRule` for an operation that cannot be computed by regions.
        """
        if graph.autocast:
            raise NoRule(f"torch.autocast ({graph.autocast}) inside the network")
        self.graph = graph
        self.outermost = 0
        """The axis that is outermost in the memory of the tensors that `fetch` gives."""
        self._weights: dict[tuple[int, int, tuple[int, int] | None], Tensor] = {}
        self._constants = constants_of(graph, network)
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
        held: dict[fx.Node, object] = {source: rows_read(read, need[source])}

        def fetch(node: fx.Node, rows: Region) -> Tensor:
            return cast("Tensor", crop(held[node], self.graph.dims[node], rows, need[node].start))

        for item in self.graph.nodes:
            if item.node in need:
                held[item.node] = _compute_of(item)(self, item, need[item.node], fetch)
                for node in self._last[item.node]:
                    held.pop(node, None)
        return cast("Tensor", held[self.graph.output])

    def compute(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Return a region of one operation, from what ``fetch`` gives of those before it."""
        return _compute_of(item)(self, item, box, fetch)

    def _values(self, item: Node, box: Region, fetch: Fetch) -> dict[fx.Node, object]:
        """Return the tensors that an operation reads for a region, and its weights."""
        values = dict(self._constants)
        for source, rows in reads(self.graph, item, box):
            values[source] = fetch(source, inside_of(self.graph, source, rows))
        return values

    def same(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Call the operation itself: it takes each row from the same row."""
        values = self._values(item, box, fetch)
        device = next(v.device for v in values.values() if isinstance(v, Tensor))
        return call(item.node, values, device)

    def unchanged(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Return the rows themselves, as pooling to the size that there is."""
        return fetch(item.operation.source, box)

    def shaped(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Reshape and expand: the region's sizes stand in the place of the image's."""
        shape = list(shape_of(item.node))
        for d, size in zip(item.reading.dims, box.shape, strict=True):
            shape[d] = size
        tensor = cast("Tensor", self._values(item, box, fetch)[item.operation.source])
        return tensor.expand(shape) if item.operation.name == "expand" else tensor.reshape(shape)

    def convolved(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Convolve, given the rows outside the tensor where only one end has any."""
        return self._convolved(item, box, fetch, None, None)

    def convolve_joined(self, item: Node, joined: Node, box: Region, fetch: Fetch) -> Tensor:
        """Convolve the tensors that a node concatenates, one after the other: it is not made."""
        total, first = None, 0
        for access in joined.reading.accesses:
            source, channels = access.source, shape_of(access.source)[1]
            held = partial(_fetch_of, fetch, source)
            total = self._convolved(item, box, held, (first, channels), total)
            first += channels
        assert total is not None
        return total

    def _convolved(
        self,
        item: Node,
        box: Region,
        fetch: Fetch,
        channels: tuple[int, int] | None,
        total: Tensor | None,
    ) -> Tensor:
        """Convolve some of the input's channels, and add that to the ``total`` of those before."""
        operation, axes = item.operation, len(box.start)
        tensor, _, padding = self._padded(item, box, fetch, 0.0)
        weight = cast("Tensor", self._constants[cast("fx.Node", operation.arguments["weight"])])
        weight = self._turned_weight(weight, channels)
        bias = cast("fx.Node | None", operation.arguments.get("bias"))
        added = None if bias is None else cast("Tensor", self._constants[bias])
        convolution = partial(
            convolve,
            weight=weight,
            bias=added if total is None else None,
            stride=self._order(operation.window("stride", axes, [1] * axes)),
            padding=self._order(padding),
            dilation=self._order(operation.window("dilation", axes, [1] * axes)),
            groups=operation.number("groups", 1),
            onto=None if total is None else self._turn(total),
        )
        return self._turned(tensor, convolution)

    def largest(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Take the maximum over windows."""
        operation, axes = item.operation, len(box.start)
        tensor, _, padding = self._padded(item, box, fetch, float("-inf"))
        kernel = operation.window("kernel_size", axes)
        pool = F.max_pool2d if axes == 2 else F.max_pool3d
        found = self._turned(
            tensor,
            lambda turned: pool(
                turned,
                self._order(kernel),
                self._order(operation.window("stride", axes, kernel)),
                self._order(padding),
                self._order(operation.window("dilation", axes, [1] * axes)),
            ),
        )
        return (found,) if isinstance(item.node.meta["val"], tuple | list) else found

    def averaged(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Average over windows; those that reach outside the tensor count what they hold."""
        operation, axes = item.operation, len(box.start)
        tensor, rows, _ = self._padded(item, box, fetch, 0.0, explicit=True)
        kernel = operation.window("kernel_size", axes)
        stride = operation.window("stride", axes, kernel)
        pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
        total = self._turned(
            tensor, lambda turned: pool(turned, self._order(kernel), self._order(stride))
        )
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

    def _padded(
        self, item: Node, box: Region, fetch: Fetch, value: float, *, explicit: bool = False
    ) -> tuple[Tensor, Region, list[int]]:
        """Return the rows that windows over a region read, which they are, and the rest's padding.

        Rows outside the tensor that are as many at both ends are left to the operation.
        """
        [(source, rows)] = reads(self.graph, item, box)
        inside, padding = inside_of(self.graph, source, rows), [0] * len(box.start)
        wanted = [list(rows.start), list(rows.stop)]
        for axis, (a, b) in enumerate(zip(inside.start, inside.stop, strict=True)):
            missing = a - rows.start[axis]
            if not explicit and 0 < missing == rows.stop[axis] - b:
                padding[axis] = missing
                wanted[0][axis], wanted[1][axis] = a, b
        rows = Region(tuple(wanted[0]), tuple(wanted[1]))
        return (
            fit(fetch(source, inside), self.graph.dims[source], inside, rows, value),
            rows,
            padding,
        )

    def _turned(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Call with the axis that is outermost in memory in front of the others."""
        if not self.outermost:
            return function(tensor)
        found = function(self._turn(tensor))
        dims = self._order(range(tensor.ndim - 2))
        return found.permute(0, 1, *(2 + dims.index(a) for a in range(len(dims))))

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.permute(0, 1, *(2 + axis for axis in self._order(range(tensor.ndim - 2))))

    def _turned_weight(self, weight: Tensor, channels: tuple[int, int] | None = None) -> Tensor:
        """Return a weight as `_turned` needs it, for the first and number of some channels."""
        if not self.outermost and channels is None:
            return weight
        key = id(weight), self.outermost, channels
        if key not in self._weights:
            layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
            part = weight if channels is None else weight.narrow(1, *channels)
            self._weights[key] = self._turn(part).contiguous(memory_format=layout)
        return self._weights[key]

    def _order(self, values: Sequence[int]) -> list[int]:
        """Return one value per axis in the order in which the axes lie in memory."""
        first = self.outermost
        return [values[first], *values[:first], *values[first + 1 :]]

    def transposed(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Convolve transposed: every input row writes its rows, the region is cut from them."""
        operation, axes = item.operation, len(box.start)
        values = self._values(item, box, fetch)
        [(source, rows)] = reads(self.graph, item, box)
        inside = inside_of(self.graph, source, rows)
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
        full = self._turned(
            cast("Tensor", values[source]),
            lambda turned: convolve_transposed(
                turned,
                self._turned_weight(weight),
                added if covered else None,
                stride=self._order(stride),
                groups=operation.number("groups", 1),
                dilation=self._order(dilation),
            ),
        )
        found = fit(full, item.reading.dims, written, box, 0.0)
        if covered or added is None:
            return found
        return found + added.reshape(-1, *(1,) * axes)

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
        for source, rows in reads(self.graph, item, box):
            inside = rows.intersect(Region.whole(extents(self.graph, source)))
            if inside.size:
                parts.append(fetch(source, inside))
        return torch.cat(parts, dim)

    def padded(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Pad: with a value, or with rows of the tensor itself."""
        source, dims = item.operation.source, item.reading.dims
        before, others = pads_of(item)
        [(_, rows)] = reads(self.graph, item, box)
        whole = extents(self.graph, source)
        inside = inside_of(self.graph, source, rows)
        tensor = fetch(source, inside)
        if (mode := pad_mode(item)) is not None:
            for axis, (d, a, b) in enumerate(zip(dims, box.start, box.stop, strict=True)):
                n = before[axis]
                places = [
                    p - inside.start[axis] for p in padded_rows(mode, a - n, b - n, whole[axis])
                ]
                tensor = tensor.index_select(d, torch.tensor(places, device=tensor.device))
            return tensor
        value = float(cast("float", item.operation.arguments.get("value") or 0))
        return F.pad(fit(tensor, dims, inside, rows, value), others, value=value)

    def interpolated(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Interpolate: by the library where the scale is whole or an axis is, else row by row."""
        operation = item.operation
        [access] = item.reading.accesses
        [(source, rows)] = reads(self.graph, item, box)
        inside = inside_of(self.graph, source, rows)
        tensor = fetch(source, inside)
        align = bool(operation.arguments.get("align_corners"))
        factors = [r.den // r.num if r.num and r.den % r.num == 0 else 0 for r in access.rules]
        mode = _interpolation_mode(operation.name)
        # Of other factors the library's rows and weights depend on where a region begins.
        if all(f and f & (f - 1) == 0 for f in factors) and not align:
            scales = [float(f) for f in self._order(factors)]
            full = self._turned(
                tensor, lambda turned: F.interpolate(turned, scale_factor=scales, mode=mode)
            )
            start = tuple(a * f for a, f in zip(inside.start, factors, strict=True))
            stop = tuple(b * f for b, f in zip(inside.stop, factors, strict=True))
            return fit(full, item.reading.dims, Region(start, stop), box, 0.0)
        dims, samples = item.reading.dims, samplings(operation)
        for axis in reversed(self._order(range(len(dims)))):  # whole rows are copied last
            sampling = samples[dims[axis] - 2]
            wanted = box.start[axis], box.stop[axis]
            held = inside.start[axis], inside.stop[axis]
            tensor = sample(tensor, sampling, dims[axis], wanted, held)
        return tensor

    def shuffled(self, item: Node, box: Region, fetch: Fetch) -> object:
        """Move pixels between channels and rows."""
        found = cast("Tensor", self.same(item, box, fetch))
        if item.operation.name == "pixel_unshuffle":
            return found
        [(_, rows)] = reads(self.graph, item, box)
        factor = item.operation.number("upscale_factor")
        full = Region(tuple(a * factor for a in rows.start), tuple(b * factor for b in rows.stop))
        return fit(found, item.reading.dims, full, box, 0.0)


def rows_read(read: Callable[[Region], Tensor], rows: Region) -> Tensor:
    """Return rows of the whole image; raise `TileError` where others are given."""
    tensor = read(rows)
    if tuple(tensor.shape[2:]) != rows.shape:
        raise TileError(f"the network reads rows {rows}; of {tuple(tensor.shape[2:])} it is given")
    return tensor


def _fetch_of(fetch: Fetch, source: fx.Node, _: fx.Node, rows: Region) -> Tensor:
    return fetch(source, rows)


def _compute_of(item: Node) -> Callable[[RegionEvaluator, Node, Region, Fetch], object]:
    """Return how an operation is computed on a region."""
    name, axes = item.operation.name, len(item.reading.dims)
    if any(kind in name for kind in ("conv", "pool", "upsample", "shuffle")):
        plain = name == "convolution" or f"{axes}d" in name or "shuffle" in name
        if not plain or len(shape_of(item.node)) != axes + 2:
            raise NoRule(f"operation {name} along other axes than the image's ({item.place})")
        if item.reading.dims != tuple(range(2, axes + 2)):
            raise NoRule(f"operation {name} on an image whose axes are turned ({item.place})")
    if "conv" in name:
        turned = "transpose" in name or item.operation.arguments.get("transposed")
        return RegionEvaluator.transposed if turned else RegionEvaluator.convolved
    if "adaptive" in name:
        return RegionEvaluator.unchanged
    if "pool" in name:
        return RegionEvaluator.averaged if "avg" in name else RegionEvaluator.largest
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


def is_special(item: Node) -> bool:
    """Whether an operation is computed otherwise than by calling it on the same rows."""
    several = isinstance(item.node.meta["val"], tuple | list)
    return several or _compute_of(item) is not RegionEvaluator.same


def _interpolation_mode(name: str) -> str:
    if "nearest" in name:
        return "nearest-exact" if "exact" in name else "nearest"
    return next(m for m in ("trilinear", "bilinear", "bicubic", "linear") if m in name)
