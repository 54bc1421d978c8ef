"""Where classes lie: counts equal the whole's, draws are as likely as they should be."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import write_volume
from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks, Region
from tilepipe.testing.strategies import regions
from tilepipe.training.dataset import TrainingVolume
from tilepipe.training.sampler import Census, ClassReader
from tilepipe.training.targets import class_map
from tilepipe.volumes.cache import ChunkCache
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MEMBRANE = ClassReader("membrane", None, False, 2)


def instances(seed: int = 0) -> NDArray[np.uint16]:
    """Return two planes of square cells with ids; a part is background."""
    random = np.random.default_rng(seed)
    ids = random.permutation(2 * 12 * 12).reshape(2, 12, 12).astype(np.uint16)
    return np.repeat(np.repeat(ids, 5, axis=1), 5, axis=2)


def census(
    place: Path, labels: NDArray[np.generic], reader: ClassReader, **options: object
) -> Census:
    write_volume(place, labels, "zyx", (1, 16, 20))
    volume = open_volume(place)
    given = {"classes": None, "balance": False, "cached": 10**6, "seed": 0, **options}
    regions = (Region((0, 0, 0), (1, 60, 60)), Region((1, 10, 7), (2, 50, 60)))
    kept = ChunkCache(10**8).open(volume)
    classes = given.pop("classes")
    made = Census([TrainingVolume(kept, kept, None, regions, ())], reader, **given)  # type: ignore[arg-type]
    made.count(classes=classes)  # type: ignore[arg-type]
    return made


def test_counts_are_those_of_the_whole(tmp_path: Path) -> None:
    labels = instances()
    found = census(tmp_path / "l.zarr", labels, MEMBRANE)
    first = class_map(labels[0], "membrane")
    second = class_map(labels[1], "membrane")[10:50, 7:60]
    wanted = np.bincount(first.ravel(), minlength=2) + np.bincount(second.ravel(), minlength=2)
    assert found.counts == wanted.tolist()


@given(
    shape=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    chunks=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    data=st.data(),
)
def test_blocks_cover_a_region_once(
    shape: tuple[int, int], chunks: tuple[int, int], data: st.DataObject
) -> None:
    region = data.draw(regions(shape))
    count = np.zeros(shape, np.uint8)
    if region.size:
        for block in Blocks.of(shape, chunks, region):
            count[block.slices] += 1
    wanted = np.zeros(shape, np.uint8)
    wanted[region.slices] = 1
    assert np.array_equal(count, wanted)


@pytest.mark.parametrize("kept", [10**6, 1])
def test_each_class_is_as_likely_with_balance(tmp_path: Path, kept: int) -> None:
    labels = np.zeros((2, 60, 60), np.uint8)
    labels[0, 3:6, 50:53] = 1
    labels[1, 20:40, 20:30] = 2
    labels[1, 12:14, 8:10] = 255
    kind = ClassReader("classes", 255, False, 2)
    made = census(tmp_path / "l.zarr", labels, kind, balance=True, cached=kept)
    assert made.counts == [5720 - 9 - 200 - 4, 9, 200]
    drawn = Counter()
    for number in range(3000):
        _, region, voxel = made.draw(number, np.random.default_rng((1, number)))
        assert all(a <= v < b for a, v, b in zip(region.start, voxel, region.stop, strict=True))
        drawn[int(labels[voxel])] += 1
    assert set(drawn) == {0, 1, 2}
    if kept > 1:
        assert all(abs(drawn[c] - 1000) < 120 for c in range(3))  # 4.6 standard deviations


def test_draws_from_a_large_block_are_of_the_class_and_all_over(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (1, 200, 210)).astype(np.uint8)
    volume = open_volume(write_volume(tmp_path / "l.zarr", labels, "zyx", (1, 200, 210)))
    opened = ChunkCache(10**8).open(volume)
    item = TrainingVolume(opened, opened, None, (Region.whole((1, 200, 210)),), ())
    kind = ClassReader("classes", None, False, 2)
    made = Census([item], kind, balance=True, cached=9, seed=0)
    made.count(classes=None)
    drawn = [made.draw(n, np.random.default_rng(n))[2] for n in range(400)]
    assert abs(sum(int(labels[voxel]) for voxel in drawn) - 200) < 50  # 5 standard deviations
    assert abs(np.mean([voxel[1] for voxel in drawn]) - 100) < 15
    assert abs(np.mean([voxel[2] for voxel in drawn]) - 105) < 15


def test_without_balance_each_labelled_voxel_is_as_likely(tmp_path: Path) -> None:
    labels = np.full((2, 60, 60), 255, np.uint8)
    labels[0, :30] = 0
    labels[0, 30:33, :10] = 1
    made = census(tmp_path / "l.zarr", labels, ClassReader("classes", 255, False, 2))
    drawn = Counter(
        int(labels[made.draw(n, np.random.default_rng((1, n)))[2]]) for n in range(4000)
    )
    assert set(drawn) == {0, 1}
    assert abs(drawn[1] - 4000 * 30 / 1830) < 40  # 5 standard deviations


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    labels = instances()
    with pytest.raises(BadRequest, match=r"labels hold .* no class in 0:255.*--target mask"):
        census(tmp_path / "a.zarr", labels, ClassReader("classes", None, False, 2))
    with pytest.raises(BadRequest, match=r"hold the class 3 .*classes \(=3\).*--classes 4"):
        census(tmp_path / "b.zarr", labels % 4, ClassReader("classes", None, False, 2), classes=3)
    with pytest.raises(BadRequest, match="no voxel of the training regions is labelled"):
        census(tmp_path / "c.zarr", labels * 0 + 7, ClassReader("classes", 7, False, 2))
