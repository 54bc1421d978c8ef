"""The bytes that a sweep holds at each step, counted without computing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tilepipe.graph.bounds import extents
from tilepipe.graph.buffers import Piece, advance
from tilepipe.graph.fusion import course_of
from tilepipe.graph.sweep import piece_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph, GraphNode
    from tilepipe.graph.sweep import Step


class ByteBuffers:
    """The bytes that a sweep holds, and the most of them: its decisions, without its tensors."""

    def __init__(self, graph: Graph, widths: Mapping[fx.Node, int]) -> None:
        """``widths`` are the bytes of one row of each node along the axis of the sweep."""
        self._widths, self._course = widths, course_of(graph)
        self.pieces: dict[fx.Node, list[Piece[int]]] = {node: [] for node in widths}
        self.alive = self.peak = 0

    def read(self, rows: Rows) -> int:
        """Count rows of the input."""
        return self._count(self._course.graph.source, rows)

    def append(self, item: GraphNode, rows: Rows) -> int:
        """Count rows of a node in a memory of their own."""
        size = self._count(item.node, rows)
        self.peak = max(self.peak, self.alive + self._beside(item, rows, grows=False))
        return size

    def grow(self, item: GraphNode, first: int, rows: Rows) -> int:
        """Count rows of a node and a copy of those that are held from row ``first`` on."""
        size = self._count(item.node, (first, rows[1]))
        self.peak = max(self.peak, self.alive + self._beside(item, rows, grows=True))
        return size

    def shorten(self, node: fx.Node, piece: Piece[int], keep: int) -> int:
        """Count a copy of the rows of a piece from row ``keep`` on."""
        return self._count(node, (keep, piece.last))

    def free(self, piece: Piece[int]) -> None:
        """Count a piece off."""
        self.alive -= piece.value

    def _count(self, node: fx.Node, rows: Rows) -> int:
        size = (rows[1] - rows[0]) * self._widths[node]
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return size

    def _beside(self, item: GraphNode, rows: Rows, *, grows: bool) -> int:
        """Return the bytes that are made beside the result while rows of a node are computed."""
        chain = self._course.chains.get(item.node)
        first, kind, count = (chain or (item,))[0], item.operation.kind, rows[1] - rows[0]
        width = self._widths[item.node]
        at_once = piece_rows(count, width) if chain else count
        sources = [self._seen(access.source) for access in first.reading.accesses]
        convolution = chain[1] if chain and first.operation.kind.joins else first
        # What is read as one, and what is made before it is put in its place.
        several = [at_once * self._widths[s] for s in sources if len(self.pieces[s]) > 1]
        beside = 0 if kind.joins else max(several, default=0)
        if any(rule.first < 0 for a in convolution.reading.accesses for rule in a.rules):
            beside += at_once * max(self._widths[s] for s in sources)  # rows outside put round it
        beside += count * width * first.operation.kind.beside // 2
        if chain:  # what is written where it belongs is made once, else it is copied
            beside += at_once * width * (2 if kind.into is None else 1)
        elif grows and kind.into is None and not kind.joins:
            beside += count * width
        return beside

    def _seen(self, node: fx.Node) -> fx.Node:
        while (view := self._course.views.get(node)) is not None:
            node = view.operation.source
        return node


def swept_peak(graph: Graph, widths: Mapping[fx.Node, int], schedule: Iterable[Step]) -> int:
    """Return the most bytes that a sweep of these steps holds.

    ``widths`` are the bytes of one row of each node along the axis of the sweep.
    """
    buffers = ByteBuffers(graph, widths)
    for step in schedule:
        advance(course_of(graph), step, buffers)
        while buffers.pieces[graph.output]:
            buffers.free(buffers.pieces[graph.output].pop())
    return buffers.peak


def voxel_bytes(graph: Graph, node: fx.Node) -> int:
    """Return the bytes of a node's tensor for each of its voxels."""
    value = node.meta["val"]
    tensors = value if isinstance(value, list | tuple) else [value]
    spatial = math.prod(extents(graph, node))
    return sum(int(t.numel() * t.element_size()) for t in tensors if t is not None) // spatial
