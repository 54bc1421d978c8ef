"""Regions of the whole-image graph: each operation computed on just the rows that are needed.

Coordinates are absolute, those of the whole image that the graph was exported for, so what is
computed here is a piece of the one pass over the whole, however large and wherever it begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx

from tilepipe.errors import TileError
from tilepipe.graph.bounds import inside_of, needs, reads
from tilepipe.graph.constants import constants_of
from tilepipe.graph.kernels import call_node, crop
from tilepipe.graph.readings import NoRule, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from tilepipe.geometry import Region
    from tilepipe.graph.graph import Graph, GraphNode

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
        self.constants = constants_of(graph, network)
        self._last: dict[fx.Node, list[fx.Node]] = {}
        unread = {graph.source, *(item.node for item in graph.nodes)}
        for item in reversed(graph.nodes):
            sources = [a.source for a in item.reading.accesses if a.source in unread]
            self._last[item.node] = list(dict.fromkeys(sources))
            unread -= set(sources)
            if item.reading.unbounded:
                raise NoRule(f"{item.reading.unbounded} ({item.place})")
            _check_axes(item)

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
                held[item.node] = self.compute(item, need[item.node], fetch)
                for node in self._last[item.node]:
                    held.pop(node, None)
        return cast("Tensor", held[self.graph.output])

    def compute(self, item: GraphNode, box: Region, fetch: Fetch) -> object:
        """Return a region of one operation, from what ``fetch`` gives of those before it."""
        computes = item.operation.kind.computes
        return (computes or RegionEvaluator.call)(self, item, box, fetch)

    def values(self, item: GraphNode, box: Region, fetch: Fetch) -> dict[fx.Node, object]:
        """Return the tensors that an operation reads for a region, and its weights."""
        values = dict(self.constants)
        for source, rows in reads(self.graph, item, box):
            values[source] = fetch(source, inside_of(self.graph, source, rows))
        return values

    def call(self, item: GraphNode, box: Region, fetch: Fetch) -> object:
        """Call the operation itself: it takes each row from the same row."""
        values = self.values(item, box, fetch)
        device = next(v.device for v in values.values() if isinstance(v, Tensor))
        return call_node(item.node, values, device)

    def turned(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Call with the axis that is outermost in memory in front of the others."""
        if not self.outermost:
            return function(tensor)
        result = function(self.turn(tensor))
        dims = self.order(range(tensor.ndim - 2))
        return result.permute(0, 1, *(2 + dims.index(a) for a in range(len(dims))))

    def turn(self, tensor: Tensor) -> Tensor:
        """Return a view whose axis that is outermost in memory stands in front of the others."""
        return tensor.permute(0, 1, *(2 + axis for axis in self.order(range(tensor.ndim - 2))))

    def turned_weight(self, weight: Tensor, channels: tuple[int, int] | None = None) -> Tensor:
        """Return a weight as `turned` needs it, for the first and number of some channels."""
        if not self.outermost and channels is None:
            return weight
        key = id(weight), self.outermost, channels
        if key not in self._weights:
            layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
            part = weight if channels is None else weight.narrow(1, *channels)
            self._weights[key] = self.turn(part).contiguous(memory_format=layout)
        return self._weights[key]

    def order(self, values: Sequence[int]) -> list[int]:
        """Return one value per axis in the order in which the axes lie in memory."""
        first = self.outermost
        return [values[first], *values[:first], *values[first + 1 :]]


def rows_read(read: Callable[[Region], Tensor], rows: Region) -> Tensor:
    """Return rows of the whole image; raise `TileError` where others are given."""
    tensor = read(rows)
    if tuple(tensor.shape[2:]) != rows.shape:
        raise TileError(f"the network reads rows {rows}; of {tuple(tensor.shape[2:])} it is given")
    return tensor


def _check_axes(item: GraphNode) -> None:
    """Raise `NoRule` for an operation along other dimensions than the image's axes, in order."""
    name, kind, axes = item.operation.name, item.operation.kind, len(item.reading.dims)
    if not kind.last:
        return
    if kind.axes not in (0, axes) or len(shape_of(item.node)) != axes + 2:
        raise NoRule(f"operation {name} along other axes than the image's ({item.place})")
    if item.reading.dims != tuple(range(2, axes + 2)):
        raise NoRule(f"operation {name} on an image whose axes are turned ({item.place})")
