"""Context and step of a network whose graph cannot be read, found by NaN propagation.

A NaN at one input voxel makes NaN of every output voxel that reads it, whatever the weights. It
is placed at every phase of the lattice. A network through which NaN spreads over everything has
no finite context.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest
from tilepipe.geometry import Context, Shape

if TYPE_CHECKING:
    from tilepipe.model import Model

LARGEST = {2: 2048, 3: 256}
"""Sides of the largest image that is probed, by the number of axes."""
PHASES = 32
"""Steps longer than this are not looked for where the network accepts every size."""

Reach = tuple[Shape, Shape]
"""First and last output voxel, per axis, that read the probed voxel; counted from it."""


def probe(model: Model) -> tuple[Shape, Shape, Context, tuple[str, ...]]:
    """Return size, shrink, context and troubles of a network, from running it on the CPU.

    The size is one on the network's lattice. Raises `BadRequest` where it runs at no size.
    """
    for base in (64, 128, 256, 512, 1024, 2048):
        if base > LARGEST[model.axes]:
            break
        sizes = _accepted(model, base)
        if not sizes:
            continue
        shrink, size = sizes[0]
        period = math.gcd(*(b - size for _, b in sizes)) or 1
        if found := _reaches(model, size, period):
            return _context(model, size, (shrink,) * model.axes, found, period)
    if not (sizes := _accepted(model, 64)):
        raise BadRequest(
            f"model (={model.path}) runs on no input of {model.channels} channels:"
            f" {model.refusal((64,) * model.axes)}"
        )
    shrink, size = sizes[0]
    period = math.gcd(*(b - size for _, b in sizes)) or 1
    guess = Context(*(((n,) * model.axes) for n in (0, 0, period)))
    trouble = f"a single voxel reaches all of {LARGEST[model.axes]} voxels per axis: no context"
    return (size,) * model.axes, (shrink,) * model.axes, guess, (trouble,)


def _accepted(model: Model, base: int) -> list[tuple[int, int]]:
    """Return (shrink, size) of the sizes from ``base`` on that run, the least shrink first.

    Sizes that give more than they take are between those of the lattice: they come last.
    """
    found = []
    for size in range(base, base + PHASES * 2):
        out = model.output_shape((size,) * model.axes)
        if out is not None and min(out) > 0:
            found.append((size - out[0], size))
    return sorted(found, key=lambda pair: (pair[0] < 0, pair))


def _reaches(model: Model, size: int, period: int) -> list[Reach] | None:
    """Return the reach of an input voxel at successive phases; None where it meets the border."""
    reaches = []
    for phase in range(2 * (period if period > 1 else PHASES)):
        place = (size // 2 + phase - PHASES // 2,) * model.axes
        image = torch.zeros((1, model.channels, *(size,) * model.axes), dtype=model.dtype)
        index: tuple[int | slice, ...] = (0, slice(None), *place)
        image[index] = torch.nan
        with torch.no_grad():
            spoiled = model.module(image)[0].isnan().any(dim=0)
        lows, highs = [], []
        for axis in range(model.axes):
            others = tuple(a for a in range(model.axes) if a != axis)
            rows = spoiled.any(dim=others).nonzero().flatten().tolist()
            if not rows:
                raise BadRequest(f"model (={model.path}) hides NaN: its context cannot be probed")
            if rows[0] == 0 or rows[-1] == spoiled.shape[axis] - 1:
                return None
            lows.append(rows[0] - place[axis])
            highs.append(rows[-1] - place[axis])
        reaches.append((tuple(lows), tuple(highs)))
    return reaches


def _context(
    model: Model, size: int, shrink: Shape, reaches: list[Reach], period: int
) -> tuple[Shape, Shape, Context, tuple[str, ...]]:
    """Read step and context from the reach of the voxels at successive phases."""
    first = size // 2 - PHASES // 2
    steps, before, after = [], [], []
    for axis in range(model.axes):
        pattern = [(lo[axis], hi[axis]) for lo, hi in reaches]
        half = len(pattern) // 2
        repeats = (t for t in range(1, half + 1) if pattern[t:] == pattern[:-t])
        step = math.lcm(next(repeats, half), period)
        offset = shrink[axis] // 2
        lead, tail = offset, shrink[axis] - offset  # consumed, even if nothing reads it
        for place, (lo, hi) in enumerate(pattern, start=first):
            last_tile = (place + hi) // step
            first_tile = (place + lo) // step
            lead = max(lead, last_tile * step + offset - place)
            tail = max(tail, place + 1 - (first_tile + 1) * step - offset)
        steps.append(step)
        before.append(lead)
        after.append(tail)
    context = Context(tuple(before), tuple(after), tuple(steps))
    troubles: tuple[str, ...] = ()
    if not _shifts(model, size, context):
        troubles = (f"shifting the image by {context.step} voxels changes the answer: no lattice",)
    return (size,) * model.axes, shrink, context, troubles


def _shifts(model: Model, size: int, context: Context) -> bool:
    """Check on noise that moving the image by a step moves the answer, away from the borders."""
    step = context.step
    noise = torch.Generator().manual_seed(0)
    shape = (1, model.channels, *(size + s for s in step))
    image = torch.rand(shape, generator=noise, dtype=torch.float32).to(model.dtype)
    inner = (slice(None), slice(None))
    here = image[(*inner, *(slice(0, size) for _ in step))]
    moved = image[(*inner, *(slice(s, s + size) for s in step))]
    with torch.no_grad():
        one, two = model.module(here), model.module(moved)
    core_one = one[(*inner, *(slice(b + s, -a - s) for b, a, s in _margins(context)))]
    core_two = two[(*inner, *(slice(b, -a - 2 * s) for b, a, s in _margins(context)))]
    if core_one.numel() == 0:
        return True
    spread = float(one.max() - one.min()) or 1.0
    return float((core_one - core_two).abs().max()) < 1e-4 * spread


def _margins(context: Context) -> list[tuple[int, int, int]]:
    """Return per axis the rows to leave out before and after, whole steps, and the step."""
    return [
        (-(-b // s) * s, -(-a // s) * s + s, s)
        for b, a, s in zip(context.before, context.after, context.step, strict=True)
    ]
