"""Numbering the objects of a mask, and growing them, in volumes larger than memory.

Both go block by block and give what they would give on the whole array, whatever the blocks.
"""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, TileGrid, ceil_to
from tilepipe.storage.contents import remove
from tilepipe.volumes.output import check_target, create_target, open_target
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from tilepipe.geometry import Shape
    from tilepipe.volumes.output import Target
    from tilepipe.volumes.volume import Volume

    Ids = NDArray[np.int64]
    Foreground = Callable[[NDArray[np.generic]], NDArray[np.bool_]]
    Progress = Callable[[int, int], None]

BLOCK = 1 << 22
"""Voxels of a block, about, where nothing else is asked for."""
CHUNK = 256
"""Voxels of the chunks of ids along y and x; along z as the source's, 32 at most."""


def label_components(
    volume: Volume,
    path: str | Path,
    *,
    foreground: Foreground,
    region: Region | None = None,
    per_plane: bool = False,
    full: bool = False,
    block: Shape | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the connected components of a mask, numbered 1 to n, to an OME-Zarr; return n.

    ``foreground`` is given voxels ``(channels, *block)`` and returns the mask of that block; it
    must judge each voxel by its own values. Of a ``region`` only, the target has the region's
    shape. Voxels connect through faces, with ``full`` through edges and corners too; with
    ``per_plane`` not along z, and never along t. ``block`` is how many voxels are read at once.

    Law: equals ``scipy.ndimage.label`` of the whole up to renumbering, for any block. Memory is a
    few blocks and the pairs of components that meet where blocks do. Raises BadRequest for a place
    that is not free; what a failed run has written is removed.
    """
    region = Region.whole(volume.shape) if region is None else region
    if region.size == 0 or region.intersect(Region.whole(volume.shape)) != region:
        raise BadRequest(f"region (={region}) must hold voxels, all inside {volume.shape}")
    structure = _structure(len(volume.axes), _along(volume, per_plane), full=full)
    with _created(volume, path, region, block) as target:
        ids = open_volume(path, axes=volume.axes)
        unit = tuple(map(max, target.chunks, volume.chunks)) if block is None else block
        grid = TileGrid(region.shape, block_of(region.shape, target.chunks, unit, block is None))
        firsts, count, pairs = [], 0, [np.zeros((0, 2), np.int64)]
        for done, tile in enumerate(grid, start=1):
            mask = foreground(volume.read(tile.write.shift(region.start)))
            numbers, found = _numbered(mask, structure, count)
            firsts.append(count + 1)
            count += found
            target.write(tile.write, numbers.astype(target.dtype))
            pairs += _meetings(ids, numbers, tile.write, structure)
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


def grow_objects(
    objects: Volume,
    path: str | Path,
    *,
    per_plane: bool = False,
    block: Shape | None = None,
    progress: Progress | None = None,
) -> None:
    """Grow numbered objects into the background, 0, until they meet; an OME-Zarr at ``path``.

    Objects grow through faces, a voxel a step, all at once; with ``per_plane`` not along z, and
    never along t. A voxel that two objects reach in the same step stays background, so borders
    end up one voxel thick, or none where both sides have grown half of an even width.

    Law: equals `grow` of the whole, for any block, and does not depend on the numbers. Blocks are
    read with a margin; where growing goes on past it, the volume is gone through again.
    """
    place = Path(path).resolve()
    _check_free(place, objects)
    source, passes, finished = objects, 0, False
    try:
        while not finished:
            passes += 1
            there = place.with_name(f"{place.name}.{passes}")
            with _created(objects, there, Region.whole(objects.shape), block) as target:
                finished = _grow_once(source, target, _along(objects, per_plane), block, progress)
            if passes > 1:
                remove(Path(source.path))
            source = open_volume(there, axes=objects.axes)
    except BaseException:
        if passes > 1:
            with suppress(BadRequest, OSError):
                remove(Path(source.path))
        raise
    there.rename(place)


def _grow_once(
    source: Volume,
    target: Target,
    axes: Sequence[int],
    block: Shape | None,
    progress: Progress | None,
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
        one = np.where(beside == 0, highest[:, None], beside).min(axis=1) == highest
        won = front[one]
        flat[won] = highest[one]
        parts = []
        for step in around:
            reached = won + step
            reached = reached[open_to[reached]]
            open_to[reached] = False
            parts.append(reached)
        front = np.concatenate(parts)
        done += 1
    return np.ascontiguousarray(padded[inner]), not len(front)


def block_of(
    shape: Shape,
    chunks: Shape,
    unit: Shape,
    larger: bool = True,
    axes: Sequence[int] | None = None,
) -> Shape:
    """Return the voxels of a block: whole chunks, at least ``unit``, and ``larger`` up to `BLOCK`.

    It grows evenly along ``axes``, only then along the others.

    >>> block_of((500, 9000, 9000), (1, 256, 256), (1, 256, 256), axes=(1, 2))
    (1, 2048, 2048)
    """
    block = [min(ceil_to(u, c), n) for u, c, n in zip(unit, chunks, shape, strict=True)]
    every = range(len(shape))
    for group in (every if axes is None else axes, every) if larger else ():
        while room := [axis for axis in group if block[axis] < shape[axis]]:
            axis = min(room, key=lambda axis: block[axis])
            wide = min(2 * ceil_to(block[axis], chunks[axis]), shape[axis])
            if math.prod(block) // block[axis] * wide > BLOCK:
                break
            block[axis] = wide
    return tuple(block)


def _along(volume: Volume, per_plane: bool) -> tuple[int, ...]:
    """Return the axes along which voxels of one object may lie."""
    first = volume.axes.index("y") if per_plane else len(volume.axes) - len(volume.axes.lstrip("t"))
    return tuple(range(first, len(volume.axes)))


def _check_free(path: str | Path, source: Volume) -> None:
    check_target(path, source.path)
    if Path(path).exists():
        raise BadRequest(f"path (={path}) must not be there yet; remove it or name another")


@contextmanager
def _created(
    volume: Volume, path: str | Path, region: Region, block: Shape | None
) -> Iterator[Target]:
    """Create a target for ids of a region; remove it where what follows fails."""
    shape, start = region.shape, region.start
    _check_free(path, volume)
    edges = [min(32, n) for n in volume.chunks[:-2]] + [CHUNK] * 2 if block is None else block
    try:
        create_target(
            path,
            axes=volume.axes,
            shape=shape,
            dtype=np.uint32 if math.prod(shape) < 2**32 else np.uint64,
            chunks=tuple(map(min, edges, shape)),
            shards=None,
            scale=volume.scale,
            units=volume.units,
            translation=[
                t + a * s for t, a, s in zip(volume.translation, start, volume.scale, strict=True)
            ],
            attributes={"objects": {"source": volume.path}},
        )
        yield open_target(path, durable=False)  # it is removed where what follows fails
    except BaseException:
        with suppress(BadRequest, OSError):  # what is not ours stays
            remove(Path(path).resolve())
        raise


def _structure(ndim: int, axes: Sequence[int], *, full: bool) -> NDArray[np.bool_]:
    """Return which of the 3 x 3 (x 3) voxels round a voxel connect to it."""
    structure = np.zeros((3,) * ndim, bool)
    for offset in itertools.product((-1, 0, 1), repeat=ndim):
        moved = [axis for axis, step in enumerate(offset) if step]
        inside = all(axis in axes for axis in moved)
        structure[tuple(step + 1 for step in offset)] = inside and (full or len(moved) < 2)
    return structure


def _numbered(
    mask: NDArray[np.bool_], structure: NDArray[np.bool_], before: int
) -> tuple[Ids, int]:
    numbers = np.zeros(mask.shape, np.int64)
    count = int(label(mask, structure, output=numbers))
    numbers[mask] += before
    return numbers, count


def _meetings(ids: Volume, numbers: Ids, place: Region, structure: NDArray[np.bool_]) -> list[Ids]:
    """Return the pairs of numbers that touch across the faces towards earlier blocks.

    What later blocks will write still reads as 0; the pair is found when they are here.
    """
    pairs = []
    offsets = np.argwhere(structure) - 1
    for axis in range(numbers.ndim):
        back = offsets[offsets[:, axis] == -1]
        if not len(back) or place.start[axis] == 0:
            continue
        reach = np.abs(back).max(axis=0)
        reach[axis] = 0
        start, stop = list(place.start), list(place.stop)
        start[axis], stop[axis] = start[axis] - 1, start[axis]
        wide = Region(tuple(start), tuple(stop)).grow(reach.tolist(), reach.tolist())
        seen = wide.intersect(Region.whole(ids.shape))
        slab = np.zeros(wide.shape, np.int64)
        slab[seen.within(wide.start)] = ids.read(seen)[0].astype(np.int64)
        face = numbers[(slice(None),) * axis + (slice(0, 1),)]
        for offset in back:
            offset[axis] = 0
            at = tuple(
                slice(r + o, r + o + n) for r, o, n in zip(reach, offset, face.shape, strict=True)
            )
            both = (face != 0) & (slab[at] != 0)
            pairs.append(np.unique(np.stack((slab[at][both], face[both]), axis=1), axis=0))
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
