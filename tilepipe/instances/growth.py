"""Objects of a labelling grown until they meet, block by block."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, TileGrid
from tilepipe.instances.blocks import block_of, check_free, created_labels, grown_axes
from tilepipe.storage.contents import remove
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilepipe.geometry import Shape
    from tilepipe.instances.blocks import BlockProgress, Ids
    from tilepipe.volumes.output_array import OutputArray
    from tilepipe.volumes.volume import Volume


def grow_objects(
    objects: Volume,
    path: str | Path,
    *,
    per_plane: bool = False,
    block: Shape | None = None,
    progress: BlockProgress | None = None,
) -> None:
    """Grow numbered objects into the background, 0, until they meet, and write an OME-Zarr.

    Objects grow through faces, a voxel a step, all at once. A voxel that two objects reach in the
    same step stays background, so borders end up one voxel thick, or none where both sides have
    grown half of an even width. The output has the shape and the axes of ``objects``.

    Law: equals `grow` of the whole, for any block, and does not depend on the numbers. Blocks are
    read with a margin; where growing goes on past it, the volume is gone through again.

    Args:
        objects: The volume of numbers, one channel, 0 where there is no object.
        path: Where the OME-Zarr of the grown objects is written; a folder of the file system.
        per_plane: Whether objects do not grow along z. They never grow along t.
        block: The voxels along each axis that are read at once; by default about four million in
            all.
        progress: Is called with blocks done and their number, for each time that the volume is gone
            through.

    Raises:
        BadRequest: The place is not free.
        OSError: The volume cannot be read, or the output cannot be written.
    """
    place = Path(path).resolve()
    check_free(place, objects)
    source, passes, finished = objects, 0, False
    try:
        while not finished:
            passes += 1
            grown = place.with_name(f"{place.name}.{passes}")
            with created_labels(objects, grown, Region.whole(objects.shape), block) as target:
                finished = _grow_once(
                    source, target, grown_axes(objects, per_plane), block, progress
                )
            if passes > 1:
                remove(Path(source.path))
            source = open_volume(grown, axes=objects.axes)
    except BaseException:
        if passes > 1:
            with suppress(BadRequest, OSError):
                remove(Path(source.path))
        raise
    grown.rename(place)


def _grow_once(
    source: Volume,
    target: OutputArray,
    axes: Sequence[int],
    block: Shape | None,
    progress: BlockProgress | None,
) -> bool:
    """Grow by as many steps as blocks have a margin; return whether nothing is left to do."""
    unit = target.chunks if block is None else block
    size = block_of(source.shape, target.chunks, unit, block is None, axes)
    grid = TileGrid(source.shape, size)
    cut = [axis for axis in axes if size[axis] < source.shape[axis]]
    steps = max(2, min(size[axis] for axis in cut) // 4) if cut else None
    margin = tuple((steps or 0) if axis in cut else 0 for axis in range(len(size)))
    finished = True
    for done, tile in enumerate(grid, start=1):
        box = tile.write.grow(margin, margin).intersect(Region.whole(source.shape))
        grown, complete = grow(source.read(box)[0].astype(np.int64), axes, steps=steps)
        finished &= complete
        target.write(tile.write, grown[tile.write.within(box.start)].astype(target.dtype))
        if progress is not None:
            progress(done, len(grid))
    return finished


def grow(labels: Ids, axes: Sequence[int], *, steps: int | None = None) -> tuple[Ids, bool]:
    """Return the labels grown along ``axes`` by so many steps, and whether nothing is left to do.

    See `grow_objects`. Without ``steps`` it goes on to the end.

    >>> grow(np.array([1, 0, 0, 0, 2, 0, 0, 3]), (0,))[0].tolist()
    [1, 1, 0, 2, 2, 2, 3, 3]
    """
    padded = np.pad(labels, 1)
    strides = np.array(padded.strides) // padded.itemsize
    around = np.array([sign * strides[axis] for axis in axes for sign in (-1, 1)])
    free = np.zeros(padded.shape, bool)
    inner = tuple(slice(1, -1) for _ in labels.shape)
    free[inner] = labels == 0
    flat, open_to = padded.reshape(-1), free.reshape(-1)
    near = np.zeros(labels.shape, bool)
    for axis in axes:
        for place in (slice(None, -2), slice(2, None)):
            near |= padded[(*inner[:axis], place, *inner[axis + 1 :])] != 0
    near &= free[inner]
    front = np.ravel_multi_index(tuple(i + 1 for i in np.nonzero(near)), padded.shape)
    open_to[front] = False
    done = 0
    while len(front) and (steps is None or done < steps):
        beside = flat[front[:, None] + around]
        highest = beside.max(axis=1)
        alone = np.where(beside == 0, highest[:, None], beside).min(axis=1) == highest
        won = front[alone]
        flat[won] = highest[alone]
        parts = []
        for step in around:
            reached = won + step
            reached = reached[open_to[reached]]
            open_to[reached] = False
            parts.append(reached)
        front = np.concatenate(parts)
        done += 1
    return np.ascontiguousarray(padded[inner]), not len(front)
