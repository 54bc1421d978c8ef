"""Rows go in and come out whole and in order, however they are cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.geometry import Region
from tilepipe.planning.costs import blocks
from tilepipe.segmentation.streams import RowReader, RowWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray


@given(st.integers(-60, 50), st.integers(1, 130), st.integers(1, 90), st.integers(1, 40))
def test_parts_cover_every_row_once(start: int, size: int, length: int, edge: int) -> None:
    parts = list(blocks(start, start + size, length, edge))
    assert [n for a, b in parts for n in range(a, b)] == list(range(start, start + size))
    assert all(b - a <= 2 * edge for a, b in parts)
    inside = [(a, b) for a, b in parts if a > 0 and b < length]
    assert all(a // edge == (b - 1) // edge for a, b in inside)


@given(data=st.data())
def test_rows_are_read_once_and_let_go(data: st.DataObject) -> None:
    start, stop = data.draw(st.integers(-9, 9)), data.draw(st.integers(10, 60))
    seen: list[Region] = []

    def load(region: Region) -> NDArray[np.float32]:
        seen.append(region)
        rows = np.arange(region.start[1], region.stop[1], dtype=np.float32)
        return rows[:, None, None] * np.ones((1, 4, 1), np.float32)

    parts = list(blocks(start, stop, 40, data.draw(st.integers(1, 12))))
    with ThreadPoolExecutor(1) as pool:
        box = Region((3, start), (7, stop))
        feed = RowReader(box, axis=1, parts=parts, load=load, pool=pool)
        low = high = start
        while high < stop:
            high = data.draw(st.integers(high + 1, stop))
            rows = feed.rows(low, high)
            np.testing.assert_array_equal(rows[:, 0, 0], np.arange(low, high))
            low = data.draw(st.integers(low, high - 1))
        with pytest.raises(IndexError):
            feed.rows(low, stop + 1)
    assert [(r.start[1], r.stop[1]) for r in seen] == parts
    assert all((r.start[0], r.stop[0]) == (3, 7) for r in seen)


class Wall:
    """A target that keeps what is written, and that it is whole units."""

    def __init__(self, region: Region, unit: int) -> None:
        self.region, self.unit = region, unit
        self.voxels = np.full((2, *region.shape), -1.0)

    def write(self, region: Region, array: NDArray[np.generic]) -> None:
        assert region.start[1] % self.unit == 0
        assert region.stop[1] % self.unit == 0 or region.stop[1] == self.region.stop[1]
        place = (slice(None), *region.within(self.region.start))
        assert (self.voxels[place] == -1).all()
        self.voxels[place] = array


@given(data=st.data())
def test_whole_units_are_written_once(data: st.DataObject) -> None:
    unit = data.draw(st.integers(1, 9))
    start = unit * data.draw(st.integers(0, 3))
    stop = start + data.draw(st.integers(1, 50))
    region = Region((5, start), (8, stop))
    truth = np.random.default_rng(0).random((2, *region.shape))
    wall = Wall(region, unit)
    with ThreadPoolExecutor(1) as pool:
        store, done = RowWriter(wall, region, axis=1, unit=unit, pool=pool), 0
        while done < stop - start:
            more = data.draw(st.integers(1, stop - start - done))
            store.add(truth[:, :, done : done + more])
            done += more
        store.finish()
    np.testing.assert_array_equal(wall.voxels, truth)
