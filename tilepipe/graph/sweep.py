"""A region of the whole-image graph computed slab by slab along one axis.

Each row of each operation is computed once: of every tensor the trailing rows are kept that later
rows of other operations read. So memory does not grow with the region's length along the axis,
and nothing is computed twice along it but what overlapping transposed kernels share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from tilepipe.geometry import Region
from tilepipe.graph.bounds import clip, extents, pad_mode, pads_of, reads, reads_along, rows_along
from tilepipe.graph.buffers import Piece, advance
from tilepipe.graph.computing import convolve_joined
from tilepipe.graph.evaluator import rows_read
from tilepipe.graph.fusion import course_of, is_spatial
from tilepipe.graph.kernels import crop, empty, join
from tilepipe.graph.rules import SAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.evaluator import RegionEvaluator
    from tilepipe.graph.graph import Graph, GraphNode

PIECE_BYTES = 48 << 20
"""The bytes of a tensor between two operations of a chain: less and more were slower."""
PIECE_ROWS = 8
"""The least rows of it: a convolution of fewer reads too many rows of its source twice."""


def piece_rows(rows: int, row: int) -> int:
    """Return how many rows of ``row`` bytes each are computed at once: pieces are alike.

    >>> piece_rows(1000, 1 << 18), piece_rows(100, 1 << 30)
    (167, 8)
    """
    most = max(PIECE_ROWS, PIECE_BYTES // max(row, 1))
    return -(-rows // -(-rows // most))


@dataclass(frozen=True, slots=True)
class Step:
    """What one slab computes along the axis, and which rows are still read after it."""

    new: Mapping[fx.Node, Rows]
    """The rows that are computed, of each node that has any."""
    keep: Mapping[fx.Node, int]
    """The first row of each node that later steps read; the node's end where they read none."""


def steps(graph: Graph, axis: int, start: int, stop: int, slab: int) -> Iterator[Step]:
    """Yield the steps that compute output rows ``start:stop`` of an axis, ``slab`` at a time.

    Laws: the new rows of all steps are, for every node, the rows that the whole range needs, each
    once and in order; a step reads nothing but new and kept rows. The context before the first
    output row is computed in slabs, too, so that no step is larger than those in the middle.
    """
    final, unmade = rows_along(graph, axis, start, stop), course_of(graph).unmade
    done = {node: low for node, (low, _) in final.items()}
    edge = _first_edge(graph, axis, start + slab, done[graph.source] + slab, slab)
    while done[graph.output] < stop:
        edge = min(edge, stop)
        until = _until(graph, axis, edge, done, final)
        new = {n: (low, until[n]) for n, low in done.items() if until[n] > low}
        done = until
        if new:
            yield Step(new, _kept(graph, axis, done, final, unmade))
        edge += slab


def _first_edge(graph: Graph, axis: int, edge: int, rows: int, slab: int) -> int:
    """Return how far to aim first, whole slabs before ``edge``, to read up to ``rows`` or so."""
    reads = _aims(graph, axis, edge)[graph.source]
    while reads > rows:
        before = _aims(graph, axis, edge - slab)[graph.source]
        if before >= reads:  # every row reads the same
            return edge
        edge, reads = edge - slab, before
    return edge


def _aims(graph: Graph, axis: int, edge: int) -> dict[fx.Node, int]:
    """Return up to where each node serves the output before ``edge``, be it outside the image."""
    aims = {graph.output: edge}
    for item in reversed(graph.nodes):
        if item.node in aims:
            shift = pads_of(item)[0][axis] if pad_mode(item) else 0  # not what is reflected
            for access in item.reading.accesses:
                rule = SAME if pad_mode(item) else access.rules[axis]
                aim = rule.need(aims[item.node] - 1, aims[item.node])[1] - shift
                aims[access.source] = max(aims.get(access.source, aim), aim)
    return aims


def _until(
    graph: Graph,
    axis: int,
    edge: int,
    done: Mapping[fx.Node, int],
    final: Mapping[fx.Node, Rows],
) -> dict[fx.Node, int]:
    """Return up to where each node is computed so that the output is, up to ``edge``."""
    aims = _aims(graph, axis, edge)
    until = {n: max(low, min(aims[n], final[n][1])) for n, low in done.items()}
    for item in reversed(graph.nodes):
        if item.node in until and until[item.node] > done[item.node]:
            new = done[item.node], until[item.node]
            for source, rows in reads_along(graph, item, axis, new):
                high = clip(rows, extents(graph, source)[axis])[1]
                until[source] = max(until[source], high)
                if (
                    item.operation.is_transposed
                ):  # all that the rows read give, or they are read again
                    rule = item.reading.accesses[0].rules[axis]
                    complete = (high * rule.den - rule.last) // rule.num
                    until[item.node] = max(until[item.node], min(complete, final[item.node][1]))
    return until


