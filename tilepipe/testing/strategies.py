"""Hypothesis strategies for shapes, regions, grids of tiles, and volumes.

A law of a reader or a writer is tested on what they draw:

    from hypothesis import given, strategies as st
    from tilepipe.testing.strategies import regions

    @given(region=regions((20, 50, 41)))
    def test_my_reader_gives_the_crop_of_the_whole(region):
        np.testing.assert_array_equal(my_read(region), WHOLE[region.slices])

All sizes are in voxels, in the order of the volume's axes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from tilepipe.geometry import Region, Shape, TileGrid
from tilepipe.testing.sizes import TilingSizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy
    from numpy.typing import NDArray


def shapes(
    *, fewest: int = 2, most: int = 3, smallest: int = 1, largest: int = 40
) -> SearchStrategy[Shape]:
    """Draw the shape of a volume.

    Args:
        fewest: The smallest number of axes.
        most: The largest number of axes.
        smallest: The fewest voxels along an axis.
        largest: The most voxels along an axis.

    Returns:
        A strategy for tuples of lengths.
    """
    lengths = st.integers(smallest, largest)
    return st.lists(lengths, min_size=fewest, max_size=most).map(tuple)


@st.composite
def regions(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    empty: bool = True,
    longest: int | None = None,
    beyond: int = 0,
) -> Region:
    """Draw a region of a volume.

    Args:
        draw: Given by hypothesis; leave it out.
        shape: Voxels of the volume along each axis.
        empty: Whether the region may be empty.
        longest: The most voxels along an axis; None for no such limit.
        beyond: By how many voxels the region may reach outside the volume.

    Returns:
        A strategy for regions.
    """
    start, stop = [], []
    for length in shape:
        first = draw(st.integers(-beyond, length + beyond - (not empty)))
        last = length + beyond if longest is None else min(length + beyond, first + longest)
        start.append(first)
        stop.append(draw(st.integers(first + (not empty), last)))
    return Region(tuple(start), tuple(stop))


@st.composite
def grids(
    draw: st.DrawFn, *, axes: int | None = None, largest: int = 40, tile: int = 17
) -> TileGrid:
    """Draw a grid of tiles, some of which the end of the volume cuts off.

    Args:
        draw: Given by hypothesis; leave it out.
        axes: The number of axes; None for 1 to 3.
        largest: The most voxels of the volume along an axis.
        tile: The most voxels of a tile along an axis.

    Returns:
        A strategy for grids.
    """
    shape = draw(shapes(fewest=axes or 1, most=axes or 3, largest=largest))
    return TileGrid(shape, tuple(draw(st.integers(1, tile)) for _ in shape))


def tiling_sizes(
    step: Sequence[int], *, largest: int, steps: int = 4
) -> SearchStrategy[TilingSizes]:
    """Draw the sizes with which an image is tiled; tile and window lie on the network's lattice.

    Args:
        step: The network's step along each axis, ``profile.context.step``.
        largest: The most voxels of the image along an axis.
        steps: The most steps of a tile, and of a window, along an axis.

    Returns:
        A strategy for `tilepipe.testing.sizes.TilingSizes`.
    """
    image = st.tuples(*(st.integers(1, largest) for _ in step))
    edges = st.tuples(*(st.sampled_from(range(n, steps * n + 1, n)) for n in step))
    return st.builds(TilingSizes, image, edges, edges)


@st.composite
def volumes(
    draw: st.DrawFn,
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("uint8", "uint16", "float32"),
) -> NDArray[np.generic]:
    """Draw a volume of noise: grey values over the whole of the type's range, or 0 to 1 for floats.

    Args:
        draw: Given by hypothesis; leave it out.
        shape: Its shape in voxels; None for a shape that `shapes` draws.
        dtypes: The integers and floats of which one type is drawn.

    Returns:
        A strategy for arrays.
    """
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    size = tuple(shape) if shape is not None else draw(shapes())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if dtype.kind == "f":
        return random.random(size).astype(dtype)
    return np.frombuffer(random.bytes(math.prod(size) * dtype.itemsize), dtype).reshape(size)
