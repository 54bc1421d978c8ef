"""What a choice of tiles and windows costs: multiply-adds, bytes decoded, memory."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tilepipe.geometry import Region, Shape, ceil_to
from tilepipe.models.cost import Cost
from tilepipe.models.process_memory import PROCESS
from tilepipe.models.windows import Span, Windows
from tilepipe.planning.regions import Regions, regions_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph
    from tilepipe.graph.sweep import Step
    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile

    class Written(Protocol):
        """What takes regions of whole write units."""

        def write(self, region: Region, array: NDArray[np.generic]) -> None:
            """Write all channels of a region."""


def blocks(start: int, stop: int, length: int, edge: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that are read at once: cut where chunks end.

    What is mirrored at the volume's ends is read with the chunk that it is made from. Law: the
    parts cover ``start:stop``, each row once and in order.

    >>> list(blocks(-3, 25, 20, 8))
    [(-3, 8), (8, 16), (16, 25)]
    >>> list(blocks(-10, 25, 20, 4))
    [(-10, -8), (-8, -4), (-4, 4), (4, 8), (8, 12), (12, 16), (16, 24), (24, 25)]
    """
    last = (length - 1) // edge * edge
    while start < stop:
        end = (start // edge + 1) * edge
        if end == 0 or end == last + edge:
            end += edge
        end = min(end, stop)
        yield start, end
        start = end


KERNELS = 150_000_000
"""Bytes that the library of kernels keeps for itself."""

SPREAD = 1.25
"""Memory taken over bytes alive: what the allocator cannot use again. Measured, 1.0 to 1.2."""

SWEPT = {2: 1.75, 3: 1.25}
"""The same of a sweep, by the network's axes, with rows read and written meanwhile. Measured."""

SLOTS = 3
"""Tiles in flight in a worker: one is read, one computed, one written."""

BYTE_WORK = 50
"""Multiply-adds that take as long as decoding a byte of the source."""

CALL_WORK = 50_000_000
"""Multiply-adds that take as long as calling the network once."""

STEP_WORK = 10_000_000
"""Multiply-adds that take as long as beginning one operation on a slab. Measured: 0.1 ms."""

TOUCH_WORK = 30
"""Multiply-adds that take as long as a byte of a CPU's memory that is used for the first time."""

FASTER = {"cpu": 1, "cuda": 100}
"""How much faster a device multiplies, while decoding and beginning take as long. Not measured."""

READS = 10
"""Chunks that are decoded at once while one tile is read."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What does not depend on the sizes that are chosen."""

    model: Model
    profile: Profile
    shape: Shape
    """Voxels of the volume, leading axes first."""
    limit: Shape | None
    """With the network's own boundary: the size that it is run on, per axis of the network."""
    voxel_bytes: int
    """Bytes of a voxel of the source, with all its channels."""
    answer_bytes: int
    """Bytes of a voxel of the target, with all its channels."""
    box: Region
    """The one pass that the tiles equal, in volume coordinates of the network's axes."""
    graph: Graph | None = None
    """The graph at that size where tiles are regions of it; None for windows."""
    ratio: float = 1.0
    """Bytes of a number in the network, over those of the model's own type."""
    device: str = "cpu"
    """Where the network runs: ``cpu`` or ``cuda``."""
    process: int = PROCESS
    """Bytes of a process that does nothing yet, with the network's own code."""
    costs: dict[Shape, Cost] = field(default_factory=dict)
    known: dict[tuple[int, int, int], dict[fx.Node, Rows]] = field(default_factory=dict)
    schedules: dict[tuple[int, int, int, int], list[Step]] = field(default_factory=dict)

    @property
    def leading(self) -> int:
        """Axes in front of those that the network is run along."""
        return len(self.shape) - self.profile.axes

    @property
    def step(self) -> Shape:
        """Step per axis of the volume."""
        return (1,) * self.leading + self.profile.context.step

    @property
    def multiple(self) -> Shape:
        """What tiles and chunks must be multiples of: windows begin on the lattice."""
        return self.step if self.graph is None else (1,) * len(self.shape)

    def cost(self, shape: Shape) -> Cost:
        """Return the cost of one window of this input shape."""
        if shape not in self.costs:
            self.costs[shape] = self.model.cost(shape)
        return self.costs[shape]

    def cuts(self, size: Shape) -> Windows | Regions:
        """Return how tiles are cut into parts that answer for ``size`` voxels each."""
        if self.graph is None:
            return Windows(self.profile, size, self.limit)
        return regions_of(self.profile, self.graph, self.box, size, self.known, self.schedules)


@dataclass(frozen=True, slots=True)
class Work:
    """What a choice of tile and window costs."""

    multiply_adds: int
    windows: int
    memory: int
    """Peak bytes of one worker; of its device where the network runs on one."""
    read_voxels: int
    """Voxels decoded from storage, whole chunks counted."""
    time: float
    """What decides between choices: all of it, in multiply-adds."""


def tile_work(tiling: Tiling, tile: Shape, window: Shape, chunks: Shape) -> Work:
    """Count the work of a choice exactly, from the windows along each axis."""
    cuts, leading = tiling.cuts(window), tiling.leading
    spans: list[list[Span]] = []
    decoded = widest = touched = 1
    for axis, (length, edge, chunk) in enumerate(zip(tiling.shape, tile, chunks, strict=True)):
        spans_of_axis, along, most, parts = list[Span](), 0, 0, 1
        for start in range(0, length, edge):
            stop = min(start + edge, length)
            spans_of_tile = [Span(start, stop, start, stop)]
            if axis >= leading:
                spans_of_tile = cuts.along(axis - leading, start, stop)
            spans_of_axis += spans_of_tile
            low = min(span.read_from for span in spans_of_tile)
            high = max(span.read_to for span in spans_of_tile)
            voxels = _decoded(low, high, length, chunk)
            along, most, parts = along + voxels, max(most, high - low), max(parts, voxels // chunk)
        decoded, widest, touched = decoded * along, widest * most, touched * parts
        spans.append(spans_of_axis)
    planes = math.prod(tiling.shape[:leading])
    inner = spans[leading:]
    number = planes * math.prod(map(len, inner))
    cost = cuts.cost(inner) if isinstance(cuts, Regions) else _windows_cost(tiling, inner)
    total, peak = planes * cost.multiply_adds, int(cost.peak * tiling.ratio)
    decoding = min(READS, touched) * math.prod(chunks) * tiling.voxel_bytes
    buffers = SLOTS * (widest * tiling.voxel_bytes + math.prod(tile) * tiling.answer_bytes)
    weights = sum(p.nbytes for p in tiling.model.module.parameters())
    memory = tiling.process + KERNELS + int(SPREAD * peak) + buffers + decoding + 2 * weights
    other = BYTE_WORK * decoded * tiling.voxel_bytes + CALL_WORK * number
    time = total + FASTER[tiling.device] * other
    time += TOUCH_WORK * peak if tiling.device == "cpu" else 0
    return Work(total, number, memory, decoded, time)


def sweep_work(
    tiling: Tiling, tile: Shape, axis: int, slab: int, chunks: Shape, unit: Shape
) -> Work:
    """Count the work of sweeping each tile along an axis, ``slab`` rows at a time."""
    cuts = tiling.cuts(tile)
    assert isinstance(cuts, Regions)
    spans, decoded, widest, touched, thick = [], 1, 1, 1, 1
    for a, (length, edge, chunk) in enumerate(zip(tiling.shape, tile, chunks, strict=True)):
        starts = range(0, length, edge)
        spans_of_axis = [span for n in starts for span in cuts.along(a, n, min(n + edge, length))]
        spans.append(spans_of_axis)
        if a == axis:
            block = block_rows(slab, chunk)
            parts = [
                part
                for span in spans_of_axis
                for part in blocks(span.read_from, span.read_to, length, block)
            ]
            thick = max(high - low for low, high in parts)
            decoded *= sum(_decoded(low, high, length, chunk) for low, high in parts)
            continue
        along = [_decoded(span.read_from, span.read_to, length, chunk) for span in spans_of_axis]
        decoded, touched = decoded * sum(along), touched * max(1, max(along) // chunk)
        widest *= max(span.size for span in spans_of_axis)
    cost = cuts.swept(spans, axis, slab)
    slabs = -(-min(tile[axis], tiling.shape[axis]) // slab)
    number = math.prod(map(len, spans)) * slabs
    channels = tiling.model.channels
    held = thick * 3 + slab  # one block in use, one read ahead, one between; and those of a slab
    source = held * widest * 4 * channels + thick * widest * tiling.voxel_bytes
    decoding = min(READS, touched * max(1, thick // chunks[axis])) * math.prod(chunks)
    across = math.prod(n for a, n in enumerate(tile) if a != axis)
    answer = 3 * (min(unit[axis], tile[axis]) + slab) * across * tiling.answer_bytes
    weights = sum(p.nbytes for p in tiling.model.module.parameters())
    here = 2 * slab * across * 4 * tiling.profile.classes  # one slab's answer, and that before
    peak = int(SWEPT[tiling.profile.axes] * cost.peak * tiling.ratio) + here
    memory = tiling.process + KERNELS + peak + source + decoding * tiling.voxel_bytes + answer
    begun = STEP_WORK * len(cuts.graph.nodes) * number
    reread = cuts.reread(spans, axis) * len(spans[axis]) * slabs // 3
    reading = BYTE_WORK * decoded * tiling.voxel_bytes
    time = cost.multiply_adds + reread + FASTER[tiling.device] * (begun + reading)
    time += TOUCH_WORK * peak if tiling.device == "cpu" else 0
    return Work(cost.multiply_adds, number, memory + 2 * weights, decoded, time)


def block_rows(slab: int, chunk: int) -> int:
    """Return the rows that a sweep reads at once: whole chunks, a slab at least."""
    return ceil_to(slab, chunk)


def _windows_cost(tiling: Tiling, spans: Sequence[Sequence[Span]]) -> Cost:
    """Return the cost of all windows, from the cost of those of each size."""
    total = peak = 0
    counters = [Counter(span.size for span in along) for along in spans]
    for sizes in itertools.product(*(counter.items() for counter in counters)):
        cost = tiling.cost(tuple(size for size, _ in sizes))
        total += math.prod(count for _, count in sizes) * cost.multiply_adds
        peak = max(peak, cost.peak)
    return Cost(total, peak)


def _decoded(low: int, high: int, length: int, chunk: int) -> int:
    """Return the voxels in the chunks that hold the mirrored range ``low:high`` of an axis."""
    first, last = max(0, low), min(length, high)
    if low < 0:
        last = max(last, min(length, 1 - low))
    if high > length:
        first = min(first, max(0, 2 * (length - 1) - high + 1))
    return min(length, ceil_to(last, chunk)) - first // chunk * chunk


def floor_work(tiling: Tiling) -> int:
    """Return the multiply-adds of one pass over the whole mirrored volume."""
    size = tiling.box.shape
    planes = math.prod(tiling.shape[: tiling.leading])
    if not tiling.profile.fixed:
        return planes * tiling.cost(size).multiply_adds
    window = tiling.profile.smallest
    share = tiling.cost(window).multiply_adds / math.prod(window)
    return int(planes * share * math.prod(size))