def _kept(
    graph: Graph,
    axis: int,
    done: Mapping[fx.Node, int],
    final: Mapping[fx.Node, Rows],
    unmade: set[fx.Node],
) -> dict[fx.Node, int]:
    """Return the first row of each node that rows not computed yet will read.

    What is never made is read from its sources again.
    """
    keep = dict(done)
    for item in reversed(graph.nodes):
        if item.node not in done:
            continue
        first = keep[item.node] if item.node in unmade else done[item.node]
        if first < final[item.node][1]:
            left = first, final[item.node][1]
            for source, rows in reads_along(graph, item, axis, left):
                keep[source] = min(keep[source], clip(rows, extents(graph, source)[axis])[0])
    return keep


class TensorBuffers:
    """The tensors of one region of the output that is swept along one axis."""

    def __init__(
        self, evaluator: RegionEvaluator, box: Region, axis: int, read: Callable[[Region], Tensor]
    ) -> None:
        """Take ``box`` in rows of the output; ``axis`` and ``read`` are those of `Sweep`."""
        self._evaluator, self._graph = evaluator, evaluator.graph
        self._axis, self._read = axis, read
        self._course = course_of(self._graph)
        self._across = [
            {} if a == axis else rows_along(self._graph, a, *edges)
            for a, edges in enumerate(zip(box.start, box.stop, strict=True))
        ]
        self.pieces: dict[fx.Node, list[Piece[object]]] = {
            node: []
            for node in (self._graph.source, *(item.node for item in self._graph.nodes))
            if all(node in rows for rows in self._across if rows)
        }

    def read(self, rows: Rows) -> Tensor:
        """Return rows of the input."""
        return rows_read(self._read, self._region(self._graph.source, rows))

    def append(self, item: GraphNode, rows: Rows) -> object:
        """Compute rows of a node, as one tensor or several."""
        if (chain := self._course.chains.get(item.node)) is not None:
            return self._flow(chain, rows[0], rows)
        value = self._evaluator.compute(item, self._region(item.node, rows), self._fetch)
        if isinstance(value, Tensor) and 2 * value.nbytes < value.untyped_storage().nbytes():
            return value.clone()  # a few rows of a larger tensor, all of which they would hold
        return value

    def grow(self, item: GraphNode, first: int, rows: Rows) -> Tensor:
        """Compute rows of a node behind a copy of those that are held from row ``first`` on."""
        if (chain := self._course.chains.get(item.node)) is not None:
            return self._flow(chain, first, rows)
        dim = self._graph.dims[item.node][self._axis]
        held = cast("Tensor", self.pieces[item.node][0].value)
        buffer = self._buffer(item.node, held, (first, rows[1]))
        self._move_tail(item.node, buffer, first)
        region = self._region(item.node, rows)
        self._fill(item, region, buffer.narrow(dim, rows[0] - first, rows[1] - rows[0]))
        return buffer

    def shorten(self, node: fx.Node, piece: Piece[object], keep: int) -> Tensor:
        """Return a copy of the rows of a piece from row ``keep`` on."""
        dim = self._graph.dims[node][self._axis]
        held = cast("Tensor", piece.value)
        return held.narrow(dim, keep - piece.first, piece.last - keep).clone()

    def free(self, piece: Piece[object]) -> None:
        """Do nothing: memory that nothing refers to is free."""

    def _region(self, node: fx.Node, rows: Rows) -> Region:
        """Return rows of a node along the axis, with those that are needed along the others."""
        along = [rows if a == self._axis else m[node] for a, m in enumerate(self._across)]
        return Region(tuple(a for a, _ in along), tuple(b for _, b in along))

    def _parts(self, node: fx.Node, region: Region) -> list[tuple[int, object]]:
        """Return the parts of a region that is held, each with its first row along the axis."""
        axis, dims, parts = self._axis, self._graph.dims[node], []
        start, stop = region.start[axis], region.stop[axis]
        origin = list(self._region(node, (0, 0)).start)
        for first, last, value in self.pieces[node]:
            if first < stop and last > start:
                low, high = max(first, start), min(last, stop)
                origin[axis] = first
                rows = Region(
                    (*region.start[:axis], low, *region.start[axis + 1 :]),
                    (*region.stop[:axis], high, *region.stop[axis + 1 :]),
                )
                parts.append((low, crop(value, dims, rows, origin)))
        return parts

    def _fetch(self, node: fx.Node, region: Region) -> Tensor:
        """Return a region that is held, as one tensor or several."""
        node, region = self._seen(node, region)
        parts = [part for _, part in self._parts(node, region)]
        dims = self._graph.dims[node]
        if len(parts) == 1:
            return cast("Tensor", parts[0])
        if isinstance(parts[0], tuple):
            several = cast("list[tuple[Tensor, ...]]", parts)
            joined = tuple(join(each, dims, self._axis) for each in zip(*several, strict=True))
            return cast("Tensor", joined)
        return join(cast("list[Tensor]", parts), dims, self._axis)

    def _seen(self, node: fx.Node, region: Region) -> tuple[fx.Node, Region]:
        """Return where the rows of a node are held: a crop holds none of its own."""
        while (view := self._course.views.get(node)) is not None:
            [(node, region)] = reads(self._graph, view, region)
        return node, region

    def _move_tail(self, node: fx.Node, buffer: Tensor, first: int) -> None:
        """Copy the rows of a node that are held to the start of a buffer, at row ``first``."""
        dim, last = self._graph.dims[node][self._axis], self.pieces[node][-1].last
        for low, part in self._parts(node, self._region(node, (first, last))):
            tensor = cast("Tensor", part)
            buffer.narrow(dim, low - first, tensor.shape[dim]).copy_(tensor)

    def _flow(self, chain: tuple[GraphNode, ...], first: int, rows: Rows) -> Tensor:
        """Compute rows of a chain a few at a time, behind the rows of its end from ``first`` on.

        What lies between the first operation and the last is small and soon used again.
        """
        end, start = chain[-1], chain[0]
        dim, into = self._graph.dims[end.node][self._axis], end.operation.kind.into
        row = self._region(end.node, (0, 1)).size * end.operation.shape()[1] * 4
        thick = piece_rows(rows[1] - rows[0], row)
        buffer: Tensor | None = None
        for low in range(rows[0], rows[1], thick):
            region = self._region(end.node, (low, min(low + thick, rows[1])))
            if start.operation.kind.joins:
                value = convolve_joined(self._evaluator, chain[1], start, region, self._fetch)
                links = chain[2:-1]
            else:
                value = cast("Tensor", self._evaluator.compute(start, region, self._fetch))
                links = chain[1:-1]
            for link in links:
                value = self._next(link, region, value)
            # What comes last may have another type, or other channels.
            result = value if into is not None else self._next(end, region, value)
            if buffer is None:
                buffer = self._buffer(end.node, result, (first, rows[1]))
                if first < rows[0]:
                    self._move_tail(end.node, buffer, first)
            out = buffer.narrow(dim, low - first, result.shape[dim])
            if into is not None:
                into(value, out)
            else:
                out.copy_(result)
        assert buffer is not None
        return buffer

    def _next(self, link: GraphNode, region: Region, value: Tensor) -> Tensor:
        return cast("Tensor", self._evaluator.compute(link, region, lambda *_: value))

    def _buffer(self, node: fx.Node, like: Tensor, rows: Rows) -> Tensor:
        """Return memory for rows of a node, the axis outermost and the channels innermost."""
        dims, shape = self._graph.dims[node], list(like.shape)
        for d, n in zip(dims, self._region(node, rows).shape, strict=True):
            shape[d] = n
        first = dims[self._axis]
        return empty(like, shape, [first, *(d for d in dims if d != first)])

    def _fill(self, item: GraphNode, region: Region, out: Tensor) -> None:
        """Compute a region of a node into memory that is there, in one pass where that can be."""
        kind = item.operation.kind
        if kind.into is not None:
            kind.into(self._fetch(item.operation.source, region), out)
        elif kind.joins and not is_spatial(self._graph, item):
            self._fill_joined(item, region, out)
        else:
            out.copy_(cast("Tensor", self._evaluator.compute(item, region, self._fetch)))

    def _fill_joined(self, item: GraphNode, region: Region, out: Tensor) -> None:
        """Copy what an operation joins along channels, piece by piece, to where it belongs."""
        along = item.operation.number("dim") % out.ndim
        across, place = self._graph.dims[item.node][self._axis], 0
        for access in item.reading.accesses:
            source, rows = self._seen(access.source, region)
            for first, part in self._parts(source, rows):
                tensor = cast("Tensor", part)
                start = first - rows.start[self._axis]
                where = out.narrow(across, start, tensor.shape[across])
                where.narrow(along, place, tensor.shape[along]).copy_(tensor)
            place += tensor.shape[along]


class Sweep:
    """One region of the output, computed along one axis."""

    def __init__(self, evaluator: RegionEvaluator, box: Region, axis: int) -> None:
        """``box`` is in rows of the output, ``axis`` one of the network's."""
        self._evaluator, self._box, self._axis = evaluator, box, axis

    def run(self, slab: int, read: Callable[[Region], Tensor]) -> Iterator[tuple[Rows, Tensor]]:
        """Yield rows of the output in order, with batch and channels.

        ``read`` gives a region of the input, inside the whole image, each row once and in order,
        as a tensor in whose memory the axis is outermost and the channels innermost.
        """
        graph = self._evaluator.graph
        self._evaluator.outermost = self._axis
        buffers = TensorBuffers(self._evaluator, self._box, self._axis, read)
        edges = self._box.start[self._axis], self._box.stop[self._axis]
        for step in steps(graph, self._axis, *edges, slab):
            advance(course_of(graph), step, buffers)
            if (rows := step.new.get(graph.output)) is not None:
                yield rows, cast("Tensor", buffers.pieces[graph.output].pop().value)
