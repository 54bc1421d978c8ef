"""Components and growing, block by block, are those of the whole array."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import read, write_volume
from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.instances import blocks
from tilepipe.instances.components import label_components
from tilepipe.instances.growth import grow, grow_objects
from tilepipe.testing.strategies import shapes
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray


def mask(shape: tuple[int, ...], share: float, seed: int) -> NDArray[np.uint8]:
    return (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)


def same_partition(found: NDArray[np.generic], wanted: NDArray[np.generic]) -> bool:
    """Whether one is the other renumbered, background kept."""
    pairs = np.unique(np.stack((found.ravel(), wanted.ravel())).astype(np.int64), axis=1)
    once = all(len(np.unique(side)) == pairs.shape[1] for side in pairs)
    return once and np.array_equal(found == 0, wanted == 0)


def nonzero(image: NDArray[np.generic]) -> NDArray[np.bool_]:
    return image[0] != 0


sizes = shapes(largest=7)


@settings(deadline=None, max_examples=30)
@given(shape=sizes, data=st.data(), share=st.floats(0.2, 0.8), plane=st.booleans())
def test_components_are_those_of_the_whole(
    shape: tuple[int, ...], data: st.DataObject, share: float, plane: bool
) -> None:
    block = tuple(data.draw(st.integers(2, 5)) for _ in shape)
    image = mask(shape, share, data.draw(st.integers(0, 99)))
    around = scipy.ndimage.generate_binary_structure(len(shape), 1)
    if plane and len(shape) == 3:
        around[0] = around[2] = False
    wanted, count = scipy.ndimage.label(image, around)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.zarr"
        source = open_volume(write_volume(Path(folder) / "m.zarr", image, "zyx"[-len(shape) :]))
        steps = []
        found = label_components(
            source,
            path,
            foreground=nonzero,
            per_plane=plane,
            block=block,
            progress=lambda done, blocks: steps.append((done, blocks)),
        )
        assert found == count
        ids = read(path)
        assert same_partition(ids, wanted)
        assert np.unique(ids[ids != 0]).tolist() == list(range(1, count + 1))
        assert steps[-1][0] == steps[-1][1] == len(steps)


def test_a_region_is_labelled_alone_and_channels_are_the_foregrounds(tmp_path: Path) -> None:
    image = np.stack([mask((4, 20, 30), 0.6, seed) for seed in (0, 1)])
    source = open_volume(write_volume(tmp_path / "m.zarr", image, "czyx"))
    region = Region((1, 3, 5), (4, 20, 27))
    found = label_components(
        source,
        tmp_path / "ids.zarr",
        foreground=lambda block: (block[0] & block[1]) != 0,
        region=region,
        block=(2, 8, 8),
    )
    wanted, count = scipy.ndimage.label((image[0] & image[1])[region.slices])
    assert found == count
    assert same_partition(read(tmp_path / "ids.zarr"), wanted)


def test_frames_are_never_joined(tmp_path: Path) -> None:
    image = np.ones((3, 4, 5), np.uint8)
    source = open_volume(write_volume(tmp_path / "m.zarr", image, "tyx"))
    assert label_components(source, tmp_path / "ids.zarr", foreground=nonzero) == 3


def test_a_snake_through_many_blocks_is_one_object(tmp_path: Path) -> None:
    image = np.zeros((64, 64), np.uint8)
    image[::2] = 1
    image[1::4, -1] = image[3::4, 0] = 1
    source = open_volume(write_volume(tmp_path / "m.zarr", image, "yx"))
    path = tmp_path / "ids.zarr"
    assert label_components(source, path, foreground=nonzero, block=(5, 7)) == 1
    assert np.array_equal(read(path), image)


def test_default_blocks_join_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 256 * 256)
    monkeypatch.setattr(blocks, "CHUNK", 64)
    image = mask((3, 300, 310), 0.6, 3)
    source = open_volume(write_volume(tmp_path / "m.zarr", image, "zyx", chunks=(1, 100, 310)))
    wanted, count = scipy.ndimage.label(image)
    assert label_components(source, tmp_path / "ids.zarr", foreground=nonzero) == count
    assert same_partition(read(tmp_path / "ids.zarr"), wanted)
    seeds = np.where(wanted % 50 == 1, wanted, 0).astype(np.uint32)
    objects = open_volume(write_volume(tmp_path / "s.zarr", seeds, "zyx", chunks=(1, 64, 64)))
    grow_objects(objects, tmp_path / "grown.zarr", per_plane=True)
    assert np.array_equal(read(tmp_path / "grown.zarr"), grow(seeds.astype(np.int64), (1, 2))[0])


def simple_growth(labels: NDArray[np.int64], axes: tuple[int, ...]) -> NDArray[np.int64]:
    """Grow a step at a time, voxel by voxel, as it is defined."""
    while True:
        after = labels.copy()
        for place in zip(*np.nonzero(labels == 0), strict=True):
            near = set()
            for axis in axes:
                for step in (-1, 1):
                    beside = list(place)
                    beside[axis] += step
                    if 0 <= beside[axis] < labels.shape[axis]:
                        near.add(int(labels[tuple(beside)]))
            if len(near - {0}) == 1:
                after[place] = (near - {0}).pop()
        if np.array_equal(after, labels):
            return labels
        labels = after


@settings(deadline=None, max_examples=30)
@given(shape=sizes, data=st.data(), plane=st.booleans())
def test_growing_is_that_of_the_whole(
    shape: tuple[int, ...], data: st.DataObject, plane: bool
) -> None:
    block = tuple(data.draw(st.integers(2, 5)) for _ in shape)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    labels = random.integers(1, 5, shape) * (random.random(shape) < data.draw(st.floats(0, 0.5)))
    axes = tuple(range(len(shape)))[-2:] if plane else tuple(range(len(shape)))
    wanted = simple_growth(labels, axes)
    found, complete = grow(labels, axes)
    assert complete
    assert np.array_equal(found, wanted)
    with tempfile.TemporaryDirectory() as folder:
        source = write_volume(
            Path(folder) / "i.zarr", labels.astype(np.uint32), "zyx"[-len(shape) :]
        )
        grow_objects(open_volume(source), Path(folder) / "g.zarr", per_plane=plane, block=block)
        assert np.array_equal(read(Path(folder) / "g.zarr"), wanted)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["g.zarr", "i.zarr"]


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    source = open_volume(write_volume(tmp_path / "m.zarr", mask((9, 9), 0.5, 0), "yx"))

    def broken(_: NDArray[np.generic]) -> NDArray[np.bool_]:
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        label_components(source, tmp_path / "ids.zarr", foreground=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["m.zarr"]


def test_bad_places_and_regions_are_refused(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "m.zarr", mask((9, 9), 0.5, 0), "yx")
    source = open_volume(path)
    for place in (path, path / "in", tmp_path, tmp_path / "no" / "ids.zarr"):
        with pytest.raises(BadRequest):
            label_components(source, place, foreground=nonzero)
        with pytest.raises(BadRequest):
            grow_objects(source, place)
    for region in (Region((0, 0), (0, 9)), Region((0, 0), (9, 10))):
        with pytest.raises(BadRequest, match="region"):
            label_components(source, tmp_path / "i.zarr", foreground=nonzero, region=region)
    assert [path.name for path in tmp_path.iterdir()] == ["m.zarr"]
