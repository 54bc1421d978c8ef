"""Which boxes of the volume a network is given so that a tile's voxels come out exact.

A window that is given to the network whole begins on its lattice and has a size that it accepts;
what it answers for (``keep``) is far enough from its borders, or lies at the volume's own border.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape, ceil_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilepipe.models.spec import Profile


@dataclass(frozen=True, slots=True)
class Window:
    """One call of the network."""

    read: Region
    """The input, in volume coordinates; outside the volume it is mirrored or zero."""
    keep: Region
    """What the window answers for."""


class Span(NamedTuple):
    """A window along one axis, in voxels of the volume; all ends are half-open."""

    read_from: int
    read_to: int
    keep_from: int
    keep_to: int

    @property
    def size(self) -> int:
        """Voxels that are read."""
        return self.read_to - self.read_from


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows that the network is given whole: on its lattice, of a size that it accepts."""

    profile: Profile
    size: Shape
    """Voxels that one window answers for at most, per axis of the network; multiples of step."""
    limit: Shape | None = None
    """With the network's own boundary: the size of the volume that the network is run on."""

    @property
    def usable(self) -> Shape:
        """Voxels that one window answers for, per axis of the network."""
        profile = self.profile
        if not profile.fixed:
            return self.size
        room = tuple(
            (size - lead - after) // step * step
            for size, lead, after, step in zip(
                profile.smallest, profile.lead, profile.context.after, profile.context.step,
                strict=True,
            )
        )  # fmt: skip
        if min(room) <= 0:
            raise BadRequest(
                f"the program's fixed size (={profile.smallest}) must exceed its context"
                f" (={profile.context.before} before, {profile.context.after} after);"
                " export it with dynamic sizes or with a larger one"
            )
        return room

    def along(self, axis: int, start: int, stop: int) -> list[Span]:
        """Return the windows along one axis of the network, from a start on the lattice."""
        profile, limit = self.profile, self.limit[axis] if self.limit else None
        step, after = profile.context.step[axis], profile.context.after[axis]
        lead, usable, spans = profile.lead[axis], self.usable[axis], []
        while start < stop:
            end = min(stop, start + usable)
            begin = start - lead
            if limit is None:
                size = profile.accepted(axis, lead + ceil_to(end - start, step) + after)
                spans.append(Span(begin, begin + size, start, end))
            else:
                begin = max(0, begin)
                want = ceil_to(end, step) + after - begin
                finish = begin + profile.accepted(axis, want)
                if finish >= limit:
                    finish = limit
                    begin = min(begin, max(0, limit - profile.smallest[axis]) // step * step)
                    if profile.fixed:
                        end = stop
                spans.append(Span(begin, finish, start, end))
            start = end
        return spans


class Cuts(Protocol):
    """How regions of a volume are cut into windows, along the axes of the network."""

    def along(self, axis: int, start: int, stop: int) -> list[Span]:
        """Return the windows along one axis of the network."""


def cut(cuts: Cuts, axes: int, region: Region) -> list[Window]:
    """Return the windows of a region, whose last ``axes`` axes are the network's.

    Along the axes in front of those, every window is one voxel thick. Law: the windows keep each
    voxel of the region exactly once.
    """
    edges = list(zip(region.start, region.stop, strict=True))
    leading = len(edges) - axes
    spans = [[Span(n, n + 1, n, n + 1) for n in range(a, b)] for a, b in edges[:leading]]
    spans += [cuts.along(axis, a, b) for axis, (a, b) in enumerate(edges[leading:])]
    windows = []
    for along in itertools.product(*spans):
        read_from, read_to, keep_from, keep_to = zip(*along, strict=True)
        windows.append(Window(Region(read_from, read_to), Region(keep_from, keep_to)))
    return windows


def read_box(windows: Sequence[Window]) -> Region:
    """Return the box that holds all that the windows read."""
    return Region(
        tuple(map(min, zip(*(w.read.start for w in windows), strict=True))),
        tuple(map(max, zip(*(w.read.stop for w in windows), strict=True))),
    )


def whole(profile: Profile, shape: Shape, limit: Shape | None) -> Region:
    """Return the box of the one pass that the tiles equal: the reference, said exactly.

    With ``limit`` the network's own boundary; else the volume grown by mirroring, before its
    start by the lead, after its end by the context and to the next size that is accepted.
    """
    if limit is not None:
        return Region.whole(limit)
    start = tuple(-lead for lead in profile.lead)
    size = tuple(
        profile.accepted(axis, lead + ceil_to(n, step) + after)
        for axis, (n, lead, step, after) in enumerate(
            zip(shape, profile.lead, profile.context.step, profile.context.after, strict=True)
        )
    )
    return Region(start, tuple(a + n for a, n in zip(start, size, strict=True)))
