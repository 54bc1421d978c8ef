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


def place_on(prediction: Volume, labels: Volume, box: Region | None) -> tuple[Region, Shape] | None:
    """Return the labels' voxels to compare, and which of the prediction's is the first of them.

    ``box`` is the part of the labels that shall be compared; by default all that the prediction
    lies on. None is returned where the metadata do not set the two apart: either says nothing, or
    both begin at the same place. Raises BadRequest for a prediction that lies outside the labels or
    between their voxels.
    """
    move = _offset(prediction, labels)
    if not any(move):
        return None
    extent = Region.whole(prediction.shape).shift(move)
    both = extent.intersect(Region.whole(labels.shape))
    if box is None and both == extent:
        return extent, (0,) * len(move)
    if box is not None and box.intersect(extent) == box:
        return box, tuple(a - b for a, b in zip(box.start, move, strict=True))
    what = "nothing of them" if both.size == 0 else f"{both} of them: give region within that"
    part = "" if box is None else f", of which region (={box}) is asked for,"
    raise BadRequest(
        f"prediction (={prediction.path}) lies at {extent} of the labels{part} by the translations"
        f" of both, and the labels ({labels.path}) are {comma(labels.shape)}: it covers {what}"
    )


def _offset(prediction: Volume, labels: Volume) -> tuple[int, ...]:
    """Return the prediction's first voxel in the labels; zeros where nothing sets them apart."""
    same = (0,) * len(prediction.shape)
    if not (prediction.is_placed and labels.is_placed) or len(prediction.shape) != len(
        labels.shape
    ):
        return same
    stated = any(prediction.translation), any(labels.translation)
    if prediction.translation == labels.translation or (
        prediction.shape == labels.shape and not all(stated)
    ):
        return same  # of two whole volumes one may have lost its place
    sizes = zip(prediction.scale, labels.scale, strict=True)
    alike = all(math.isclose(a, b, rel_tol=1e-3) for a, b in sizes)
    if not alike or prediction.units != labels.units:
        raise BadRequest(
            f"prediction (={prediction.path}) lies at {_in_words(prediction)}, the labels"
            f" ({labels.path}) at {_in_words(labels)}: give both the same scale and units"
        )
    ends = zip(prediction.translation, labels.translation, labels.scale, strict=True)
    voxels = [(a - b) / size for a, b, size in ends]
    for axis, exact in zip(prediction.axes, voxels, strict=True):
        if abs(exact - round(exact)) > NEAR + 1e-6 * abs(exact):
            raise BadRequest(
                f"prediction (={prediction.path}) lies {exact:.6g} voxels from the labels"
                f" ({labels.path}) along {axis}, by the translations of both; it must be a whole"
                " number: mend the metadata of one"
            )
    return tuple(map(round, voxels))


def _in_words(volume: Volume) -> str:
    """Return where a volume lies and how large its voxels are, with their units."""

    def lengths(numbers: tuple[float, ...]) -> str:
        measured = zip(numbers, volume.units, strict=True)
        return ", ".join(f"{number:g} {unit or ''}".strip() for number, unit in measured)

    return f"{lengths(volume.translation)} with voxels of {lengths(volume.scale)}"
