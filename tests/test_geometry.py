"""Laws of boxes, grids and mirrors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.geometry import Region, TileGrid, ceil_to, mirror
from tilepipe.testing.strategies import grids


@given(grid=grids())
def test_tiles_cover_every_voxel_exactly_once(grid: TileGrid) -> None:
    count = np.zeros(grid.shape, dtype=int)
    for index, tile in enumerate(grid):
        assert tile.index == index
        assert grid[index] == tile
        assert all(a % t == 0 for a, t in zip(tile.write.start, grid.tile, strict=True))
        count[tile.write.slices] += 1
    assert (count == 1).all()
    assert len(grid) == np.prod(grid.counts)


def test_a_grid_has_no_tile_past_its_end() -> None:
    with pytest.raises(IndexError, match="must lie in 0:4"):
        TileGrid((4, 4), (2, 2))[4]


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_mirror_is_what_numpy_pads(length: int, before: int, after: int) -> None:
    padded = np.pad(np.arange(length), (before, after), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(mirror(-before, length + after, length), padded)


@given(st.integers(-50, 50), st.integers(1, 20))
def test_ceil_to_is_the_next_multiple(value: int, multiple: int) -> None:
    found = ceil_to(value, multiple)
    assert found % multiple == 0
    assert 0 <= found - value < multiple


def test_a_region_cannot_be_turned_inside_out() -> None:
    with pytest.raises(ValueError, match="must not lie past stop"):
        Region((3,), (2,))
