"""Which rows of every operation a region of the whole-image graph's output needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tilepipe.geometry import Region, mirror
from tilepipe.graph.readings import Padding, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from tilepipe.graph.graph import Graph, GraphNode

Rows = tuple[int, int]
"""Half-open rows along one axis."""

_BY_MODE = {"reflect": Padding.REFLECT, "replicate": Padding.REPLICATE}
"""What a padding does whose argument ``mode`` says so."""


def extents(graph: Graph, node: fx.Node) -> tuple[int, ...]:
    """Return the rows of a node's whole tensor along each spatial axis."""
    shape = shape_of(node)
    return tuple(shape[d] for d in graph.dims[node])


def rows_along(graph: Graph, axis: int, start: int, stop: int) -> dict[fx.Node, Rows]:
    """Return the rows of every node that output rows ``start:stop`` read, inside its tensor."""
    needed = {graph.output: (start, stop)}
    for item in reversed(graph.nodes):
        if item.node in needed:
            for source, rows in reads_along(graph, item, axis, needed[item.node]):
                low, high = clip(rows, extents(graph, source)[axis])
                held = needed.get(source, (low, high))
                needed[source] = min(held[0], low), max(held[1], high)
    return needed


def reads_along(graph: Graph, item: GraphNode, axis: int, rows: Rows) -> list[tuple[fx.Node, Rows]]:
    """Return what an operation reads for some rows, those of its own padding included."""
    if (mode := pad_mode(item)) is not None:
        source, before = item.operation.source, pads_of(item)[0][axis]
        length = extents(graph, source)[axis]
        places = padded_rows(mode, rows[0] - before, rows[1] - before, length)
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


def reads(graph: Graph, item: GraphNode, box: Region) -> list[tuple[fx.Node, Region]]:
    """Return what an operation reads for a region, rows of its own padding included."""
    axes = [
        reads_along(graph, item, axis, edges)
        for axis, edges in enumerate(zip(box.start, box.stop, strict=True))
    ]
    return [(each[0][0], _region([rows for _, rows in each])) for each in zip(*axes, strict=True)]


def inside_of(graph: Graph, node: fx.Node, rows: Region) -> Region:
    """Return the rows that a node's tensor has."""
    edges = zip(rows.start, rows.stop, extents(graph, node), strict=True)
    return _region([clip((a, b), n) for a, b, n in edges])


def pad_mode(item: GraphNode) -> Padding | None:
    """Return how an operation pads with the tensor's own rows; None for all other operations."""
    padding = item.operation.kind.padding
    if padding is Padding.ARGUMENT:
        padding = _BY_MODE.get(str(item.operation.arguments.get("mode")), Padding.CONSTANT)
    return padding if padding in (Padding.REFLECT, Padding.REPLICATE) else None


def padded_rows(mode: Padding, start: int, stop: int, length: int) -> list[int]:
    """Return which rows stand at ``start:stop`` of an axis that is padded with its own rows."""
    if mode is Padding.REFLECT:
        return [int(n) for n in mirror(start, stop, length)]
    return [min(max(n, 0), length - 1) for n in range(start, stop)]


def pads_of(item: GraphNode) -> tuple[list[int], list[int]]:
    """Return the rows padded before each axis of the image, and the pads of other dimensions."""
    listed = item.operation.arguments.get("pad") or item.operation.arguments.get("padding")
    pads, rank = list(cast("Sequence[int]", listed)), len(shape_of(item.node))
    pads += [0] * (2 * rank - len(pads))
    before = [pads[2 * (rank - 1 - d)] for d in item.reading.dims]
    for d in item.reading.dims:
        pads[2 * (rank - 1 - d) : 2 * (rank - d)] = [0, 0]
    return before, pads
