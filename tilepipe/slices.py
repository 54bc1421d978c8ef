"""Regions as they are spelled: ``20:24,:,-256:``."""

from __future__ import annotations

import re

from tilepipe.errors import BadRequest, comma
from tilepipe.geometry import Region, Shape


def parse_region(text: str, shape: Shape, *, name: str = "region") -> Region:
    """Return the region of a volume of ``shape`` that slices with commas spell, one per axis.

    Ends may be left out or count from the end, as in Python. BadRequest, with ``name`` as the
    argument, for other text, other axes than the volume's, or a region that is empty or outside.

    >>> str(parse_region("20:24,:,-256:", (24, 512, 512)))
    '20:24,0:512,256:512'
    """
    parts = text.replace(" ", "").split(",")
    found = [re.fullmatch(r"(-?\d+)?:(-?\d+)?", part) for part in parts]
    if len(parts) != len(shape) or None in found:
        raise BadRequest(
            f"{name} (={text}) must be slices for each of the {len(shape)} axes of the volume,"
            f" {comma(shape)}; as in {','.join(['0:16', *[':'] * (len(shape) - 1)])}"
        )
    start, stop = [], []
    for match, length in zip(found, shape, strict=True):
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
