"""The array of an output: created with its codecs, and written by whole write units.

Arrays that are written have the channels first where there are any, then the axes of the
volume. Each write unit must have one writer: two writers in one shard lose data silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from tilepipe.errors import BadRequest, TileError
from tilepipe.storage.guarded import GuardedStore, NoGuard
from tilepipe.storage.objects import explain

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.core.common import JSON
    from zarr.types import AnyArray

    from tilepipe.geometry import Region, Shape
    from tilepipe.storage.guarded import Guard
    from tilepipe.storage.location import Place

T = TypeVar("T")
_LARGEST_CHUNK = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class OutputArray:
    """The array of an open output, into which regions are written; safe to share between threads.

    Law: regions of whole write units, written in any order from any number of threads, give
    the same array as one assignment.
    """

    path: str
    """Where the group lies, links resolved; a path, or an address such as ``s3://...``."""
    axes: str
    """Axes of the array without channels, such as ``zyx``."""
    shape: Shape
    """Voxels along each of ``axes``."""
    channels: int | None
    """Values per voxel; None where there is no channel axis."""
    dtype: np.dtype[np.generic]
    """Type of the voxels."""
    chunks: Shape
    """Voxels of a chunk along each of ``axes``."""
    shards: Shape | None
    """Voxels of a shard along each of ``axes``; None where there are no shards."""
    _array: AnyArray = field(repr=False)
    _store: GuardedStore = field(repr=False)
    _guard: Guard = field(repr=False)

    def write(self, region: Region, array: NDArray[np.generic]) -> None:
        """Write ``array``, of all channels, to a ``region`` of whole write units.

        Its shape is ``(channels, *region.shape)``, or ``region.shape`` where there is no channel
        axis; a region may be cut off by the volume's end. Raises ValueError where the region,
        the shape or the type do not fit, OSError where the voxels cannot be written.
        """
        unit = write_unit(self.chunks, self.shards)
        ends = zip(region.start, region.stop, unit, self.shape, strict=True)
        if any(a % u or (b % u and b != n) or not 0 <= a <= b <= n for a, b, u, n in ends):
            raise ValueError(f"region (={region}) must be whole write units {unit} of {self.shape}")
        shape = region.shape if self.channels is None else (self.channels, *region.shape)
        if array.shape != shape or array.dtype != self.dtype:
            raise ValueError(
                f"array of shape {array.shape}, {array.dtype}, must be {shape}, {self.dtype}"
            )
        index = region.slices if self.channels is None else (slice(None), *region.slices)
        try:
            with self._guard.writing():
                self._array[index] = array
                self._store.sync()
        except (MemoryError, TileError):
            raise
        except Exception as error:
            raise OSError(
                f"cannot write voxels {region} of {self.path}: {explain(error)}"
            ) from error


def write_unit(chunks: Shape, shards: Shape | None) -> Shape:
    """Return what must have a single writer: the shard where there is one, else the chunk."""
    return chunks if shards is None else shards


def create_group(
    path: Place,
    axes: str,
    shape: Shape,
    dtype: np.dtype[np.generic],
    chunks: Shape,
    shards: Shape | None,
    attributes: dict[str, object],
) -> None:
    """Create the group of an output, its mark first, and then its array ``0``, all zeros.

    Labels are compressed by zstd; floats by blosc with bit shuffle and lz4, three times faster
    than its zstd and six per cent larger on probabilities. Chunks carry a checksum, so that rot
    is found and not read as voxels (except floats in Zarr v2, which has none for them).
    """
    modern = "ome" in attributes
    store = GuardedStore.of(path, NoGuard())
    zarr.create_group(store, zarr_format=3 if modern else 2, attributes=attributes)
    if modern:
        zarr.create_array(
            store,
            name="0",
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]
            if dtype.kind == "f"
            else ZstdCodec(level=3, checksum=True),
            fill_value=0,
            dimension_names=list(axes),
            zarr_format=3,
        )
        store.sync()
        return
    blosc: dict[str, JSON] = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 2}
    zstd: dict[str, JSON] = {"id": "zstd", "level": 3, "checksum": True}
    zarr.create_array(
        store,
        name="0",
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        compressors=blosc if dtype.kind == "f" else zstd,
        fill_value=0,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        attributes={"_ARRAY_DIMENSIONS": list(axes)},
        zarr_format=2,
    )
    store.sync()


def per_axis(name: str, values: tuple[T, ...], channel: T, axes: str) -> tuple[T, ...]:
    """Return one value per axis of ``axes``; ``channel`` where the channel axis was left out."""
    if axes.startswith("c") and len(values) == len(axes) - 1:
        return (channel, *values)
    if len(values) != len(axes):
        raise BadRequest(f"{name} (={values}) must have one number per axis of {axes}")
    return values


def check_sizes(
    axes: str, shape: Shape, chunks: Shape, shards: Shape | None, itemsize: int
) -> None:
    """Raise BadRequest where the axes and the sizes of an array do not fit one another."""
    if axes.removeprefix("c") not in ("yx", "zyx", "tyx", "tzyx") or len(shape) != len(axes):
        raise BadRequest(f"axes (={axes}) must be (c)(t)(z)yx, one per dimension of {shape}")
    if min(shape) < 1 or min(chunks) < 1 or (shards is not None and min(shards) < 1):
        raise BadRequest(f"shape {shape}, chunks {chunks} and shards {shards} must be positive")
    if shards is not None and any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise BadRequest(f"shards (={shards}) must be multiples of the chunks (={chunks})")
    if int(np.prod(chunks, dtype=object)) * itemsize > _LARGEST_CHUNK:
        raise BadRequest(f"chunks (={chunks}) must hold less than 2 GiB; take smaller ones")
