"""Laws of the synthetic images, and the pictures made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import imagecodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.testing.strategies import regions
from tilepipe.volumes import synthetic
from tilepipe.volumes.overlay import FOUND, GAP, MISSED, WRONG, dice, write_overlay
from tilepipe.volumes.synthetic import nuclei, write_synthetic

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {2: (1700, 900), 3: (70, 110, 230)}
WHOLE = {ndim: nuclei(Region.whole(shape), shape=shape, seed=5) for ndim, shape in SHAPES.items()}


@given(region=st.sampled_from([2, 3]).flatmap(lambda n: regions(SHAPES[n], longest=150)))
@settings(max_examples=60)
def test_a_region_equals_the_crop_of_the_whole(region: Region):
    ndim = len(region.start)
    for part, whole in zip(nuclei(region, shape=SHAPES[ndim], seed=5), WHOLE[ndim], strict=True):
        np.testing.assert_array_equal(part, whole[region.slices])


def test_a_region_far_out_equals_its_parts():
    shape, at = (2_000_000, 1_000_000), (1_999_000, 987_654)
    image, truth = nuclei(Region(at, (at[0] + 300, at[1] + 200)), shape=shape)
    part = Region((at[0] + 37, at[1] + 11), (at[0] + 150, at[1] + 200))
    part_image, part_truth = nuclei(part, shape=shape)
    np.testing.assert_array_equal(part_image, image[part.within(at)])
    np.testing.assert_array_equal(part_truth, truth[part.within(at)])
    assert len(np.unique(truth)) > 10


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_image_does_not_depend_on_the_shape_nor_on_the_blocks(ndim: int, monkeypatch):
    image, truth = WHOLE[ndim]
    smaller = tuple(n - 29 for n in SHAPES[ndim])
    monkeypatch.setattr(synthetic, "BLOCK", {2: 450, 3: 61})
    cropped, numbered = nuclei(Region.whole(smaller), shape=smaller, seed=5)
    crop = Region.whole(smaller).slices
    np.testing.assert_array_equal(cropped, image[crop])
    np.testing.assert_array_equal(numbered > 0, truth[crop] > 0)


@pytest.mark.parametrize("ndim", [2, 3])
def test_seeds_differ_and_each_nucleus_is_in_one_piece_and_place(ndim: int):
    image, truth = WHOLE[ndim]
    other, _ = nuclei(Region.whole(SHAPES[ndim]), shape=SHAPES[ndim], seed=6)
    assert (other != image).mean() > 0.5
    numbers = np.unique(truth)
    assert numbers[0] == 0
    assert len(numbers) > 20
    for number in numbers[1 :: max(1, len(numbers) // 20)]:
        extent = [np.ptp(axis) for axis in np.nonzero(truth == number)]
        assert max(extent) < 2 * synthetic.NUCLEUS_CELL


def test_no_seed_is_a_shift_of_another():
    near = [nuclei(Region.whole((400, 400)), shape=(400, 400), seed=seed)[1] > 0 for seed in (5, 6)]
    cell = synthetic.NUCLEUS_CELL
    for rows in range(-4, 5):
        for columns in range(-4, 5):
            shifted = np.roll(near[0], (rows * cell, columns * cell), axis=(0, 1))
            assert dice(shifted, near[1]) < 0.5


def test_no_threshold_finds_the_nuclei():
    image, truth = WHOLE[2]
    scores = [dice(image > level, truth) for level in range(10, 200, 2)]
    assert 0.5 < max(scores) < 0.97
    assert image[truth > 0].mean() > 2 * image[truth == 0].mean()


def test_refuses_regions_outside_and_odd_shapes():
    with pytest.raises(BadRequest, match=r"region \(=0:9,0:11\) must lie inside"):
        nuclei(Region((0, 0), (9, 11)), shape=(10, 10))
    with pytest.raises(BadRequest, match=r"shape \(=\(10,\)\)"):
        nuclei(Region((0,), (9,)), shape=(10,))


@pytest.mark.parametrize("ndim", [2, 3])
def test_writes_what_it_makes(tmp_path: Path, ndim: int):
    shape, chunks = ((300, 500), (128, 256)) if ndim == 2 else ((20, 60, 70), (16, 32, 32))
    path, truth_path = tmp_path / "image.zarr", tmp_path / "truth.zarr"
    write_synthetic(path, shape, seed=4, chunks=chunks, labels_path=truth_path)
    image, truth = nuclei(Region.whole(shape), shape=shape, seed=4)
    for place, made in ((path, image), (truth_path, truth)):
        array = zarr.open_array(place, mode="r")
        assert array.metadata.dimension_names == ("z", "y", "x")[-ndim:]
        assert array.chunks == chunks
        assert array.dtype == made.dtype
        np.testing.assert_array_equal(array[...], made)
    with pytest.raises(BadRequest, match="must not be there yet"):
        write_synthetic(path, shape)


def test_the_overlay_shows_what_is_wrong_and_what_is_missed(tmp_path: Path):
    image, truth = (part[:200, :300] for part in WHOLE[2])
    found = truth.copy()
    found[:, :100] = 0
    found[truth == 0] = np.broadcast_to(np.arange(300) > 200, truth.shape)[truth == 0]
    write_overlay(tmp_path / "a.png", image, found, truth)
    picture = imagecodecs.png_decode((tmp_path / "a.png").read_bytes())
    assert picture.shape == (200, 600 + GAP, 3)
    left, right = picture[:, :300].astype(int), picture[:, 300 + GAP :].astype(int)
    assert (left == left[:, :, :1]).all()
    for mask, colour in (
        (found.astype(bool) & (truth == 0), WRONG),
        ((found == 0) & (truth > 0), MISSED),
        ((found > 0) & (truth > 0), FOUND),
    ):
        assert mask.any()
        assert (right[mask].argmax(axis=1) == np.argmax(colour)).mean() > 0.95
    same = (found == 0) & (truth == 0)
    np.testing.assert_array_equal(right[same], left[same])


def test_the_overlay_takes_volumes_and_constant_images(tmp_path: Path):
    write_overlay(tmp_path / "a.png", *WHOLE[3])
    picture = imagecodecs.png_decode((tmp_path / "a.png").read_bytes())
    assert picture.shape == (SHAPES[3][1], 2 * SHAPES[3][2] + GAP, 3)
    write_overlay(tmp_path / "b.png", np.full((4, 4), 7.0), np.zeros((4, 4), int))
    with pytest.raises(BadRequest, match="labels"):
        write_overlay(tmp_path / "c.png", np.zeros((4, 4)), np.zeros((4, 5), int))
