"""The sizes that cost least: windows, tiles and write units, by work and within memory."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape, ceil_to
from tilepipe.models.cost import Cost
from tilepipe.models.process_memory import PROCESS
from tilepipe.models.windows import Span, Windows
from tilepipe.planning.regions import Regions, regions_of
from tilepipe.segmentation.streams import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph
    from tilepipe.graph.sweep import Step
    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile

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
SLABS = {2: (32, 64, 128, 256, 512, 1024), 3: (8, 16, 32, 64, 128)}
"""Rows of a slab that are tried, by the network's axes."""
STEP_WORK = 10_000_000
"""Multiply-adds that take as long as beginning one operation on a slab. Measured: 0.1 ms."""
TOUCH_WORK = 30
"""Multiply-adds that take as long as a byte of a CPU's memory that is used for the first time."""
FASTER = {"cpu": 1, "cuda": 100}
"""How much faster a device multiplies, while decoding and beginning take as long. Not measured."""
GAIN = 1.005
"""A choice that takes more memory must save at least this much time."""
LOSS = 1.01
"""Time that shorter tiles may take: they are what is lost where one fails, and what is shown."""
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


def work(tiling: Tiling, tile: Shape, window: Shape, chunks: Shape) -> Work:
    """Count the work of a choice exactly, from the windows along each axis."""
    cuts, leading = tiling.cuts(window), tiling.leading
    spans: list[list[Span]] = []
    decoded = widest = touched = 1
    for axis, (length, edge, chunk) in enumerate(zip(tiling.shape, tile, chunks, strict=True)):
        every, along, most, parts = list[Span](), 0, 0, 1
        for start in range(0, length, edge):
            mine = [(start, min(start + edge, length), 0, 0)]
            if axis >= leading:
                mine = cuts.along(axis - leading, *mine[0][:2])
            every += mine
            low, high = min(s[0] for s in mine), max(s[1] for s in mine)
            voxels = _decoded(low, high, length, chunk)
            along, most, parts = along + voxels, max(most, high - low), max(parts, voxels // chunk)
        decoded, widest, touched = decoded * along, widest * most, touched * parts
        spans.append(every)
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
        every = [s for n in starts for s in cuts.along(a, n, min(n + edge, length))]
        spans.append(every)
        if a == axis:
            block = block_rows(slab, chunk)
            parts = [part for s in every for part in blocks(s[0], s[1], length, block)]
            thick = max(high - low for low, high in parts)
            decoded *= sum(_decoded(low, high, length, chunk) for low, high in parts)
            continue
        along = [_decoded(low, high, length, chunk) for low, high, _, _ in every]
        decoded, touched = decoded * sum(along), touched * max(1, max(along) // chunk)
        widest *= max(high - low for low, high, _, _ in every)
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
    counters = [Counter(b - a for a, b, _, _ in along) for along in spans]
    for chosen in itertools.product(*(counter.items() for counter in counters)):
        cost = tiling.cost(tuple(size for size, _ in chosen))
        total += math.prod(count for _, count in chosen) * cost.multiply_adds
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


@dataclass(frozen=True, slots=True)
class Choice:
    """Sizes that fit, with what they cost."""

    tile: Shape
    window: Shape
    """Voxels that one call answers for at most, per axis of the network; of a sweep, a slab."""
    sweep: int | None
    """The axis of the volume along which tiles are swept; None for windows."""
    work: Work
    why: str = ""
    """How it compares with the other strategy."""


def choose(
    tiling: Tiling,
    unit: Shape,
    chunks: Shape,
    memory: int,
    tile: Shape | None,
    strategy: str = "auto",
) -> Choice:
    """Return the sizes that take least time and fit, no larger than it pays.

    ``unit`` is the write unit, ``chunks`` the source's, ``memory`` in bytes per worker. Raises
    `BadRequest` where not even the smallest window fits.
    """
    boxes, smallest = (
        ([], None) if strategy == "sweep" else _boxes(tiling, unit, chunks, memory, tile)
    )
    swept, least = (
        ([], None) if strategy == "direct" else _sweeps(tiling, unit, chunks, memory, tile)
    )
    if not (boxes or swept):
        needed = min(w.memory for w in (smallest, least) if w is not None)
        raise BadRequest(
            f"memory (={describe_bytes(memory)}) must hold the {'' if tile else 'smallest '}tile"
            f" (={describe_bytes(needed)}); give more with --memory"
            + (" or a smaller --tile" if tile else "")
        )
    chosen = _cheapest(boxes + swept)
    assert chosen is not None
    other = _cheapest(boxes if chosen.sweep is not None else swept)
    if chosen.sweep is not None and tile is None:
        chosen = _shortened(tiling, unit, chunks, chosen)
    return replace(chosen, why=_compared(chosen, other))


def _cheapest(choices: Sequence[Choice]) -> Choice | None:
    least = min((choice.work.time for choice in choices), default=0.0)
    paying = [choice for choice in choices if choice.work.time <= GAIN * least]
    return min(paying, key=lambda choice: choice.work.memory, default=None)


def _compared(chosen: Choice, other: Choice | None) -> str:
    name = "boxes" if chosen.sweep is not None else "a sweep"
    if other is None:
        return f"{name} were not asked for, or do not fit"
    return (
        f"{name} would take {other.work.time / chosen.work.time:.2f} times as long and"
        f" {describe_bytes(other.work.memory)}"
    )


def _boxes(
    tiling: Tiling, unit: Shape, chunks: Shape, memory: int, tile: Shape | None
) -> tuple[list[Choice], Work | None]:
    """Return the tiles and windows that fit, and what the smallest costs."""
    fitting: list[Choice] = []
    smallest: Work | None = None
    for window in _windows(tiling, tile or tiling.shape):
        size, before = window[tiling.leading :], len(fitting)
        for chosen in [tile] if tile else _tiles(tiling, unit, window):
            found = work(tiling, chosen, size, chunks)
            if smallest is None or found.memory < smallest.memory:
                smallest = found
            if found.memory > memory:
                break
            fitting.append(Choice(chosen, size, None, found))
        if len(fitting) == before:
            break
    return fitting, smallest


def _sweeps(
    tiling: Tiling, unit: Shape, chunks: Shape, memory: int, tile: Shape | None
) -> tuple[list[Choice], Work | None]:
    """Return the sweeps that fit, as long as the volume, and what the smallest costs."""
    fitting: list[Choice] = []
    smallest: Work | None = None
    if tiling.graph is None or tiling.leading:
        return fitting, smallest
    for axis, slab in itertools.product(range(len(tiling.shape)), SLABS[tiling.profile.axes]):
        slab = min(ceil_to(slab, tiling.step[axis]), (tile or tiling.shape)[axis])
        for cross in [tile] if tile else _crosses(tiling, unit, axis):
            found = sweep_work(tiling, cross, axis, slab, chunks, unit)
            if smallest is None or found.memory < smallest.memory:
                smallest = found
            if found.memory > memory:
                break
            window = (*cross[:axis], slab, *cross[axis + 1 :])
            fitting.append(Choice(cross, window, axis, found))
    return fitting, smallest


def _crosses(tiling: Tiling, unit: Shape, axis: int) -> Iterator[Shape]:
    """Yield tiles as long as the volume along an axis, from thin to thick; whole write units."""
    whole = tuple(ceil_to(n, u) for n, u in zip(tiling.shape, unit, strict=True))
    last: Shape = ()
    for edge in (base * 2**power for power in range(4, 60) for base in (1, 1.5)):
        tile = tuple(
            n if a == axis else min(ceil_to(int(edge), u), n)
            for a, (u, n) in enumerate(zip(unit, whole, strict=True))
        )
        if tile != last:
            yield tile
        last = tile
        if tile == whole:
            return


def _shortened(tiling: Tiling, unit: Shape, chunks: Shape, choice: Choice) -> Choice:
    """Return the shortest tiles that take next to no more time: less is lost where one fails."""
    axis = choice.sweep
    assert axis is not None
    length = unit[axis]
    while length < choice.tile[axis]:
        tile = (*choice.tile[:axis], length, *choice.tile[axis + 1 :])
        slab = min(choice.window[axis], length)
        found = sweep_work(tiling, tile, axis, slab, chunks, unit)
        if found.time <= LOSS * choice.work.time and found.memory <= GAIN * choice.work.memory:
            window = (*choice.window[:axis], slab, *choice.window[axis + 1 :])
            return replace(choice, tile=tile, window=window, work=found)
        length *= 2
    return choice


def _windows(tiling: Tiling, room: Shape) -> Iterator[Shape]:
    """Yield windows from small to large: cubes on the lattice, cut to the room there is."""
    if tiling.profile.fixed:
        yield tuple(ceil_to(n, s) for n, s in zip(room, tiling.step, strict=True))
        return
    last: Shape = ()
    for edge in (base * 2**power for power in range(4, 60) for base in (1, 1.5)):
        window = tuple(
            min(ceil_to(int(edge), step), ceil_to(n, step))
            for n, step in zip(room, tiling.step, strict=True)
        )
        if window != last:
            yield window
        last = window
        if all(w >= n for w, n in zip(window, room, strict=True)):
            return


def _tiles(tiling: Tiling, unit: Shape, window: Shape) -> Iterator[Shape]:
    """Yield tiles for a window, from small to large: whole write units, whole windows."""
    last: Shape = ()
    for times in (1, 2, 4, 8):
        tile = tuple(
            min(times * max(u, w // u * u), ceil_to(n, u)) if axis >= tiling.leading else u
            for axis, (u, w, n) in enumerate(zip(unit, window, tiling.shape, strict=True))
        )
        if tile == last:
            return
        last = tile
        yield tile


def floor_work(tiling: Tiling) -> int:
    """Return the multiply-adds of one pass over the whole mirrored volume."""
    size = tiling.box.shape
    planes = math.prod(tiling.shape[: tiling.leading])
    if not tiling.profile.fixed:
        return planes * tiling.cost(size).multiply_adds
    one = tiling.profile.smallest
    share = tiling.cost(one).multiply_adds / math.prod(one)
    return int(planes * share * math.prod(size))


def describe_bytes(count: float) -> str:
    """Return a number of bytes as people say it.

    >>> describe_bytes(1_500_000_000)
    '1.5 GB'
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    place = min(int(math.log10(count)) // 3, len(units) - 1) if count >= 1 else 0
    return f"{count / 1000**place:.3g} {units[place]}"
