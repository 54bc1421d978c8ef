"""A region of the whole-image graph computed slab by slab along one axis.

Each row of each operation is computed once: of every tensor the trailing rows are kept that later
rows of other operations read. So memory does not grow with the region's length along the axis,
and nothing is computed twice along it but what overlapping transposed kernels share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx

from tilepipe.geometry import Region
from tilepipe.graph.bounds import clip, extents, pad_mode, pads_of, reads, reads_along, rows_along
from tilepipe.graph.evaluator import rows_read
from tilepipe.graph.fusion import Course, is_spatial, is_transposed
from tilepipe.graph.kernels import crop, empty, join
from tilepipe.graph.rules import SAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.evaluator import RegionEvaluator
    from tilepipe.graph.graph import Graph, Node

PIECE_BYTES = 48 << 20
"""Bytes of a tensor between two operations of a chain. Measured: less and more are slower."""
PIECE_ROWS = 8
"""Rows of it at least: a convolution of fewer reads too many rows of its source twice."""


def piece_rows(rows: int, row: int) -> int:
    """Return how many rows of ``row`` bytes each are computed at once: pieces are alike.

    >>> piece_rows(1000, 1 << 18), piece_rows(100, 1 << 30)
    (167, 8)
    """
    most = max(PIECE_ROWS, PIECE_BYTES // max(row, 1))
    return -(-rows // -(-rows // most))


@dataclass(frozen=True, slots=True)
class Step:
    """What one slab computes along the axis, and what is still read after it."""

    new: Mapping[fx.Node, Rows]
    """Rows that are computed, of each node that has any."""
    keep: Mapping[fx.Node, int]
    """The first row of each node that later steps read; the node's end where they read none."""


def steps(graph: Graph, axis: int, start: int, stop: int, slab: int) -> Iterator[Step]:
    """Yield the steps that compute output rows ``start:stop`` of an axis, ``slab`` at a time.

    Laws: the new rows of all steps are, for every node, the rows that the whole range needs, each
    once and in order; a step reads nothing but new and kept rows. The context before the first
    output row is computed in slabs, too, so that no step is larger than those in the middle.
    """
    final, unmade = rows_along(graph, axis, start, stop), Course(graph).unmade
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
                if is_transposed(item):  # all that the rows read give, or they are read again
                    rule = item.reading.accesses[0].rules[axis]
                    given = (high * rule.den - rule.last) // rule.num
                    until[item.node] = max(until[item.node], min(given, final[item.node][1]))
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


class Held:
    """The rows of one node that are still read, in pieces along the axis."""

    def __init__(self, dims: tuple[int, ...], axis: int, region: Region) -> None:
        """``region`` says which rows there are along the other axes."""
        self._dims, self._axis, self._origin = dims, axis, region.start
        self.pieces: list[tuple[int, int, object]] = []
        """First row, one past the last, and a tensor or several of the same rows."""

    @property
    def rows(self) -> Rows:
        """First row and one past the last."""
        return self.pieces[0][0], self.pieces[-1][1]

    def parts(self, region: Region) -> list[tuple[int, object]]:
        """Return the parts of a region, each with its first row along the axis."""
        start, stop = region.start[self._axis], region.stop[self._axis]
        found = []
        for first, last, value in self.pieces:
            if first < stop and last > start:
                low, high = max(first, start), min(last, stop)
                origin = (*self._origin[: self._axis], first, *self._origin[self._axis + 1 :])
                part = crop(value, self._dims, self._with(region, low, high), origin)
                found.append((low, part))
        return found

    def _with(self, region: Region, low: int, high: int) -> Region:
        a, axis = region, self._axis
        return Region(
            (*a.start[:axis], low, *a.start[axis + 1 :]),
            (*a.stop[:axis], high, *a.stop[axis + 1 :]),
        )

    def fetch(self, region: Region) -> object:
        """Return a region that is held, as one tensor or several."""
        found = [part for _, part in self.parts(region)]
        if len(found) == 1:
            return found[0]
        if isinstance(found[0], tuple):
            several = cast("list[tuple[Tensor, ...]]", found)
            return tuple(join(each, self._dims, self._axis) for each in zip(*several, strict=True))
        return join(cast("list[Tensor]", found), self._dims, self._axis)

    def let_go(self, keep: int) -> None:
        """Free the rows before ``keep``."""
        while self.pieces and self.pieces[0][1] <= keep:
            self.pieces.pop(0)
        if len(self.pieces) == 1 and isinstance(tensor := self.pieces[0][2], Tensor):
            first, last, _ = self.pieces[0]
            if 2 * (last - keep) < last - first:
                kept = tensor.narrow(self._dims[self._axis], keep - first, last - keep).clone()
                self.pieces[0] = keep, last, kept


