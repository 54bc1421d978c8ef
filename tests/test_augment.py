"""Image and labels move together, by the map that was drawn and no other."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.training.augment import (
    GRID,
    NONE,
    Augmentation,
    Warp,
    draw_warp,
    grey,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRONG = Augmentation(
    flip=True, rotate="any", elastic=10.0, contrast=0.2, brightness=0.2, gamma=0.2, noise=0.1
)
SEEDS = st.integers(0, 10_000)
AUGMENTATIONS = st.builds(
    Augmentation,
    flip=st.booleans(),
    rotate=st.sampled_from(["none", "quarter", "any"]),
    scale=st.sampled_from([0, 0.3]),
    elastic=st.sampled_from([0, 2.0]),
    in_plane=st.booleans(),
)
SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 17)] * 2),
    st.tuples(*[st.integers(1, 9)] * 3),
)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def places(box: Region) -> NDArray[np.float32]:
    """Return an image whose channels are each voxel's own coordinates: (axes, *box)."""
    axes = [np.arange(a, b) for a, b in zip(box.start, box.stop, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def asked(warp: Warp) -> NDArray[np.float32]:
    """Return where each voxel of the region comes from, in the patch's coordinates."""
    return warp.image(places(warp.box), warp.region)


def centre(region: Region) -> NDArray[np.float64]:
    return (np.array(region.start) + np.array(region.stop) - 1) / 2


def inside(region: Region, random: np.random.Generator) -> Region:
    """Return a random region in a region."""
    pairs = [sorted(random.integers(a, b + 1, 2).tolist())
             for a, b in zip(region.start, region.stop, strict=True)]  # fmt: skip
    return Region(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


@given(SHAPES, SEEDS)
def test_nothing_asked_for_changes_nothing(shape: tuple[int, ...], seed: int) -> None:
    start = tuple(rng(seed).integers(-9, 9, len(shape)).tolist())
    region = Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))
    warp = draw_warp(NONE, rng(seed), region)
    assert warp.box == region
    image = rng(seed).standard_normal((2, *shape), np.float32)
    np.testing.assert_array_equal(warp.image(image, region), image)
    np.testing.assert_array_equal(warp.labels(image[0], region), image[0])
    np.testing.assert_array_equal(grey(NONE, rng(seed), image), image)


def symmetries(patch: NDArray[np.float32], *, turns: bool, flips: bool) -> set[bytes]:
    """Return the patch (C, *S) after all turns, all flips, or both."""
    ndim = patch.ndim - 1
    if turns and not flips and ndim == 2:
        return {np.rot90(patch, k, axes=(1, 2)).tobytes() for k in range(4)}
    found = set()
    for order, signs in product(permutations(range(ndim)), product((1, -1), repeat=ndim)):
        matrix = np.eye(ndim)[list(order)] * np.array(signs)[:, None]
        if (turns or order == tuple(range(ndim))) and (flips or np.linalg.det(matrix) > 0):
            moved = patch.transpose(0, *(axis + 1 for axis in order))
            found.add(np.flip(moved, [a + 1 for a in range(ndim) if signs[a] < 0]).tobytes())
    return found


@pytest.mark.parametrize(("turns", "flips"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(6, 6), (5, 5), (3, 3, 3)])
def test_turns_and_flips_are_numpys_and_all_of_them(
    shape: tuple[int, ...], turns: bool, flips: bool
) -> None:
    chosen = Augmentation(flip=flips, rotate="quarter" if turns else "none")
    patch, region, found = rng(0).random((2, *shape), np.float32), Region.whole(shape), set()
    for seed in range(800 if len(shape) == 3 else 100):
        warp = draw_warp(chosen, rng(seed), region)
        assert warp.box == region
        image = warp.image(patch, region)
        np.testing.assert_array_equal(warp.labels(patch[1], region), image[1])
        found.add(image.tobytes())
    truth = symmetries(patch, turns=turns, flips=flips)
    assert found == truth
    full = 2 ** len(shape) * (6 if len(shape) == 3 else 2)
    assert len(truth) == {(1, 0): full // 2, (0, 1): 2 ** len(shape), (1, 1): full}[turns, flips]


@given(SHAPES, SEEDS, AUGMENTATIONS)
def test_a_smaller_region_is_the_crop_of_the_larger_one(
    shape: tuple[int, ...], seed: int, chosen: Augmentation
) -> None:
    random = rng(seed)
    start = tuple(random.integers(-9, 9, len(shape)).tolist())
    region = Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))
    warp, part = draw_warp(chosen, random, region), inside(region, random)
    image = random.standard_normal((2, *warp.box.shape), np.float32)
    labels = random.integers(0, 2**64, warp.box.shape, np.uint64, endpoint=False)
    whole, within = warp.image(image, region), part.within(start)
    assert whole.dtype == np.float32
    assert whole.shape == (2, *shape)
    np.testing.assert_array_equal(warp.image(image, part), whole[(slice(None), *within)])
    found = warp.labels(labels, part)
    assert found.dtype == np.uint64
    assert np.isin(found, labels, kind="sort").all()  # a table overflows in numpy 2.0
    np.testing.assert_array_equal(found, warp.labels(labels, region)[within])


