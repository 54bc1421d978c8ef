"""Numbering the objects of a mask in volumes larger than memory, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import generate_binary_structure, label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, TileGrid
from tilepipe.instances.blocks import block_of, created_labels, grown_axes
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tilepipe.geometry import Shape
    from tilepipe.instances.blocks import BlockProgress, Foreground, Ids
    from tilepipe.volumes.volume import Volume


def label_components(
    volume: Volume,
    path: str | Path,
    *,
    foreground: Foreground,
    region: Region | None = None,
    per_plane: bool = False,
    block: Shape | None = None,
    progress: BlockProgress | None = None,
) -> int:
    """Write the connected components of a mask, numbered from 1, to an OME-Zarr.

    Law: equals ``scipy.ndimage.label`` of the whole up to renumbering, for any block. Memory is a
    few blocks and the pairs of components that meet where blocks do. What a run that failed has
    written is removed.

    Args:
        volume: The volume that holds the mask.
        path: Where the OME-Zarr of the components is written, with the axes of ``volume``.
        foreground: Is called with voxels ``(channels, *block)`` and returns the mask of that block,
            ``block``; it must judge each voxel by its own values.
        region: The part of the volume that is labelled, in voxels along its axes; the output then
            has the region's shape. By default all.
        per_plane: Whether components lie within one plane, so that voxels do not connect along z.
            They never connect along t.
        block: The voxels along each axis that are read at once; by default about four million in
            all.
        progress: Is called with blocks done and their number.

    Returns:
        The number of components.

    Raises:
        BadRequest: The place is not free, or the region is empty or outside the volume.
        OSError: The volume cannot be read, or the output cannot be written.
    """
    region = Region.whole(volume.shape) if region is None else region
    if region.size == 0 or region.intersect(Region.whole(volume.shape)) != region:
        raise BadRequest(f"region (={region}) must hold voxels, all inside {volume.shape}")
    axes = grown_axes(volume, per_plane)
    structure = _structure(len(volume.axes), axes)
    with created_labels(volume, path, region, block) as target:
        ids = open_volume(path, axes=volume.axes)
        unit = tuple(map(max, target.chunks, volume.chunks)) if block is None else block
        grid = TileGrid(region.shape, block_of(region.shape, target.chunks, unit, block is None))
        firsts, count, pairs = [], 0, [np.zeros((0, 2), np.int64)]
        for done, tile in enumerate(grid, start=1):
            mask = foreground(volume.read(tile.write.shift(region.start)))
            numbers, components = _numbered(mask, structure, count)
            firsts.append(count + 1)
            count += components
            target.write(tile.write, numbers.astype(target.dtype))
            pairs += _meetings(ids, numbers, tile.write, axes)
            if len(pairs) > 64:
                pairs = [np.unique(np.concatenate(pairs), axis=0)]
            if progress is not None:
                progress(done, 2 * len(grid))
        gone, heirs = _heirs(np.unique(np.concatenate(pairs), axis=0))
        for done, tile in enumerate(grid, start=len(grid) + 1):
            if len(gone):
                first, *rest = firsts[tile.index : tile.index + 2]
                own = np.arange(first, rest[0] if rest else count + 1)
                final = np.concatenate(([0], _joined(own, gone, heirs))).astype(target.dtype)
                numbers = ids.read(tile.write)[0].astype(np.int64)
                target.write(tile.write, final[np.maximum(numbers - (first - 1), 0)])
            if progress is not None:
                progress(done, 2 * len(grid))
    return count - len(gone)


def _structure(ndim: int, axes: Sequence[int]) -> NDArray[np.bool_]:
    """Return which of the 3 x 3 (x 3) voxels round a voxel connect to it: through faces."""
    structure = generate_binary_structure(ndim, 1)
    for axis in set(range(ndim)) - set(axes):
        moved: list[slice] = [slice(None)] * ndim
        moved[axis] = slice(None, None, 2)
        structure[tuple(moved)] = False
    return structure


def _numbered(
    mask: NDArray[np.bool_], structure: NDArray[np.bool_], before: int
) -> tuple[Ids, int]:
    numbers = np.zeros(mask.shape, np.int64)
    count = int(label(mask, structure, output=numbers))
    numbers[mask] += before
    return numbers, count


def _meetings(ids: Volume, numbers: Ids, place: Region, axes: Sequence[int]) -> list[Ids]:
    """Return the pairs of numbers that touch across the faces towards earlier blocks.

    What later blocks will write still reads as 0; such a pair is found with the later block.
    """
    pairs = []
    for axis in axes:
        if place.start[axis] == 0:
            continue
        start, stop = list(place.start), list(place.stop)
        start[axis], stop[axis] = start[axis] - 1, start[axis]
        before = ids.read(Region(tuple(start), tuple(stop)))[0].astype(np.int64)
        face = numbers[(slice(None),) * axis + (slice(0, 1),)]
        both = (face != 0) & (before != 0)
        pairs.append(np.unique(np.stack((before[both], face[both]), axis=1), axis=0))
    return pairs


def _heirs(pairs: Ids) -> tuple[Ids, Ids]:
    """Return the numbers that are given up, in order, and the least number joined to each."""
    nodes, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    graph = coo_array(
        (np.ones(len(pairs), bool), (places[:, 0], places[:, 1])), shape=(len(nodes),) * 2
    )
    if not len(nodes):
        return nodes, nodes
    _, group = connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    least = nodes[first[group]]
    return nodes[least != nodes], least[least != nodes]


def _joined(numbers: Ids, gone: Ids, heirs: Ids) -> Ids:
    """Return the final numbers, without gaps."""
    place = np.minimum(np.searchsorted(gone, numbers), len(gone) - 1)
    final = np.where(gone[place] == numbers, heirs[place], numbers)
    joined: Ids = final - np.searchsorted(gone, final)
    return joined
