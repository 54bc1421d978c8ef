"""Where a prediction lies on its labels, as the metadata of both say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.text import comma

if TYPE_CHECKING:
    from tilepipe.geometry import Shape
    from tilepipe.volumes.volume import Volume

NEAR = 0.01
"""Voxels that a place may miss a whole voxel by, for rounding."""


def place_on(mine: Volume, theirs: Volume, box: Region | None) -> tuple[Region, Shape] | None:
    """Return the labels' voxels to compare, and which of the prediction's is the first of them.

    ``box`` are the labels' voxels that are asked for; None: all that the prediction lies on. None
    is returned where metadata do not set the two apart: either says nothing, or both begin at the
    same place. Raises BadRequest for a prediction that lies outside or between the voxels.
    """
    move = _offset(mine, theirs)
    if not any(move):
        return None
    there = Region.whole(mine.shape).shift(move)
    both = there.intersect(Region.whole(theirs.shape))
    if box is None and both == there:
        return there, (0,) * len(move)
    if box is not None and box.intersect(there) == box:
        return box, tuple(a - b for a, b in zip(box.start, move, strict=True))
    what = "nothing of them" if both.size == 0 else f"{both} of them: give region within that"
    asked = "" if box is None else f", of which region (={box}) is asked for,"
    raise BadRequest(
        f"prediction (={mine.path}) lies at {there} of the labels{asked} by the translations of"
        f" both, and the labels ({theirs.path}) are {comma(theirs.shape)}: it covers {what}"
    )


def _offset(mine: Volume, theirs: Volume) -> tuple[int, ...]:
    """Return the prediction's first voxel in the labels; zeros where nothing sets them apart."""
    same = (0,) * len(mine.shape)
    if not (mine.is_placed and theirs.is_placed) or len(mine.shape) != len(theirs.shape):
        return same
    stated = any(mine.translation), any(theirs.translation)
    if mine.translation == theirs.translation or (mine.shape == theirs.shape and not all(stated)):
        return same  # of two whole volumes one may have lost its place
    sizes = zip(mine.scale, theirs.scale, strict=True)
    alike = all(math.isclose(one, other, rel_tol=1e-3) for one, other in sizes)
    if not alike or mine.units != theirs.units:
        raise BadRequest(
            f"prediction (={mine.path}) lies at {_said(mine.translation, mine)} with voxels of"
            f" {_said(mine.scale, mine)}, the labels ({theirs.path}) at"
            f" {_said(theirs.translation, theirs)} with voxels of {_said(theirs.scale, theirs)}:"
            " give both the same scale and units"
        )
    ends = zip(mine.translation, theirs.translation, theirs.scale, strict=True)
    voxels = [(a - b) / size for a, b, size in ends]
    for axis, exact in zip(mine.axes, voxels, strict=True):
        if abs(exact - round(exact)) > NEAR + 1e-6 * abs(exact):
            raise BadRequest(
                f"prediction (={mine.path}) lies {exact:.6g} voxels from the labels"
                f" ({theirs.path}) along {axis}, by the translations of both; it must be a whole"
                " number: mend the metadata of one"
            )
    return tuple(map(round, voxels))


def _said(numbers: tuple[float, ...], volume: Volume) -> str:
    return ", ".join(
        f"{number:g} {unit or ''}".strip()
        for number, unit in zip(numbers, volume.units, strict=True)
    )
