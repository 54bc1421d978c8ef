"""Decoded chunks kept in memory, so that neighbouring patches do not decode them again."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.geometry import Region, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.volumes.volume import Volume

    Voxels = NDArray[np.generic]
    ChunkId = tuple[int, Shape]


class ChunkCache:
    """The chunks used last, up to a number of bytes; safe to share between threads."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.bytes_read = 0
        """Bytes decoded so far."""
        self._held = 0
        self._chunks: OrderedDict[ChunkId, Future[Voxels]] = OrderedDict()
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def open(self, volume: Volume) -> CachedVolume:
        """Return the volume, read through this cache."""
        return CachedVolume(volume, self, next(self._numbers))

    def get(self, volume: Volume, number: int, place: Shape) -> Voxels:
        """Return a chunk, decoded at most once while it is kept, however many threads ask."""
        key = (number, place)
        with self._lock:
            earlier = self._chunks.get(key)
            if earlier is not None:
                self._chunks.move_to_end(key)
            else:
                future = self._chunks[key] = Future()
        if earlier is not None:
            return earlier.result()
        start = tuple(n * size for n, size in zip(place, volume.chunks, strict=True))
        stop = tuple(
            min(a + n, m) for a, n, m in zip(start, volume.chunks, volume.shape, strict=True)
        )
        try:
            voxels = volume.read(Region(start, stop))
        except BaseException as error:
            with self._lock:
                del self._chunks[key]
            future.set_exception(error)
            raise
        future.set_result(voxels)
        with self._lock:
            self.bytes_read += voxels.nbytes
            self._held += voxels.nbytes
            while self._held > self.nbytes and (oldest := self._oldest(key)) is not None:
                self._held -= self._chunks.pop(oldest).result().nbytes
        return voxels

    def _oldest(self, key: ChunkId) -> ChunkId | None:
        """Return the chunk to forget: the one used longest ago that is there, but ``key``."""
        return next((k for k, chunk in self._chunks.items() if k != key and chunk.done()), None)


class CachedVolume:
    """A volume whose chunks are kept once they were read."""

    def __init__(self, volume: Volume, cache: ChunkCache, number: int) -> None:
        self.volume = volume
        self.shape = volume.shape
        self.channels = volume.channels
        self.dtype = volume.dtype
        self._cache, self._number = cache, number

    def read(self, region: Region) -> Voxels:
        """Return the voxels ``(channels, *region.shape)`` of a region inside the volume."""
        chunks = self.volume.chunks
        spans = [
            range(a // size, -(-b // size))
            for a, b, size in zip(region.start, region.stop, chunks, strict=True)
        ]
        voxels = np.empty((self.channels, *region.shape), self.dtype)
        for place in itertools.product(*spans):
            chunk = self._cache.get(self.volume, self._number, place)
            start = tuple(n * size for n, size in zip(place, chunks, strict=True))
            stop = tuple(a + n for a, n in zip(start, chunk.shape[1:], strict=True))
            part = region.intersect(Region(start, stop))
            voxels[(slice(None), *part.within(region.start))] = chunk[
                (slice(None), *part.within(start))
            ]
        return voxels
