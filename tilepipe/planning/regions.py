"""Tiles by regions of the whole-image graph: what each reads, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilepipe.graph.bounds import clip, extents, reads_along, rows_along
from tilepipe.graph.footprint import swept_peak, voxel_bytes
from tilepipe.graph.graph import lattice, own_context
from tilepipe.graph.readings import Windowing, shape_of
from tilepipe.graph.sweep import Step, steps
from tilepipe.models.cost import Cost
from tilepipe.models.windows import Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from tilepipe.geometry import Context, Region, Shape
    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph, GraphNode
    from tilepipe.models.spec import Profile


@dataclass(frozen=True, slots=True)
class Regions:
    """Cuts a volume where memory wants it: off the lattice or on it, every region is exact."""

    graph: Graph
    """Exported at the size of the whole mirrored volume."""
    origin: Shape
    """Volume voxel at the graph's first input row, per axis of the network."""
    offset: Shape
    """Input row under the graph's first output row."""
    size: Shape
    """Voxels of a region, at most."""
    context: Context | None
    """That of the graph; None where it has no lattice on which regions repeat."""
    known: dict[tuple[int, int, int], dict[fx.Node, Rows]] = field(default_factory=dict)
    """Rows that were computed before, by axis, start and stop; may be shared."""
    schedules: dict[tuple[int, int, int, int], list[Step]] = field(default_factory=dict)
    """Steps that were computed before, by axis, start, stop and slab; may be shared."""

    def rows(self, axis: int, start: int, stop: int) -> dict[fx.Node, Rows]:
        """Return the rows of every node that volume voxels ``start:stop`` need."""
        key = axis, start, stop
        if key not in self.known:
            first = self.origin[axis] + self.offset[axis]
            self.known[key] = rows_along(self.graph, axis, start - first, stop - first)
        return self.known[key]

    def moved(self, axis: int, start: int, stop: int) -> int:
        """Return by how much a region may be moved towards the start and need as many rows.

        Away from the borders of the whole, regions that differ by whole steps are alike.
        """
        if self.context is None:
            return 0
        step = self.context.step[axis]
        margin = self.context.before[axis] + self.context.after[axis] + step
        first = self.origin[axis] + self.offset[axis]
        last = first + shape_of(self.graph.output)[2 + axis]
        inside = start - first >= margin and last - stop >= margin
        return (start - first - margin) // step * step if inside else 0

    def along(self, axis: int, start: int, stop: int) -> list[Span]:
        """Return the regions along one axis: what they read and what they answer for."""
        spans = []
        for a in range(start, stop, self.size[axis]):
            b = min(a + self.size[axis], stop)
            moved = self.moved(axis, a, b)
            low, high = self.rows(axis, a - moved, b - moved)[self.graph.source]
            begin = self.origin[axis] + moved
            spans.append(Span(low + begin, high + begin, a, b))
        return spans

    def output_box(self, keep: Region) -> Region:
        """Return a region of the network's axes in the coordinates of the graph's output."""
        first = [a + b for a, b in zip(self.origin, self.offset, strict=True)]
        return keep.grow(first, [-n for n in first])

    def cost(self, spans: Sequence[Sequence[Span]]) -> Cost:
        """Return the cost of all combinations of the regions along each axis.

        Multiply-adds are exact: those of an operation are a product over the axes of the rows it
        computes. The peak is that of one region, from the liveness of the tensors.
        """
        rows_along_axes = [
            [(self.rows(axis, a, b), n) for (a, b), n in self._alike(axis, along).items()]
            for axis, along in enumerate(spans)
        ]
        total = 0
        for item in self.graph.nodes:
            if weights := _weights(item):
                counts = [
                    sum(n * _computed(self.graph, item, axis, rows) for rows, n in along)
                    for axis, along in enumerate(rows_along_axes)
                ]
                total += weights * math.prod(counts)
        largest = [
            {node: max(rows[node][1] - rows[node][0] for rows, _ in along) for node in along[0][0]}
            for along in rows_along_axes
        ]
        return Cost(total, self._peak(largest))

    def swept(self, spans: Sequence[Sequence[Span]], axis: int, slab: int) -> Cost:
        """Return the cost of the same regions, each swept along ``axis`` by ``slab`` rows.

        The peak is that of a region away from the borders, or at the start, and no longer than it
        takes to be alike from slab to slab.
        """
        total = self.cost(spans).multiply_adds + self._again(spans, axis, slab)
        widths = {
            node: voxel_bytes(self.graph, node)
            for node in (self.graph.source, *(item.node for item in self.graph.nodes))
        }
        for other, along in enumerate(spans):
            if other != axis:
                rows = [self.rows(other, a, b) for a, b in self._alike(other, along)]
                for node in widths:
                    widths[node] *= max(r[node][1] - r[node][0] if node in r else 0 for r in rows)
        first = self.origin[axis] + self.offset[axis]
        peak = 0
        for a, b in list(self._alike(axis, spans[axis]))[:2]:
            schedule = self._schedule(axis, a - first, b - first, slab)
            peak = max(peak, swept_peak(self.graph, widths, schedule))
        return Cost(total, peak)

    def reread(self, spans: Sequence[Sequence[Span]], axis: int) -> int:
        """Return the multiply-adds of as many rows as convolutions read again in each slab.

        Nothing of it is computed, but to begin a slab takes about a third as long.
        """
        total = 0
        for item in self.graph.nodes:
            rule = item.reading.accesses[0].rules[axis]
            weights = (
                0 if item.operation.is_transposed else _weights(item) * (rule.last - rule.first)
            )
            for other, along in enumerate(spans):
                if other != axis and weights:
                    alike = self._alike(other, along).items()
                    weights *= sum(
                        n * _computed(self.graph, item, other, self.rows(other, a, b))
                        for (a, b), n in alike
                    )
            total += weights
        return total

    def _again(self, spans: Sequence[Sequence[Span]], axis: int, slab: int) -> int:
        """Return the multiply-adds of what two slabs compute: where transposed kernels overlap."""
        total, first = 0, self.origin[axis] + self.offset[axis]
        for item in self.graph.nodes:
            rule = item.reading.accesses[0].rules[axis]
            if not item.operation.is_transposed or rule.last - rule.first < rule.den:
                continue
            rows = 0
            for (a, b), n in self._alike(axis, spans[axis]).items():
                once = _computed(self.graph, item, axis, self.rows(axis, a, b))
                every = steps(self.graph, axis, a - first, b - first, slab)
                new = (_computed(self.graph, item, axis, step.new) for step in every)
                rows += n * (sum(new) - once)
            for other, along in enumerate(spans):
                if other != axis:
                    alike = self._alike(other, along).items()
                    computed = (
                        n * _computed(self.graph, item, other, self.rows(other, a, b))
                        for (a, b), n in alike
                    )
                    rows *= sum(computed)
            total += _weights(item) * rows
        return total

    def _alike(self, axis: int, spans: Sequence[Span]) -> Counter[Rows]:
        """Return one of all regions that need as many rows, as volume voxels, and their number."""
        alike: Counter[Rows] = Counter()
        for span in spans:
            moved = self.moved(axis, span.keep_from, span.keep_to)
            alike[span.keep_from - moved, span.keep_to - moved] += 1
        return alike

    def _schedule(self, axis: int, start: int, stop: int, slab: int) -> list[Step]:
        """Return the steps until they are alike."""
        reach = 0 if self.context is None else self.context.before[axis] + self.context.after[axis]
        stop = min(stop, start + 2 * reach + 4 * slab) if self.context is not None else stop
        key = axis, start, stop, slab
        if key not in self.schedules:
            self.schedules[key] = list(steps(self.graph, axis, start, stop, slab))
        return self.schedules[key]

    def _peak(self, rows: Sequence[dict[fx.Node, int]]) -> int:
        """Return the most bytes alive at once, in the order in which operations are computed."""
        sizes = {
            node: math.prod(along[node] for along in rows) * voxel_bytes(self.graph, node)
            for node in rows[0]
        }
        last: dict[fx.Node, int] = {}
        for place, item in enumerate(self.graph.nodes):
            for access in item.reading.accesses:
                last[access.source] = place
        alive = sizes[self.graph.source]
        peak = alive
        for place, item in enumerate(self.graph.nodes):
            if item.node not in sizes:
                continue
            alive += sizes[item.node]
            # What windows read is often cut or padded first; in 3D kernels reorder both sides.
            copies = 0
            if item.operation.kind.window is not Windowing.NONE:
                copies = sizes[item.operation.source]
                copies += sizes[item.node] if len(rows) == 3 else 0
            peak = max(peak, alive + copies)
            for access in item.reading.accesses:
                if last[access.source] == place:
                    alive -= sizes.pop(access.source, 0)
        return peak