@given(SHAPES, SEEDS, AUGMENTATIONS)
def test_labels_are_those_of_the_voxel_nearest_to_where_the_image_is_from(
    shape: tuple[int, ...], seed: int, chosen: Augmentation
) -> None:
    region = Region.whole(shape)
    warp = draw_warp(chosen, rng(seed), region)
    where = asked(warp)  # linear interpolation of coordinates gives coordinates
    number = np.arange(warp.box.size).reshape(warp.box.shape)
    taken = np.stack(np.unravel_index(warp.labels(number, region), warp.box.shape))
    origin = np.reshape(warp.box.start, (-1,) + (1,) * len(shape))
    assert np.abs(taken + origin - where).max() <= 0.5 + 1e-4


@given(SHAPES, SEEDS, AUGMENTATIONS)
def test_the_box_is_what_is_needed_and_no_more(
    shape: tuple[int, ...], seed: int, chosen: Augmentation
) -> None:
    warp = draw_warp(chosen, rng(seed), Region.whole(shape))
    for axis, along in enumerate(asked(warp).reshape(len(shape), -1)):
        assert -1e-4 <= along.min() - warp.box.start[axis] < 1 + 1e-4
        assert -1e-4 <= warp.box.stop[axis] - 1 - along.max() < 1 + 1e-4
    if warp.coordinates is None:
        assert sorted(warp.box.shape) == sorted(shape)


@given(SEEDS, st.sampled_from([2, 3]), st.booleans(), st.sampled_from(["none", "quarter", "any"]))
def test_without_displacements_the_map_turns_and_scales_about_the_centre(
    seed: int, ndim: int, flip: bool, rotate: str
) -> None:
    region = Region((-4,) * ndim, (7,) * ndim)
    warp = draw_warp(Augmentation(flip=flip, rotate=rotate, scale=0.25), rng(seed), region)
    here = places(region).reshape(ndim, -1).T - centre(region)
    there = asked(warp).reshape(ndim, -1).T - centre(region)
    matrix, *_ = np.linalg.lstsq(here, there, rcond=None)
    np.testing.assert_allclose(here @ matrix, there, atol=1e-4)
    square = matrix @ matrix.T
    factor = np.sqrt(square[0, 0])
    np.testing.assert_allclose(square, np.eye(ndim) * factor**2, atol=1e-4)
    assert 1 / 1.25 - 1e-4 <= factor <= 1.25 + 1e-4
    assert flip or np.linalg.det(matrix) > 0


@pytest.mark.parametrize("shape", [(4, 7), (3, 4, 6), (2, 5, 5)])
def test_quarter_turns_of_unequal_sizes_exchange_the_sizes_of_the_box(
    shape: tuple[int, ...],
) -> None:
    region, boxes = Region((-5,) * len(shape), tuple(n - 5 for n in shape)), set()
    for seed in range(100):
        warp = draw_warp(Augmentation(flip=True, rotate="quarter"), rng(seed), region)
        boxes.add(warp.box.shape)
        assert np.abs(centre(warp.box) - centre(region)).max() <= 0.5
        where = asked(warp)
        assert len(np.unique(where.reshape(len(shape), -1), axis=1).T) == region.size
        for axis in range(len(shape)):  # a step along the patch is one step along the source
            steps = np.abs(np.diff(where, axis=axis + 1))
            assert (steps.sum(axis=0) == 1).all()
        part = Region(region.start, tuple(n - 6 for n in shape))
        crop = (slice(None), *part.within(region.start))
        np.testing.assert_array_equal(warp.image(places(warp.box), part), where[crop])
    assert boxes == set(permutations(shape))


def test_all_angles_are_drawn() -> None:
    region, directions = Region.whole((9, 9)), []
    for seed in range(300):
        where = asked(draw_warp(Augmentation(rotate="any"), rng(seed), region))
        directions.append(np.arctan2(*(where[:, 4, 8] - where[:, 4, 0])))
    counts, _ = np.histogram(directions, 6, (-np.pi, np.pi))
    assert counts.min() > 25


