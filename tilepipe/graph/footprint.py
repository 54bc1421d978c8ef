"""The bytes that a sweep holds at each step, counted without computing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tilepipe.graph.bounds import extents
from tilepipe.graph.fusion import Course
from tilepipe.graph.sweep import Step, piece_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph, Node


class SweptMemory:
    """The bytes that `Sweep` holds, by the decisions that it takes, without a tensor."""

    def __init__(self, graph: Graph, widths: Mapping[fx.Node, int]) -> None:
        """``widths`` are the bytes of one row of each node along the axis of the sweep."""
        self._graph, self._widths = graph, widths
        self._course = Course(graph)
        self._held: dict[fx.Node, list[tuple[int, int, int]]] = {node: [] for node in widths}
        self._alive = self.peak = 0

    def take(self, step: Step) -> None:
        """Go through a step, and see the most that is held in it."""
        graph = self._graph
        if (rows := step.new.get(graph.source)) is not None:
            self._append(graph.source, rows)
        for item in self._course.computed:
            if (rows := step.new.get(item.node)) is not None:
                self._compute(item, rows)
            for source in self._course.last_reads[item.node]:
                self._let_go(source, step.keep[source])
        for piece in self._held[graph.output]:
            self._alive -= piece[2]
        self._held[graph.output] = []

    def _append(self, node: fx.Node, rows: Rows) -> None:
        size = (rows[1] - rows[0]) * self._widths[node]
        self._held[node].append((*rows, size))
        self._alive += size
        self.peak = max(self.peak, self._alive)

    def _compute(self, item: Node, rows: Rows) -> None:
        node, count = item.node, rows[1] - rows[0]
        pieces, chain = self._held[node], self._course.chains.get(node)
        kept = rows[0] - pieces[0][0] if pieces else 0
        if kept > count or node in self._course.pieced:
            kept = 0
        first, width = (chain or (item,))[0], self._widths[node]
        at_once = piece_rows(count, width) if chain else count
        sources = [self._seen(access.source) for access in first.reading.accesses]
        convolution = chain[1] if chain and first.operation.name == "cat" else first
        # What is read as one, and what is made before it is put in its place.
        several = [at_once * self._widths[s] for s in sources if len(self._held[s]) > 1]
        between = 0 if item.operation.name == "cat" else max(several, default=0)
        if any(rule.first < 0 for a in convolution.reading.accesses for rule in a.rules):
            between += at_once * max(self._widths[s] for s in sources)  # rows outside put round it
        if "upsample" in first.operation.name:
            between += count * width * (2 if "nearest" in first.operation.name else 5) // 2
        if chain:  # a relu is written where it belongs, others are made and then copied
            between += at_once * width * (1 if item.operation.name == "relu" else 2)
        elif kept and item.operation.name not in ("relu", "cat"):
            between += count * width
        if not kept:
            self._append(node, rows)
        else:
            old, start = sum(piece[2] for piece in pieces), pieces[0][0]
            made = (rows[1] - start) * self._widths[node]
            self.peak = max(self.peak, self._alive + made + between)
            self._alive += made - old
            self._held[node] = [(start, rows[1], made)]
        self.peak = max(self.peak, self._alive + between)

    def _seen(self, node: fx.Node) -> fx.Node:
        while (view := self._course.views.get(node)) is not None:
            node = view.operation.source
        return node

    def _let_go(self, node: fx.Node, keep: int) -> None:
        pieces, freed = self._held[node], 0
        while pieces and pieces[0][1] <= keep:
            freed += pieces.pop(0)[2]
        if len(pieces) == 1 and 2 * (pieces[0][1] - keep) < pieces[0][1] - pieces[0][0]:
            size = (pieces[0][1] - keep) * self._widths[node]
            freed += pieces[0][2]
            pieces[0] = keep, pieces[0][1], size
            self._alive += size
        self._alive -= freed


def voxel_bytes(graph: Graph, node: fx.Node) -> int:
    """Return the bytes of a node's tensor for each of its voxels."""
    value = node.meta["val"]
    tensors = value if isinstance(value, list | tuple) else [value]
    spatial = math.prod(extents(graph, node))
    return sum(int(t.numel() * t.element_size()) for t in tensors if t is not None) // spatial