class Sweep:
    """One region of the output, computed along one axis."""

    def __init__(self, evaluator: RegionEvaluator, box: Region, axis: int) -> None:
        """``box`` is in rows of the output, ``axis`` one of the network's."""
        self._evaluator, self._graph = evaluator, evaluator.graph
        self._box, self._axis = box, axis
        self._across = [
            {} if a == axis else rows_along(self._graph, a, *edges)
            for a, edges in enumerate(zip(box.start, box.stop, strict=True))
        ]
        self._held: dict[fx.Node, Held] = {}
        self._course = Course(self._graph)

    def run(self, slab: int, read: Callable[[Region], Tensor]) -> Iterator[tuple[Rows, Tensor]]:
        """Yield rows of the output in order, with batch and channels.

        ``read`` gives a region of the input, inside the whole image, each row once and in order,
        as a tensor in whose memory the axis is outermost and the channels innermost.
        """
        graph, evaluator = self._graph, self._evaluator
        evaluator.outermost = self._axis
        self._held = {
            node: Held(graph.dims[node], self._axis, self._region(node, (0, 0)))
            for node in (graph.source, *(item.node for item in graph.nodes))
            if all(node in rows for rows in self._across if rows)
        }
        edges = self._box.start[self._axis], self._box.stop[self._axis]
        for step in steps(graph, self._axis, *edges, slab):
            if (rows := step.new.get(graph.source)) is not None:
                value = rows_read(read, self._region(graph.source, rows))
                self._held[graph.source].pieces.append((*rows, value))
            for item in self._course.computed:
                if (rows := step.new.get(item.node)) is not None:
                    self._compute(item, rows)
                for node in self._course.last_reads[item.node]:
                    self._held[node].let_go(step.keep[node])
            if (rows := step.new.get(graph.output)) is not None:
                yield rows, cast("Tensor", self._held[graph.output].pieces.pop()[2])

    def _region(self, node: fx.Node, rows: Rows) -> Region:
        """Return rows of a node along the axis, with those that are needed along the others."""
        along = [rows if a == self._axis else m[node] for a, m in enumerate(self._across)]
        return Region(tuple(a for a, _ in along), tuple(b for _, b in along))

    def _fetch(self, node: fx.Node, region: Region) -> Tensor:
        node, region = self._seen(node, region)
        return cast("Tensor", self._held[node].fetch(region))

    def _seen(self, node: fx.Node, region: Region) -> tuple[fx.Node, Region]:
        """Return where the rows of a node are held: a crop holds none of its own."""
        while (view := self._course.views.get(node)) is not None:
            [(node, region)] = reads(self._graph, view, region)
        return node, region

    def _compute(self, item: Node, rows: Rows) -> None:
        """Compute new rows of a node and put them behind those that are held."""
        held, region = self._held[item.node], self._region(item.node, rows)
        tail = held.pieces[0][2] if held.pieces else None
        kept = rows[0] - held.rows[0] if held.pieces else 0
        if kept > rows[1] - rows[0] or item.node in self._course.pieced:
            tail, kept = None, 0  # the new rows become a piece of their own
        if (chain := self._course.chains.get(item.node)) is not None:
            self._flow(chain, rows, kept)
            return
        if not isinstance(tail, Tensor):
            value = self._evaluator.compute(item, region, self._fetch)
            held.pieces.append((*rows, value))
            return
        dims = self._graph.dims[item.node]
        first, dim = rows[0] - kept, dims[self._axis]
        buffer = self._buffer(item.node, tail, (first, rows[1]))
        self._move_tail(item.node, buffer, first)
        self._fill(item, region, buffer.narrow(dim, kept, rows[1] - rows[0]))
        held.pieces = [(first, rows[1], buffer)]

    def _move_tail(self, node: fx.Node, buffer: Tensor, first: int) -> None:
        """Copy the rows of a node that are held to the start of a buffer, at row ``first``."""
        held, dim = self._held[node], self._graph.dims[node][self._axis]
        for low, part in held.parts(self._region(node, (first, held.rows[1]))):
            tensor = cast("Tensor", part)
            buffer.narrow(dim, low - first, tensor.shape[dim]).copy_(tensor)

    def _flow(self, chain: tuple[Node, ...], rows: Rows, kept: int) -> None:
        """Compute new rows of a chain a few at a time, behind the ``kept`` rows of its end.

        What lies between the first operation and the last is small and soon used again.
        """
        end, held = chain[-1], self._held[chain[-1].node]
        dim, first = self._graph.dims[end.node][self._axis], rows[0] - kept
        row = self._region(end.node, (0, 1)).size * end.operation.shape()[1] * 4
        thick = piece_rows(rows[1] - rows[0], row)
        buffer: Tensor | None = None
        for low in range(rows[0], rows[1], thick):
            region = self._region(end.node, (low, min(low + thick, rows[1])))
            if chain[0].operation.name == "cat":
                value = self._evaluator.convolve_joined(chain[1], chain[0], region, self._fetch)
                links = chain[2:-1]
            else:
                value = cast("Tensor", self._evaluator.compute(chain[0], region, self._fetch))
                links = chain[1:-1]
            for link in links:
                value = self._next(link, region, value)
            straight = end.operation.name == "relu"
            # What comes last may have another type, or other channels.
            result = value if straight else self._next(end, region, value)
            if buffer is None:
                buffer = self._buffer(end.node, result, (first, rows[1]))
                if kept:
                    self._move_tail(end.node, buffer, first)
            out = buffer.narrow(dim, low - first, result.shape[dim])
            if straight:
                torch.clamp_min(value, 0, out=out)
            else:
                out.copy_(result)
        if kept:
            held.pieces.clear()
        held.pieces.append((first, rows[1], buffer))

    def _next(self, link: Node, region: Region, value: Tensor) -> Tensor:
        return cast("Tensor", self._evaluator.compute(link, region, lambda *_: value))

    def _buffer(self, node: fx.Node, like: Tensor, rows: Rows) -> Tensor:
        """Return memory for rows of a node, the axis outermost and the channels innermost."""
        dims, shape = self._graph.dims[node], list(like.shape)
        for d, n in zip(dims, self._region(node, rows).shape, strict=True):
            shape[d] = n
        first = dims[self._axis]
        return empty(like, shape, [first, *(d for d in dims if d != first)])

    def _fill(self, item: Node, region: Region, out: Tensor) -> None:
        """Compute a region of a node into memory that is given, in one pass where that can be."""
        name, axis = item.operation.name, self._axis
        if name == "relu":
            torch.clamp_min(self._fetch(item.operation.source, region), 0, out=out)
        elif name == "cat" and not is_spatial(self._graph, item):
            dims = self._graph.dims[item.node]
            along, across = item.operation.number("dim") % out.ndim, dims[axis]
            place = 0
            for access in item.reading.accesses:
                source, read = self._seen(access.source, region)
                for first, part in self._held[source].parts(read):
                    tensor = cast("Tensor", part)
                    where = out.narrow(across, first - read.start[axis], tensor.shape[across])
                    where.narrow(along, place, tensor.shape[along]).copy_(tensor)
                place += tensor.shape[along]
        else:
            out.copy_(cast("Tensor", self._evaluator.compute(item, region, self._fetch)))
