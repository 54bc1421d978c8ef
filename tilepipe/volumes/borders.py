"""Regions that reach outside a volume, which goes on there mirrored, or as zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from tilepipe.geometry import Region, mirror

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.geometry import Shape


class Readable(Protocol):
    """What regions are read of: a volume, or one whose chunks are kept."""

    @property
    def shape(self) -> Shape: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype[np.generic]: ...  # noqa: D102
    def read(self, region: Region) -> NDArray[np.generic]: ...  # noqa: D102


def read_mirrored(volume: Readable, region: Region) -> NDArray[np.generic]:
    """Return the voxels of a region that may reach outside the volume, which goes on mirrored.

    Only the voxels that are needed are read, once. Law: equals the same region of the whole
    volume grown by ``numpy.pad(mode="reflect")``, repeated as often as needed.
    """
    if region.size == 0:
        return np.zeros((volume.channels, *region.shape), dtype=volume.dtype)
    places = [mirror(*ends) for ends in zip(region.start, region.stop, volume.shape, strict=True)]
    box = Region(tuple(int(p.min()) for p in places), tuple(int(p.max()) + 1 for p in places))
    voxels = volume.read(box)
    for axis, (place, origin) in enumerate(zip(places, box.start, strict=True), start=1):
        indices = place - origin
        if not np.array_equal(indices, np.arange(voxels.shape[axis])):
            voxels = np.take(voxels, indices, axis=axis)
    return voxels


def read_zero_padded(volume: Readable, region: Region) -> NDArray[np.generic]:
    """Return the voxels of a region that may reach outside the volume, which goes on as zeros."""
    inside = region.intersect(Region.whole(volume.shape))
    if inside == region:
        return volume.read(region)
    voxels = np.zeros((volume.channels, *region.shape), dtype=volume.dtype)
    if inside.size:
        voxels[(slice(None), *inside.within(region.start))] = volume.read(inside)
    return voxels
