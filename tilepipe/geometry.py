"""Boxes of voxels and how a volume is cut into them: integers only, no arrays of voxels.

All coordinates are voxel indices in the order of the volume's spatial axes (``z y x`` or
``y x``), without the channel axis. Intervals are half-open.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.text import comma

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open box of voxels in volume coordinates; it may reach outside the volume.

    >>> region = Region((0, 8), (4, 10))
    >>> region.shape, region.size, str(region)
    ((4, 2), 8, '0:4,8:10')
    """

    start: Shape
    """First voxel of each axis; negative where the region reaches before the volume."""
    stop: Shape
    """One past the last voxel of each axis; equal to ``start`` where the region is empty."""

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(
            a > b for a, b in zip(self.start, self.stop, strict=False)
        ):
            raise ValueError(f"region start (={self.start}) must not lie past stop (={self.stop})")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return the region of a volume of this ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        """Voxels along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Voxels in the box."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index into an array whose first voxel is the volume's first voxel."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, before: Sequence[int], after: Sequence[int]) -> Region:
        """Return the region with ``before`` and ``after`` voxels added on each axis."""
        return Region(
            tuple(a - n for a, n in zip(self.start, before, strict=True)),
            tuple(b + n for b, n in zip(self.stop, after, strict=True)),
        )

    def shift(self, by: Sequence[int]) -> Region:
        """Return the region moved by so many voxels along each axis.

        >>> str(Region((0, 2), (4, 6)).shift((10, -2)))
        '10:14,0:4'
        """
        return Region(
            tuple(a + n for a, n in zip(self.start, by, strict=True)),
            tuple(b + n for b, n in zip(self.stop, by, strict=True)),
        )

    def intersect(self, other: Region) -> Region:
        """Return the common box; where there is none, an empty region.

        >>> Region((0,), (5,)).intersect(Region((3,), (9,)))
        Region(start=(3,), stop=(5,))
        """
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Region(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def within(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Return the region as an index into an array whose first voxel lies at ``origin``.

        >>> Region((4, 6), (8, 9)).within((4, 4))
        (slice(0, 4, None), slice(2, 5, None))
        """
        return tuple(
            slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True)
        )

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class Context:
    """What a network consumes round an output region that begins and ends on its lattice.

    The paper's U-Net (arXiv:1505.04597) needs 92 voxels before, 96 after, on a step of 16.
    """

    before: Shape
    """Input voxels needed before the first output voxel, per axis."""
    after: Shape
    """Input voxels needed after the last output voxel, per axis."""
    step: Shape
    """Output regions begin on multiples of this, per axis, or the answer changes."""

    def with_leading(self, axes: int) -> Context:
        """Return the context with ``axes`` axes in front along which the network is not run.

        >>> Context((92, 92), (96, 96), (16, 16)).with_leading(1)
        Context(before=(0, 92, 92), after=(0, 96, 96), step=(1, 16, 16))
        """
        return Context((0,) * axes + self.before, (0,) * axes + self.after, (1,) * axes + self.step)


