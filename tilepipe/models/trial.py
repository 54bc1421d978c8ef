"""A trial of windows: what a network gives them, against one pass over a larger image of noise.

Windows are exact where the answer moves with the image by whole steps and does not depend on the
size of what the network is given. A graph says so by arithmetic; of a network whose graph cannot
be read it is tried, along each axis, with the very windows that tiles are computed in.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilepipe.geometry import Shape, ceil_to
from tilepipe.models.windows import Span, Windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile

LEAST = 16
"""Voxels along an axis that a window of a trial answers for, at least."""
TOLERANCE = {torch.float64: 1e-6}
"""Of the answer's range: differences that rounding makes in single precision, at most."""
ROUNDING = 1e-4
"""The same of a network that does not run in double precision."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of comparing windows with one pass."""

    voxels: int
    """Values that were compared in all, of channels that vary."""
    difference: float
    """The largest difference, of its channel's range."""
    tolerance: float
    refused: str = ""
    """Why there is nothing to compare, else empty."""

    @property
    def trouble(self) -> str:
        """Why windows are not exact, or not known to be; else empty."""
        if self.refused or not self.voxels:
            return f"windows could not be compared with one pass: {self.refused or 'no voxel'}"
        if self.difference <= self.tolerance:
            return ""
        return (
            f"windows differ from one pass by {self.difference:.2g} of the range, tried on"
            f" {self.voxels} voxels of noise: the answer depends on the size or the place of"
            " what the network is given"
        )


def try_windows(model: Model, profile: Profile, limit: Shape | None = None) -> Trial:
    """Compare windows with one pass along each axis; with ``limit`` at the network's own border.

    A size like that of ``limit`` is tried, as far off the lattice as it is.
    """
    network = _doubled(model, profile.smallest)
    dtype = torch.float64 if network is not model.module else model.dtype
    tolerance = TOLERANCE.get(dtype, ROUNDING)
    voxels, difference = 0, 0.0
    for axis in range(profile.axes):
        compared, largest = 0, 0.0
        for scale, shift in ((1.0, 0.0), (2.0, -1.0), (200.0, 0.0), (200.0, -100.0)):
            try:
                pairs = _pairs(network, model.channels, profile, axis, limit, dtype, scale, shift)
                compared, largest = _compare(pairs)
            except Exception as error:  # whatever the network's own code raises
                line = next(iter(str(error).splitlines()), type(error).__name__)
                return Trial(voxels, difference, tolerance, f"it refuses the sizes ({line})")
            if compared:
                break
        if not compared:
            return Trial(
                voxels, difference, tolerance, "its answer to noise is the same everywhere"
            )
        voxels, difference = voxels + compared, max(difference, largest)
    return Trial(voxels, difference, tolerance)


def _doubled(model: Model, shape: Shape) -> nn.Module:
    """Return the network in double precision, which shows small differences, if it runs so."""
    network = model.in_double()
    try:
        with torch.no_grad():
            network(torch.zeros((1, model.channels, *shape), dtype=torch.float64))
    except RuntimeError:  # types that are written down in the network's code
        return model.module
    return network


Pair = tuple[Tensor, Tensor]
"""The same voxels, of a window and of the one pass."""


def _pairs(
    network: nn.Module,
    channels: int,
    profile: Profile,
    axis: int,
    limit: Shape | None,
    dtype: torch.dtype,
    scale: float,
    shift: float,
) -> Iterator[Pair]:
    """Yield what windows along an axis answer for, and the same of one pass."""
    start, length, spans = _spans(profile, axis, limit)
    sizes = [
        n if profile.fixed else profile.accepted(a, profile.lead[a] + s + profile.context.after[a])
        for a, (n, s) in enumerate(zip(profile.smallest, profile.context.step, strict=True))
    ]
    sizes[axis] = length
    noise = torch.Generator().manual_seed(0)
    image = torch.rand((1, channels, *sizes), generator=noise, dtype=torch.float64)
    image = (image * scale + shift).to(dtype)
    offset, dim = profile.offset[axis], 2 + axis

    def run(a: int, b: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = network(image.narrow(dim, a - start, b - a))
        return out.to(torch.float64)

    if profile.fixed:  # one pass is a window, too: two of them that lie a step apart are compared
        first, second = spans
        place, kept = first.keep_from - offset, first.keep_to - first.keep_from
        yield (
            run(first.read_from, first.read_to).narrow(dim, place - first.read_from, kept),
            run(second.read_from, second.read_to).narrow(dim, place - second.read_from, kept),
        )
        return
    whole = run(start, start + length)
    for span in spans:
        place, kept = span.keep_from - offset, span.keep_to - span.keep_from
        yield (
            run(span.read_from, span.read_to).narrow(dim, place - span.read_from, kept),
            whole.narrow(dim, place - start, kept),
        )


def _spans(profile: Profile, axis: int, limit: Shape | None) -> tuple[int, int, list[Span]]:
    """Return where the one pass begins along an axis, its length, and the windows inside it."""
    step, lead, after = (
        profile.context.step[axis], profile.lead[axis], profile.context.after[axis]
    )  # fmt: skip
    if profile.fixed:
        size = profile.smallest[axis]
        last = (size - after) // step * step
        spans = [Span(n, n + size, lead + step, last) for n in (0, step)]
        return 0, size + step, spans
    part = ceil_to(LEAST, step)
    if limit is None:
        length = 3 * part + 2 * step
        spans = _alternating(profile, axis, part, length, None)
        return -lead, profile.accepted(axis, lead + length + after), spans
    least = ceil_to(lead + after, step) + 4 * part + 2 * step
    length = min(limit[axis], least + (limit[axis] - least) % step)
    return 0, length, _alternating(profile, axis, part, length, (length,) * profile.axes)


def _alternating(
    profile: Profile, axis: int, part: int, length: int, limit: Shape | None
) -> list[Span]:
    """Return windows of two sizes by turns, so that nothing but the step divides where they begin.

    What repeats every few steps, such as a pattern of columns, would be alike in windows of one.
    """
    spans: list[Span] = []
    start, sizes = 0, itertools.cycle((part + profile.context.step[axis], part))
    while start < length:
        size = next(sizes)
        stop = min(length, start + size)
        spans += Windows(profile, (size,) * profile.axes, limit).along(axis, start, stop)
        start = stop
    return spans


def _compare(pairs: Iterator[Pair]) -> tuple[int, float]:
    """Return how many values were compared, of channels that vary, and the largest difference.

    A channel that is the same everywhere shows nothing, unless it differs.
    """
    voxels, largest = 0, 0.0
    for window, whole in pairs:
        if whole.numel() == 0:
            continue
        count = whole[0, 0].numel()
        for window_channel, whole_channel in zip(
            window[0].flatten(1), whole[0].flatten(1), strict=True
        ):
            spread = float(whole_channel.max() - whole_channel.min())
            size = float(whole_channel.abs().max())
            differs = float((window_channel - whole_channel).abs().max())
            if not math.isfinite(differs):
                return voxels + count, math.inf
            varies = spread > 1e-12 * size
            voxels += count if varies else 0
            if not varies and differs <= 1e-9 * max(size, 1.0):
                continue
            largest = max(largest, differs / (spread if varies else max(size, 1.0)))
    return voxels, largest
