"""Regions as they are spelled, and what lies outside them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, outside, parse_region
from tilepipe.testing.strategies import regions

SHAPE = (5, 7, 6)


@given(box=regions(SHAPE), hole=regions(SHAPE))
def test_what_is_outside_and_the_hole_cover_the_box_once(box: Region, hole: Region) -> None:
    count = np.zeros(SHAPE, int)
    for part in [*outside(box, hole), box.intersect(hole)]:
        count[part.slices] += 1
    wanted = np.zeros(SHAPE, int)
    wanted[box.slices] = 1
    assert np.array_equal(count, wanted)


@given(region=regions(SHAPE, empty=False))
def test_a_region_reads_as_it_is_written(region: Region) -> None:
    assert parse_region(str(region), SHAPE) == region


@pytest.mark.parametrize("text", ["", "0:5", "0:9,:,:", "3:3,:,:", "a:b,:,:", "4,:,:", "-9:,:,:"])
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadRequest, match=r"train_region \(=.*\) must") as refusal:
        parse_region(text, SHAPE, name="train_region")
    assert "\n" not in str(refusal.value)
