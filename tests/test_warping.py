"""A warped truth has the truth's topology, and nothing that could be warped is left."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilepipe.evaluation.warping import warping_mismatches

masks = arrays(bool, (7, 9), elements=st.booleans())


def topology(mask: np.ndarray) -> tuple[int, int]:
    padded = np.pad(mask, 1)
    objects = scipy.ndimage.label(padded)[1]
    return objects, scipy.ndimage.label(~padded, np.ones((3, 3)))[1]


@settings(deadline=None, max_examples=100)
@given(predicted=masks, true=masks, fixed=masks)
def test_warping_keeps_objects_and_holes(
    predicted: np.ndarray, true: np.ndarray, fixed: np.ndarray
) -> None:
    for held in (None, fixed):
        left = warping_mismatches(predicted, true, fixed=held)
        still = np.zeros_like(true) if held is None else held
        assert not (left & still).any()
        warped = np.where(still, true, predicted ^ left)
        assert topology(warped) == topology(true)
        for y, x in zip(*np.nonzero(left), strict=True):
            flipped = warped.copy()
            flipped[y, x] ^= True
            assert topology(flipped) != topology(true) or not simple_by_hand(warped, y, x)


def simple_by_hand(mask: np.ndarray, y: int, x: int) -> bool:
    """Whether a flip neither joins nor parts pieces, counted in the 3 x 3 neighbourhood."""
    patch = np.pad(mask, 1)[y : y + 3, x : x + 3].copy()
    patch[1, 1] = False
    pieces = scipy.ndimage.label(patch)[0]
    near = {int(pieces[place]) for place in ((0, 1), (1, 0), (1, 2), (2, 1))} - {0}
    patch[1, 1] = True
    return len(near) == 1 and scipy.ndimage.label(~patch, np.ones((3, 3)))[1] == 1


def test_moved_borders_are_free_and_mistakes_of_topology_are_not() -> None:
    true = np.zeros((30, 60), bool)
    true[5:25, 5:28] = true[5:25, 32:55] = True
    moved = np.zeros_like(true)
    moved[4:23, 6:30] = moved[4:23, 33:57] = True
    assert not warping_mismatches(moved, true).any()
    merged = true.copy()
    merged[14, 27:33] = True
    assert warping_mismatches(merged, true).sum() == 1
    split = true.copy()
    split[5:25, 15] = False
    assert 1 <= warping_mismatches(split, true).sum() <= 2
    hole, speck = true.copy(), true.copy()
    hole[10, 10], speck[1, 1] = False, True
    assert warping_mismatches(hole, true).sum() == 1
    assert warping_mismatches(speck, true).sum() == 1


@pytest.mark.parametrize("value", [False, True])
def test_nothing_and_everything(value: bool) -> None:
    whole = np.full((4, 4), value)
    assert not warping_mismatches(whole, whole).any()
    assert warping_mismatches(~whole, whole).any()
