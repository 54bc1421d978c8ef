"""The blocks in which labellings are read and written."""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, ceil_to
from tilepipe.storage.contents import remove
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from tilepipe.geometry import Shape
    from tilepipe.volumes.output_array import OutputArray
    from tilepipe.volumes.volume import Volume

    Ids = NDArray[np.int64]
    Foreground = Callable[[NDArray[np.generic]], NDArray[np.bool_]]
    """Returns the mask of voxels ``(channels, *block)``."""
    BlockProgress = Callable[[int, int], None]
    """Called with the blocks that are done and their number."""


BLOCK = 1 << 22
"""Voxels of a block, about, where the caller gives no block."""

CHUNK = 256
"""Voxels of the chunks of ids along y and x; along z as the source's, 32 at most."""


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


def grown_axes(volume: Volume, per_plane: bool) -> tuple[int, ...]:
    """Return the axes along which voxels of one object may lie."""
    first = volume.axes.index("y") if per_plane else len(volume.axes) - len(volume.axes.lstrip("t"))
    return tuple(range(first, len(volume.axes)))


def check_free(path: str | Path, source: Volume) -> None:
    """Raise `BadRequest` where a file of that name exists, or a source cannot be read from it."""
    Output.at(path).check_apart(source.path)
    if Path(path).exists():
        raise BadRequest(f"path (={path}) must not exist yet; remove it or name another")


@contextmanager
def created_labels(
    volume: Volume, path: str | Path, region: Region, block: Shape | None
) -> Iterator[OutputArray]:
    """Create an output for ids of a region; remove it where what follows fails."""
    shape, start = region.shape, region.start
    check_free(path, volume)
    output = Output.at(path)
    edges = [min(32, n) for n in volume.chunks[:-2]] + [CHUNK] * 2 if block is None else block
    try:
        output.create(
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
        yield output.open(durable=False)  # it is removed where what follows fails
    except BaseException:
        with suppress(BadRequest, OSError):  # what is not ours stays
            remove(output.place)
        raise