@dataclass(frozen=True, slots=True)
class Tile:
    """The unit of work, of retry and of commit."""

    index: int
    """Place in the grid, counted along the last axis first; names the tile in the ledger."""
    write: Region
    """What the tile answers for: whole write units, clipped to the volume."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """All tiles of a volume.

    Law: the union of all tiles' write regions covers every voxel exactly once.

    >>> grid = TileGrid(shape=(100, 60), tile=(64, 32))
    >>> len(grid), grid.counts
    (4, (2, 2))
    >>> grid[3]
    Tile(index=3, write=Region(start=(64, 32), stop=(100, 60)))
    """

    shape: Shape
    """Voxels of the volume, per axis."""
    tile: Shape
    """Voxels of a tile that is not cut off by the volume's end, per axis."""

    @property
    def counts(self) -> Shape:
        """Tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.shape, self.tile, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < len(self):
            raise IndexError(f"tile (={index}) must lie in 0:{len(self)}")
        place, rest = [], index
        for count in reversed(self.counts):
            rest, along = divmod(rest, count)
            place.append(along)
        start = tuple(p * t for p, t in zip(reversed(place), self.tile, strict=True))
        stop = tuple(min(a + t, n) for a, t, n in zip(start, self.tile, self.shape, strict=True))
        return Tile(index, Region(start, stop))

    def __iter__(self) -> Iterator[Tile]:
        return (self[index] for index in range(len(self)))


def mirror(start: int, stop: int, length: int) -> NDArray[np.intp]:
    """Return where the mirrored axis takes its voxels ``start:stop`` from, each in ``0:length``.

    Reflection does not repeat the edge voxel and goes on for ever, as
    ``numpy.pad(mode="reflect")``; an axis of length 1 repeats its voxel.

    >>> mirror(-3, 6, 4).tolist()
    [3, 2, 1, 0, 1, 2, 3, 2, 1]
    >>> mirror(-2, 3, 1).tolist()
    [0, 0, 0, 0, 0]
    """
    if length == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (length - 1)
    place = np.arange(start, stop, dtype=np.intp) % period
    return np.where(place < length, place, period - place)


def ceil_to(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``.

    >>> ceil_to(17, 16), ceil_to(-5, 4)
    (32, -4)
    """
    return -(-value // multiple) * multiple


def halved(region: Region, unit: Shape, times: int, axis: int | None = None) -> list[Region]:
    """Return the parts of a tile that is halved so often, across its widest axis but ``axis``.

    Parts begin on multiples of ``unit`` from the tile's start; what is one unit wide stays.

    >>> [str(part) for part in halved(Region((0, 0), (512, 1000)), (64, 64), 1, axis=0)]
    ['0:512,0:512', '0:512,512:1000']
    >>> len(halved(Region((0, 0), (512, 1000)), (64, 1000), 3, axis=0))
    1
    """
    parts = [region]
    for _ in range(times):
        shape = parts[0].shape
        wide = [a for a, n in enumerate(shape) if a != axis and n > unit[a]]
        if not wide:
            break
        across = max(wide, key=lambda a: shape[a])
        size = ceil_to(-(-shape[across] // 2), unit[across])
        parts = [half for part in parts for half in _cut(part, across, size)]
    return parts


def _cut(region: Region, axis: int, size: int) -> list[Region]:
    place = region.start[axis] + size
    if place >= region.stop[axis]:
        return [region]
    stop = (*region.stop[:axis], place, *region.stop[axis + 1 :])
    start = (*region.start[:axis], place, *region.start[axis + 1 :])
    return [Region(region.start, stop), Region(start, region.stop)]


def parse_region(text: str, shape: Shape, *, name: str = "region") -> Region:
    """Return the region of a volume of ``shape`` that slices with commas spell, one per axis.

    Ends may be left out or count from the end, as in Python. BadRequest, with ``name`` as the
    argument, for other text, other axes than the volume's, or a region that is empty or outside.

    >>> str(parse_region("20:24,:,-256:", (24, 512, 512)))
    '20:24,0:512,256:512'
    """
    parts = text.replace(" ", "").split(",")
    matches = [re.fullmatch(r"(-?\d+)?:(-?\d+)?", part) for part in parts]
    if len(parts) != len(shape) or None in matches:
        raise BadRequest(
            f"{name} (={text}) must be slices for each of the {len(shape)} axes of the volume,"
            f" {comma(shape)}; as in {','.join(['0:16', *[':'] * (len(shape) - 1)])}"
        )
    start, stop = [], []
    for match, length in zip(matches, shape, strict=True):
        assert match is not None
        first, last = (int(end) if end else None for end in match.groups())
        a = 0 if first is None else first + length * (first < 0)
        b = length if last is None else last + length * (last < 0)
        if not 0 <= a < b <= length:
            raise BadRequest(
                f"{name} (={text}) must hold voxels and lie inside the volume, {comma(shape)}"
            )
        start.append(a)
        stop.append(b)
    return Region(tuple(start), tuple(stop))


def outside(box: Region, hole: Region) -> list[Region]:
    """Return boxes that cover what of ``box`` lies outside ``hole``, each voxel once.

    >>> [str(part) for part in outside(Region.whole((8, 9)), Region((2, 0), (4, 5)))]
    ['0:2,0:9', '4:8,0:9', '2:4,5:9']
    """
    hole = box.intersect(hole)
    if not hole.size:
        return [box]
    parts = []
    for axis in range(len(box.start)):
        for a, b in ((box.start[axis], hole.start[axis]), (hole.stop[axis], box.stop[axis])):
            if a < b:
                start, stop = list(box.start), list(box.stop)
                start[axis], stop[axis] = a, b
                parts.append(Region(tuple(start), tuple(stop)))
        start, stop = list(box.start), list(box.stop)
        start[axis], stop[axis] = hole.start[axis], hole.stop[axis]
        box = Region(tuple(start), tuple(stop))
    return parts


@dataclass(frozen=True, slots=True)
class Blocks:
    """The parts of a region that lie in one block of chunks each, of about a million voxels.

    >>> whole = Blocks.of((4000, 700), (512, 700), Region((100, 0), (2000, 700)))
    >>> len(whole), [str(block) for block in whole]
    (2, ['100:1024,0:700', '1024:2000,0:700'])
    """

    region: Region
    size: Shape
    """Voxels of a block: whole chunks."""

    @classmethod
    def of(cls, shape: Shape, chunks: Shape, region: Region) -> Blocks:
        """Return the blocks of a region of a volume of this shape."""
        size = list(chunks)
        while math.prod(size) < 2**19:
            grow = [axis for axis, n in enumerate(shape) if size[axis] < n]
            if not grow:
                break
            axis = min(grow, key=lambda a: size[a])
            size[axis] *= 2
        return cls(region, tuple(size))

    @property
    def _first(self) -> Shape:
        return tuple(a // n for a, n in zip(self.region.start, self.size, strict=True))

    @property
    def _counts(self) -> Shape:
        ends = zip(self._first, self.region.stop, self.size, strict=True)
        return tuple(-(-b // n) - a for a, b, n in ends)

    def __len__(self) -> int:
        return math.prod(self._counts)

    def __getitem__(self, number: int) -> Region:
        if not 0 <= number < len(self):
            raise IndexError(f"block (={number}) must lie in 0:{len(self)}")
        place = np.unravel_index(number, self._counts)
        ends = zip(place, self._first, self.size, strict=True)
        start = tuple((int(p) + a) * n for p, a, n in ends)
        stop = tuple(a + n for a, n in zip(start, self.size, strict=True))
        return Region(start, stop).intersect(self.region)

    def __iter__(self) -> Iterator[Region]:
        return (self[number] for number in range(len(self)))
