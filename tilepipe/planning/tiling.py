"""The sizes that cost least: windows, tiles and write units, by work and within memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.geometry import Shape, ceil_to
from tilepipe.planning.costs import Tiling, Work, sweep_work, tile_work
from tilepipe.text import describe_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


SLABS = {2: (32, 64, 128, 256, 512, 1024), 3: (8, 16, 32, 64, 128)}
"""Rows of a slab that are tried, by the network's axes."""
GAIN = 1.005
"""A choice that takes more memory must save at least this much time."""
LOSS = 1.01
"""Time that shorter tiles may take: they are what is lost where one fails, and what is shown."""


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
    boxes, least_of_boxes, sweeps, least_of_sweeps = list[Choice](), None, list[Choice](), None
    if strategy != "sweep":
        boxes, least_of_boxes = _boxes(tiling, unit, chunks, memory, tile)
    if strategy != "direct":
        sweeps, least_of_sweeps = _sweeps(tiling, unit, chunks, memory, tile)
    if not (boxes or sweeps):
        needed = min(w.memory for w in (least_of_boxes, least_of_sweeps) if w is not None)
        raise BadRequest(
            f"memory (={describe_bytes(memory)}) must hold the {'' if tile else 'smallest '}tile"
            f" (={describe_bytes(needed)}); give more with --memory"
            + (" or a smaller --tile" if tile else "")
        )
    best = _cheapest(boxes + sweeps)
    assert best is not None
    other = _cheapest(boxes if best.sweep is not None else sweeps)
    if best.sweep is not None and tile is None:
        best = _shortened(tiling, unit, chunks, best)
    return replace(best, why=_compared(best, other))


def _cheapest(choices: Sequence[Choice]) -> Choice | None:
    """Return the choice of least memory among those of next to least time."""
    least = min((choice.work.time for choice in choices), default=0.0)
    paying = [choice for choice in choices if choice.work.time <= GAIN * least]
    return min(paying, key=lambda choice: choice.work.memory, default=None)


def _compared(best: Choice, other: Choice | None) -> str:
    """Return how the other strategy compares with the best choice, in words."""
    name = "tiles computed at once" if best.sweep is not None else "a sweep"
    if other is None:
        return f"{name} cannot be had with these options and this memory"
    return (
        f"{name} would take {other.work.time / best.work.time:.2f} times as long and"
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
        for candidate in [tile] if tile else _tiles(tiling, unit, window):
            work = tile_work(tiling, candidate, size, chunks)
            if smallest is None or work.memory < smallest.memory:
                smallest = work
            if work.memory > memory:
                break
            fitting.append(Choice(candidate, size, None, work))
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
            work = sweep_work(tiling, cross, axis, slab, chunks, unit)
            if smallest is None or work.memory < smallest.memory:
                smallest = work
            if work.memory > memory:
                break
            window = (*cross[:axis], slab, *cross[axis + 1 :])
            fitting.append(Choice(cross, window, axis, work))
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
        work = sweep_work(tiling, tile, axis, slab, chunks, unit)
        if work.time <= LOSS * choice.work.time and work.memory <= GAIN * choice.work.memory:
            window = (*choice.window[:axis], slab, *choice.window[axis + 1 :])
            return replace(choice, tile=tile, window=window, work=work)
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
