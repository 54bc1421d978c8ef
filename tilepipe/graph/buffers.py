"""Which rows of every node a sweep holds, and when they are freed, decided in one place.

`advance` goes through a step and decides; `Buffers` does what is decided: once with tensors, which
is the sweep, and once by counting bytes, which is what the plan says that the sweep will hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.fusion import Course
    from tilepipe.graph.graph import GraphNode
    from tilepipe.graph.sweep import Step

Value = TypeVar("Value")


class Piece(NamedTuple, Generic[Value]):
    """Rows of one node that lie in one memory."""

    first: int
    """The first row along the axis of the sweep."""
    last: int
    """One past the last row."""
    value: Value
    """What holds the rows: a tensor, several of the same rows, or their bytes."""


class Buffers(Protocol[Value]):
    """Computes and holds rows of nodes as `advance` says."""

    pieces: dict[fx.Node, list[Piece[Value]]]
    """The rows of each node that are still read, in order along the axis; changed by `advance`."""

    def read(self, rows: Rows) -> Value:
        """Return rows of the input."""
        ...

    def append(self, item: GraphNode, rows: Rows) -> Value:
        """Compute rows of a node in a memory of their own."""
        ...

    def grow(self, item: GraphNode, first: int, rows: Rows) -> Value:
        """Compute rows of a node behind a copy of those that are held from row ``first`` on."""
        ...

    def shorten(self, node: fx.Node, piece: Piece[Value], keep: int) -> Value:
        """Return a copy of the rows of a piece from row ``keep`` on."""
        ...

    def free(self, piece: Piece[Value]) -> None:
        """Let go of a piece that is no longer among the `pieces`."""
        ...


def advance(course: Course, step: Step, buffers: Buffers[Value]) -> None:
    """Compute the new rows of a step, and free what no later step reads.

    Laws: rows that are held of a node follow one another; no piece is read after it is freed. New
    rows grow a piece that is shorter than they are, so that what is read lies in one memory.
    """
    source = course.graph.source
    if (rows := step.new.get(source)) is not None:
        buffers.pieces[source].append(Piece(*rows, buffers.read(rows)))
    for item in course.computed:
        if (rows := step.new.get(item.node)) is not None:
            _compute(course, item, rows, buffers)
        for node in course.last_reads[item.node]:
            _free(course, node, step.keep[node], buffers)


def _compute(course: Course, item: GraphNode, rows: Rows, buffers: Buffers[Value]) -> None:
    pieces = buffers.pieces[item.node]
    first = pieces[0].first if pieces else rows[0]
    is_long = rows[0] - first > rows[1] - rows[0]
    apart = is_long or item.node in course.pieced or item.operation.several
    if apart or not pieces:
        pieces.append(Piece(*rows, buffers.append(item, rows)))
        return
    grown = Piece(first, rows[1], buffers.grow(item, first, rows))
    _replace(buffers, pieces, grown)


def _free(course: Course, node: fx.Node, keep: int, buffers: Buffers[Value]) -> None:
    """Free the pieces before row ``keep``, and most of the only piece if less than half stays."""
    pieces = buffers.pieces[node]
    while pieces and pieces[0].last <= keep:
        buffers.free(pieces.pop(0))
    if len(pieces) == 1 and node not in course.several:
        piece = pieces[0]
        if 2 * (piece.last - keep) < piece.last - piece.first:
            short = Piece(keep, piece.last, buffers.shorten(node, piece, keep))
            _replace(buffers, pieces, short)


def _replace(buffers: Buffers[Value], pieces: list[Piece[Value]], piece: Piece[Value]) -> None:
    replaced = list(pieces)
    pieces[:] = [piece]
    for old in replaced:
        buffers.free(old)