def regions_of(
    profile: Profile,
    graph: Graph,
    box: Region,
    size: Shape,
    known: dict[tuple[int, int, int], dict[fx.Node, Rows]] | None = None,
    schedules: dict[tuple[int, int, int, int], list[Step]] | None = None,
) -> Regions:
    """Return the regions of a network whose one pass over ``box`` has this graph."""
    # The profile's lattice is that of the sizes that suit the network; this one may be another.
    context = None if graph.off_lattice or lattice(graph)[1] else own_context(graph)
    return Regions(
        graph, box.start, profile.offset, size, context, {} if known is None else known,
        {} if schedules is None else schedules,
    )  # fmt: skip


def _weights(item: GraphNode) -> int:
    """Return the multiply-adds of an operation for each row and column that it computes."""
    return item.operation.kind.multiply_adds(item.operation)


def _computed(graph: Graph, item: GraphNode, axis: int, rows: Mapping[fx.Node, Rows]) -> int:
    """Return the rows along one axis that multiply: of the output, or of what is transposed."""
    if item.node not in rows:
        return 0
    low, high = rows[item.node]
    if item.operation.is_transposed:
        [(source, read)] = reads_along(graph, item, axis, (low, high))
        low, high = clip(read, extents(graph, source)[axis])
    return high - low
