"""Chunks that are kept: the same voxels, decoded once, in bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr

from tests.support import noise, write_volume
from tilepipe.geometry import Region
from tilepipe.testing.storage import FailingStore
from tilepipe.volumes.cache import ChunkCache
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (9, 40, 50)


def regions(count: int) -> list[Region]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        ends = [sorted(random.integers(0, n + 1, 2).tolist()) for n in SHAPE]
        found.append(Region(tuple(a for a, _ in ends), tuple(b for _, b in ends)))
    return found


@pytest.mark.parametrize("nbytes", [1, 4000, 10**9])
def test_kept_chunks_are_the_volume(tmp_path: Path, nbytes: int) -> None:
    image = noise(2, *SHAPE, dtype="uint16")
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "czyx", (1, 4, 16, 16)))
    cached = ChunkCache(nbytes).open(volume)
    with ThreadPoolExecutor(4) as pool:
        for region, found in zip(regions(40), pool.map(cached.read, regions(40)), strict=True):
            assert np.array_equal(found, image[(slice(None), *region.slices)])


def test_each_chunk_is_decoded_once_where_all_fit(tmp_path: Path) -> None:
    image = noise(*SHAPE)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "zyx", (4, 16, 16)))
    cache = ChunkCache(10**6)
    cached = cache.open(volume)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cached.read, [Region.whole(SHAPE)] * 16))
    assert cache.bytes_read == image.nbytes


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    image = noise(*SHAPE)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "zyx", (4, 16, 16)))
    cache = ChunkCache(3 * 4 * 16 * 16)
    cached = cache.open(volume)
    for region in regions(20):
        cached.read(region)
    kept = sum(chunk.result().nbytes for chunk in cache._chunks.values())
    assert 0 < kept == cache._held <= cache.nbytes


def test_a_chunk_that_cannot_be_read_is_an_error_until_it_can(tmp_path: Path) -> None:
    image = noise(32, 32)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx", (16, 16)))
    store = FailingStore(volume._array.store)
    cached = ChunkCache(10**6).open(replace(volume, _array=zarr.open_array(store, mode="r")))
    region = Region((20, 20), (30, 30))
    with store.failing("c/1/1", directions={"reading"}) as fault:
        for _ in range(2):
            with pytest.raises(OSError, match="c/1/1"):
                cached.read(region)
        assert np.array_equal(cached.read(Region((0, 0), (16, 16)))[0], image[:16, :16])
    assert fault.count >= 2
    assert np.array_equal(cached.read(region)[0], image[region.slices])
