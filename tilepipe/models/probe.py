"""Context and step of a network whose graph cannot be read, found by NaN propagation.

A NaN at one input voxel makes NaN of every output voxel that reads it, whatever the weights. It
is placed at every phase of the lattice. A network through which NaN spreads over everything has
no finite context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest
from tilepipe.geometry import Context, Shape
from tilepipe.text import comma

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tilepipe.models.model import Model

LARGEST = {2: 2048, 3: 256}
"""Sides of the largest image that is probed, by the number of axes."""
PHASES = 32
"""Steps longer than this are not looked for where the network accepts every size."""

HIDDEN = "it hides NaN, by which its context is measured"
"""Why there is no context to be had of a network that makes numbers of NaN."""

Reach = tuple[Shape, Shape]
"""First and last output voxel, per axis, that read the probed voxel; counted from it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What NaN shows of a network at one size of its input."""

    shape: Shape
    """An input size on the network's lattice."""
    shrink: Shape
    step: Shape
    reaches: tuple[Reach, ...]
    """Of a voxel at successive places; empty where there is no finite context."""
    trouble: str
    """Why there is no finite context, else empty."""

    def context(self, step: Shape) -> Context:
        """Return the context of tiles on a lattice of ``step``, a multiple of the network's own."""
        before, after = [], []
        for axis, (size, wide, own) in enumerate(zip(self.shape, step, self.step, strict=True)):
            pattern = [(lo[axis], hi[axis]) for lo, hi in self.reaches]
            offset, first = self.shrink[axis] // 2, _first(size)
            lead, tail = offset, self.shrink[axis] - offset  # consumed, even if nothing reads it
            for number in range(max(wide, len(pattern)) if pattern else 0):
                place, (lo, hi) = first + number, pattern[number % own]
                last_tile = (place + hi) // wide
                first_tile = (place + lo) // wide
                lead = max(lead, last_tile * wide + offset - place)
                tail = max(tail, place + 1 - (first_tile + 1) * wide - offset)
            before.append(lead)
            after.append(tail)
        return Context(tuple(before), tuple(after), step)


def probe(model: Model) -> Probe:
    """Return what NaN shows of a network, from running it on the CPU.

    Raises `BadRequest` where it runs at no size.
    """
    tried: list[tuple[Shape, Shape, int]] = []
    trouble = ""
    for shape, shrink, period in _candidates(model):
        tried.append((shape, shrink, period))
        reaches, trouble = _reaches(model, shape, period)
        if reaches:
            return _read(shape, shrink, period, reaches)
        if trouble == HIDDEN:
            break
    if not tried:
        raise BadRequest(
            f"model (={model.path}) runs on no input of {model.channels} channels:"
            f" {model.refusal((64,) * model.axes)}"
        )
    shape, shrink, period = tried[0]
    return Probe(shape, shrink, (period,) * model.axes, (), trouble)


def _candidates(model: Model) -> Iterator[tuple[Shape, Shape, int]]:
    """Yield sizes that the network accepts, what it consumes there, and the step between them."""
    if model.fixed:
        out = model.output_shape(model.fixed) or model.fixed
        yield model.fixed, tuple(a - b for a, b in zip(model.fixed, out, strict=True)), 1
        return
    largest, some = LARGEST[model.axes], False
    for base in (64, 128, 256, 512, 1024, 2048):
        if base <= largest and (sizes := _accepted(model, range(base, base + PHASES * 2))):
            some = True
            yield _chosen(model, sizes)
    if not some and (sizes := _accepted(model, model.sizes)):
        yield _chosen(model, sizes)


def _chosen(model: Model, sizes: list[tuple[int, int]]) -> tuple[Shape, Shape, int]:
    shrink, size = sizes[0]
    period = math.gcd(*(b - size for _, b in sizes)) or 1
    return (size,) * model.axes, (shrink,) * model.axes, period


def _accepted(model: Model, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (shrink, size) of those of the ``sizes`` that run, the least shrink first.

    Sizes that give more than they take are between those of the lattice: they come last.
    """
    sizes_by_shrink = []
    for size in sizes:
        out = model.output_shape((size,) * model.axes)
        if out is not None and min(out) > 0:
            sizes_by_shrink.append((size - out[0], size))
    return sorted(sizes_by_shrink, key=lambda pair: (pair[0] < 0, pair))


def _first(size: int) -> int:
    """Return the first place along an axis at which NaN is put."""
    return max(size // 2 - PHASES // 2, 0)


def _reaches(model: Model, shape: Shape, period: int) -> tuple[tuple[Reach, ...], str]:
    """Return the reach of an input voxel at successive phases, or why there is none.

    Where it meets the border, a larger image may show one.
    """
    reaches = []
    for phase in range(2 * (period if period > 1 else PHASES)):
        place = tuple(_first(n) + phase for n in shape)
        if any(n <= p for n, p in zip(shape, place, strict=True)):
            return (), f"its only size (={comma(shape)}) is too small to measure its context in"
        image = torch.zeros((1, model.channels, *shape), dtype=model.dtype)
        index: tuple[int | slice, ...] = (0, slice(None), *place)
        image[index] = torch.nan
        with torch.no_grad():
            spoiled = model.module(image)[0].isnan().any(dim=0)
        lows, highs = [], []
        for axis in range(model.axes):
            others = tuple(a for a in range(model.axes) if a != axis)
            rows = spoiled.any(dim=others).nonzero().flatten().tolist()
            if not rows:
                return (), HIDDEN
            if rows[0] == 0 or rows[-1] == spoiled.shape[axis] - 1:
                how = "reaches all of" if bool(spoiled.all()) else "reaches the border of"
                return (), f"a single voxel {how} {comma(shape)} voxels: no context"
            lows.append(rows[0] - place[axis])
            highs.append(rows[-1] - place[axis])
        reaches.append((tuple(lows), tuple(highs)))
    return tuple(reaches), ""


def _read(shape: Shape, shrink: Shape, period: int, reaches: tuple[Reach, ...]) -> Probe:
    """Read the step from the reach of the voxels at successive phases."""
    steps, trouble = [], ""
    for axis in range(len(shape)):
        pattern = [(lo[axis], hi[axis]) for lo, hi in reaches]
        repeats = (t for t in range(1, len(pattern) // 2 + 1) if pattern[t:] == pattern[:-t])
        step = next(repeats, None)
        if step is None:
            trouble = f"what a voxel reaches does not repeat within {len(pattern) // 2} voxels"
        steps.append(math.lcm(step or 1, period))
    return Probe(shape, shrink, tuple(steps), () if trouble else reaches, trouble)
