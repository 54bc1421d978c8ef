"""Classes and weights of labels are local, and those of a brute force."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tilepipe.training.targets import (
    IGNORE,
    MARGIN,
    REACH,
    balance_weights,
    border_weights,
    class_count,
    class_map,
    class_names,
    weights_margin,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.integer]

CLASSES = ("classes", "mask", "foreground", "membrane", "border")
SEEDS = st.integers(0, 10_000)


def cells(shape: tuple[int, ...], count: int, seed: int, fill: float = 1.0) -> Ids:
    """Return instances: the nearest of some points, within a radius; touching where ``fill``."""
    random = np.random.default_rng(seed)
    points = random.uniform(0, shape, (count, len(shape)))
    grid = np.indices(shape).reshape(len(shape), 1, -1)
    apart = np.sqrt(((grid - points.T[:, :, None]) ** 2).sum(axis=0))
    ids = random.permutation(np.arange(1, 400))[:count][apart.argmin(axis=0)]
    reach = fill * (np.prod(shape) / count) ** (1 / len(shape))
    return np.where(apart.min(axis=0) < reach, ids, 0).reshape(shape).astype(np.uint16)


def by_hand(labels: Ids, target: str, ignore: int | None, in_plane: bool) -> NDArray[np.uint8]:
    answer = np.zeros(labels.shape, np.uint8)
    for place in np.ndindex(labels.shape):
        label, other = int(labels[place]), False
        for axis, side in product(range(labels.ndim - 2 if in_plane else 0, labels.ndim), (-1, 1)):
            there = list(place)
            there[axis] += side
            if 0 <= there[axis] < labels.shape[axis]:
                other |= int(labels[tuple(there)]) not in (label, ignore)
        answer[place] = {
            "classes": label % 256,
            "mask": label != 0,
            "foreground": label != 0,
            "membrane": label == 0 or other,
            "border": 0 if label == 0 else 1 + other,
        }[target]
        if label == ignore:
            answer[place] = IGNORE
    return answer


@pytest.mark.parametrize("target", CLASSES)
@pytest.mark.parametrize("ignore", [None, 0, 3])
@pytest.mark.parametrize("in_plane", [False, True])
def test_classes_are_those_of_a_loop_over_voxels(
    target: str, ignore: int | None, in_plane: bool
) -> None:
    for shape in ((13, 9), (4, 7, 6)):
        labels = np.random.default_rng(1).integers(0, 5, shape).repeat(2, axis=-1)
        found = class_map(labels, target, ignore=ignore, in_plane=in_plane)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, by_hand(labels, target, ignore, in_plane))


@given(SEEDS, st.sampled_from(CLASSES), st.booleans(), st.sampled_from([2, 3]))
def test_classes_of_a_crop_are_the_crop_of_the_whole(
    seed: int, target: str, in_plane: bool, ndim: int
) -> None:
    random = np.random.default_rng(seed)
    labels = cells((11,) * ndim, 9, seed, fill=0.6)
    ignore = int(random.choice(labels.ravel()))
    start, stop = np.sort(random.integers(0, 12, (2, ndim)), axis=0)
    crop = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    low = np.maximum(start - MARGIN, 0)
    grown = tuple(slice(a, b + MARGIN) for a, b in zip(low, stop, strict=True))
    inner = tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, low, strict=True))
    options = {"ignore": ignore, "in_plane": in_plane}
    whole = class_map(labels, target, **options)
    np.testing.assert_array_equal(class_map(labels[grown], target, **options)[inner], whole[crop])


def test_grey_values_have_no_classes() -> None:
    with pytest.raises(ValueError, match="has no classes"):
        class_map(np.zeros((2, 2), int), "values")


@pytest.mark.parametrize("target", CLASSES[1:])
def test_every_class_has_a_name(target: str) -> None:
    count = class_count(target)
    assert count is not None
    assert len(class_names(target, count)) == count
    labels = cells((30, 30), 9, seed=0, fill=0.5)
    assert set(np.unique(class_map(labels, target))) == set(range(count))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any))
def test_balance_keeps_the_mean_and_makes_classes_weigh_the_same(counts: list[int]) -> None:
    weights = balance_weights(counts)
    sums = [w * n for w, n in zip(weights, counts, strict=True)]
    assert sum(sums) == pytest.approx(sum(counts))
    assert all(one == pytest.approx(max(sums)) for one, n in zip(sums, counts, strict=True) if n)
    assert all(w == 0 for w, n in zip(weights, counts, strict=True) if not n)


def equation_two(objects: Ids, w0: float, sigma: float) -> NDArray[np.float32]:
    """Return the paper's map, one distance transform for each object."""
    maps = [
        ndimage.distance_transform_edt(objects != one) for one in np.unique(objects[objects != 0])
    ]
    first, second, *_ = np.sort([*maps, *np.full((2, *objects.shape), np.inf)], axis=0)
    weights = w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return np.where(first + second <= REACH * sigma, weights, 0).astype(np.float32)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(40, 33), (14, 17, 12)])
def test_border_weights_are_those_of_one_distance_map_for_each_object(
    shape: tuple[int, ...], seed: int
) -> None:
    count = (0, 1, 2, 3, 9, 17)[seed % 6]
    objects = cells(shape, count, seed, fill=0.45) if count else np.zeros(shape, np.uint8)
    sigma = 3.5 if seed % 2 else 1.5
    truth = equation_two(objects, 10, sigma)
    found = border_weights(objects, sigma=sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.where(objects == 0, truth, 0), rtol=1e-6)
    touching = class_map(objects, "membrane") == 1
    found = border_weights(objects, sigma=sigma, at=touching)
    np.testing.assert_allclose(found, np.where(touching, truth, 0), rtol=1e-6)


@given(SEEDS, st.sampled_from([0.8, 1.5]), st.booleans(), st.sampled_from([2, 3]))
def test_border_weights_of_a_crop_are_the_crop_of_the_whole(
    seed: int, sigma: float, in_plane: bool, ndim: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (30,) * ndim if ndim == 3 else (50, 40)
    objects = cells(shape, int(random.integers(1, 25)), seed, fill=0.4)
    start = [int(random.integers(0, n - 6)) for n in shape]
    stop = [min(n, a + int(random.integers(5, 12))) for n, a in zip(shape, start, strict=True)]
    margin = weights_margin(sigma)
    low = [max(a - margin, 0) for a in start]
    grown = tuple(slice(a, b + margin) for a, b in zip(low, stop, strict=True))
    inner = tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, low, strict=True))
    crop = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    whole = border_weights(objects, sigma=sigma, in_plane=in_plane)
    part = border_weights(objects[grown], sigma=sigma, in_plane=in_plane)
    np.testing.assert_array_equal(part[inner], whole[crop])


def test_border_weights_in_plane_are_those_of_each_plane() -> None:
    objects = cells((5, 24, 20), 20, seed=3, fill=0.5)
    found = border_weights(objects, sigma=2, in_plane=True)
    for plane, ids in zip(found, objects, strict=True):
        np.testing.assert_array_equal(plane, border_weights(ids, sigma=2))


def test_voxels_that_nobody_labelled_are_no_object_and_weigh_nothing() -> None:
    objects = np.array([[1, 0, 7, 0, 0, 2]])
    found = border_weights(objects, sigma=4, ignore=7)
    truth = border_weights(np.where(objects == 7, 0, objects), sigma=4)
    np.testing.assert_array_equal(found, np.where(objects == 7, 0, truth))
    assert (found[0, [1, 3, 4]] > 0).all()