@pytest.mark.parametrize("shape", [(31, 31), (15, 31), (9, 9, 9)])
def test_displacements_have_the_deviation_asked_for_and_are_smooth(shape: tuple[int, ...]) -> None:
    region, drawn = Region.whole(shape), []
    for seed in range(300):
        warp = draw_warp(Augmentation(elastic=5.0), rng(seed), region)
        moved = asked(warp) - places(region)
        drawn.append(
            moved[(slice(None), *(slice(None, None, (n - 1) // (GRID - 1)) for n in shape))]
        )
        for axis, size in enumerate(shape, start=1):
            bend = np.abs(np.diff(moved, 2, axis=axis)).max()
            step = (size - 1) / (GRID - 1)
            assert bend < 12 * np.abs(moved).max() / step**2  # a cubic's, between points at +-1
    points = np.array(drawn)
    assert points.shape[2:] == (GRID,) * len(shape)
    assert points.std() == pytest.approx(5, rel=0.03)
    assert points.mean() == pytest.approx(0, abs=0.2)
    apart = points.reshape(300, -1)
    assert np.abs(np.corrcoef(apart.T) - np.eye(apart.shape[1])).max() < 0.35


def test_a_disc_stays_the_same_disc_in_image_and_labels() -> None:
    region = Region((-8, 3), (72, 83))
    for seed in range(10):
        warp = draw_warp(replace(STRONG, elastic=3.0, scale=0.2), rng(seed), region)
        apart = np.linalg.norm(places(warp.box) - centre(region).reshape(2, 1, 1), axis=0)
        image = warp.image(np.clip(20.5 - apart, 0, 1)[None], region)[0]
        labels = warp.labels(apart < 20, region)
        away = np.abs(warp.image(apart[None], region)[0] - 20) > 1
        np.testing.assert_array_equal((image > 0.5)[away], labels[away])
        assert labels.any()
        assert (~away).mean() < 0.1


def test_planes_of_anisotropic_stacks_move_alike_and_keep_their_place() -> None:
    region = Region((5, 0, 0), (9, 20, 24))
    for rotate in ("quarter", "any"):
        chosen = Augmentation(flip=True, rotate=rotate, in_plane=True)
        for seed in range(10):
            warp = draw_warp(chosen, rng(seed), region)
            assert (warp.box.start[0], warp.box.stop[0]) == (5, 9)
            where = asked(warp)
            np.testing.assert_array_equal(where[0], places(region)[0])
            np.testing.assert_array_equal(where[1:], where[1:, :1].repeat(4, axis=1))
            flat = draw_warp(replace(chosen, in_plane=False), rng(seed), Region((0, 0), (20, 24)))
            np.testing.assert_array_equal(where[1:, 0], asked(flat))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    def patch(seed: int) -> bytes:
        random = rng(seed)
        warp = draw_warp(STRONG, random, Region.whole((40, 40)))
        image = np.sin(places(warp.box)).astype(np.float32)
        return grey(STRONG, random, warp.image(image, warp.region)).tobytes()

    assert patch(1) == patch(1)
    assert patch(1) != patch(2)


def test_what_was_not_drawn_is_not_given() -> None:
    warp = draw_warp(STRONG, rng(0), Region.whole((20, 20)))
    with pytest.raises(ValueError, match="must lie in the one drawn"):
        warp.labels(np.zeros(warp.box.shape, int), Region((0, 0), (21, 20)))
    with pytest.raises(ValueError, match="must be the box's"):
        warp.labels(np.zeros((3, 3), int), warp.region)


@given(SEEDS, st.floats(0.01, 1000), st.floats(-1000, 1000))
def test_grey_values_vary_alike_however_they_were_normalized(
    seed: int, factor: float, offset: float
) -> None:
    image = rng(seed).random((2, 12, 11), np.float32)
    chosen = Augmentation(contrast=0.3, brightness=0.5, gamma=0.4, noise=0.2)
    mapped = (image.astype(float) * factor + offset).astype(np.float32)
    found = (grey(chosen, rng(seed), mapped).astype(float) - offset) / factor
    tolerance = 1e-4 + 1e-5 * abs(offset) / factor
    if tolerance < 0.1:  # else float32 has no digits left
        np.testing.assert_allclose(found, grey(chosen, rng(seed), image), atol=tolerance)


@pytest.mark.parametrize("name", ["contrast", "brightness", "gamma", "noise"])
def test_grey_values_vary_by_what_was_asked_and_no_more(name: str) -> None:
    image = rng(0).random((1, 60, 60), np.float32)
    before, seen = image.copy(), []
    for seed in range(100):
        found = grey(Augmentation(**{name: 0.2}), rng(seed), image).astype(float)
        seen.append(
            {
                "contrast": found.std() / image.std(),
                "brightness": (found - image).mean() / image.std(),
                "gamma": np.log(np.median(found)) / np.log(np.median(image)),
                "noise": (found - image).std() / image.std(),
            }[name]
        )
        if name == "contrast":
            assert found.mean() == pytest.approx(image.mean(), rel=1e-5)
        if name == "gamma":
            assert found.min() == pytest.approx(image.min(), abs=1e-6)
            assert found.max() == pytest.approx(image.max(), abs=1e-6)
    low, high = {"brightness": (-0.2, 0.2), "noise": (0, 0.2)}.get(name, (1 / 1.2, 1.2))
    slack = 0.01
    assert low - slack <= min(seen) < low + 0.04
    assert high - 0.04 < max(seen) <= high + slack
    np.testing.assert_array_equal(image, before)


def test_a_constant_channel_stays() -> None:
    image = np.full((1, 5, 5), 3.5, np.float32)
    np.testing.assert_array_equal(grey(STRONG, rng(0), image), image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotate": "half"}, "rotate .='half'. must be one of none, quarter, any"),
        ({"elastic": -1.0}, "elastic .=-1.0. must be a number of at least 0"),
        ({"noise": float("nan")}, "noise .=nan. must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Augmentation(**options)  # type: ignore[arg-type]
