"""Creating an output and writing whole write units to it: an OME-Zarr group with one array.

Arrays that are written have the channels first where there are any, then the axes of the
volume. Each write unit must have one writer: two writers in one shard lose data silently.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from tilepipe.errors import BadRequest, TileError
from tilepipe.storage.contents import LEDGER, check_ours, check_ways, clear
from tilepipe.storage.guarded import Granted, GuardedStore
from tilepipe.storage.location import check_writable, folders, locate
from tilepipe.storage.objects import Key, explain, told
from tilepipe.volumes.ome import image_attributes, parse_multiscale, read_node

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import DTypeLike, NDArray
    from zarr.core.common import JSON
    from zarr.types import AnyArray

    from tilepipe.geometry import Region, Shape
    from tilepipe.storage.guarded import Leave
    from tilepipe.storage.location import Place

T = TypeVar("T")
OURS = "tilepipe"
"""The group attribute under which our own attributes lie; it marks an output as ours."""
_LARGEST_CHUNK = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """An open output, into which regions are written; safe to share between threads.

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
    _leave: Leave = field(repr=False)

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
            with self._leave.writing():
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


def create_target(
    path: str | Path,
    *,
    axes: str,
    shape: Sequence[int],
    dtype: DTypeLike,
    chunks: Sequence[int],
    shards: Sequence[int] | None,
    scale: Sequence[float],
    units: Sequence[str | None],
    attributes: Mapping[str, object],
    translation: Sequence[float] | None = None,
    ome_version: Literal["0.4", "0.5"] = "0.5",
    overwrite: bool = False,
) -> None:
    """Create an OME-Zarr group whose array ``0`` is all zeros.

    ``axes`` are ``zyx`` and the like, with ``c`` in front for channels; ``shape`` is per axis of
    ``axes``. ``chunks``, ``shards``, ``scale``, ``units`` and ``translation``, where it lies,
    may leave out the channel axis: then a chunk holds one channel, a shard all of them.
    ``attributes`` are JSON, kept for us.

    ``overwrite`` removes an earlier output of ours; nothing else is ever removed. Raises
    BadRequest where something else lies at or in ``path``, or the sizes do not fit.
    """
    target = locate(path, "output")
    kind = np.dtype(dtype).newbyteorder("=")
    if kind != np.float32 and kind.kind != "u":
        raise BadRequest(f"dtype (={kind}) of an output must be float32 or an unsigned integer")
    if ome_version not in ("0.4", "0.5"):
        raise BadRequest(f"ome_version (={ome_version}) must be 0.4 or 0.5")
    if ome_version == "0.4" and shards is not None:
        raise BadRequest(
            f"shards (={tuple(shards)}) need Zarr v3; leave them out or take ome_version 0.5"
        )
    whole = tuple(int(n) for n in shape)
    chunk = _per_axis("chunks", tuple(chunks), 1, axes)
    shard = None if shards is None else _per_axis("shards", tuple(shards), whole[0], axes)
    _check_sizes(axes, whole, chunk, shard, kind.itemsize)
    described = image_attributes(
        axes=axes,
        scale=_per_axis("scale", tuple(float(n) for n in scale), 1.0, axes),
        units=_per_axis("units", tuple(units), None, axes),
        name=target.stem,
        version=ome_version,
        translation=()
        if translation is None
        else _per_axis("translation", tuple(float(n) for n in translation), 0.0, axes),
    )
    try:
        check_free(path, overwrite=overwrite)
        clear(target)
        with _told(target):
            _create(target, axes, whole, kind, chunk, shard, {**described, OURS: dict(attributes)})
    except OSError as error:
        raise BadRequest(f"output (={path}) cannot be created: {error}") from error


def _create(
    path: Place,
    axes: str,
    shape: Shape,
    dtype: np.dtype[np.generic],
    chunks: Shape,
    shards: Shape | None,
    attributes: dict[str, object],
) -> None:
    """Write the group, its mark first, and then the array.

    Labels are compressed by zstd; floats by blosc with bit shuffle and lz4, three times faster
    than its zstd and six per cent larger on probabilities. Chunks carry a checksum, so that rot
    is found and not read as voxels (except floats in Zarr v2, which has none for them).
    """
    modern = "ome" in attributes
    store = GuardedStore.of(path, Granted())
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


def _per_axis(name: str, values: tuple[T, ...], channel: T, axes: str) -> tuple[T, ...]:
    """Return one value per axis of ``axes``; ``channel`` where the channel axis was left out."""
    if axes.startswith("c") and len(values) == len(axes) - 1:
        return (channel, *values)
    if len(values) != len(axes):
        raise BadRequest(f"{name} (={values}) must have one number per axis of {axes}")
    return values


def _check_sizes(
    axes: str, shape: Shape, chunks: Shape, shards: Shape | None, itemsize: int
) -> None:
    if axes.removeprefix("c") not in ("yx", "zyx", "tyx", "tzyx") or len(shape) != len(axes):
        raise BadRequest(f"axes (={axes}) must be (c)(t)(z)yx, one per dimension of {shape}")
    if min(shape) < 1 or min(chunks) < 1 or (shards is not None and min(shards) < 1):
        raise BadRequest(f"shape {shape}, chunks {chunks} and shards {shards} must be positive")
    if shards is not None and any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise BadRequest(f"shards (={shards}) must be multiples of the chunks (={chunks})")
    if int(np.prod(chunks, dtype=object)) * itemsize > _LARGEST_CHUNK:
        raise BadRequest(f"chunks (={chunks}) must hold less than 2 GiB; take smaller ones")


def _is_ours(path: Place) -> bool:
    try:
        node = read_node(path)
    except (BadRequest, OSError):
        return False
    return node is not None and node.kind == "group" and isinstance(node.attributes.get(OURS), dict)


def is_empty(folder: Place) -> bool:
    """Whether a folder holds nothing but claims of who is about to write there."""
    inner = {path.name for path in folders(folder)}  # a bucket may show one that holds nothing
    return all(
        entry.name == LEDGER
        and entry.name in inner
        and all(path.name.startswith("lock") for path in entry.iterdir())
        for entry in folder.iterdir()
    )


def check_free(path: str | Path, *, overwrite: bool) -> None:
    """Raise BadRequest unless the place is free: absent, empty, or ours and to be overwritten."""
    target = locate(path, "output")
    _check_parent(target, target)
    if not target.exists():
        return
    if not target.is_dir():
        raise BadRequest(f"output (={target}) is an existing file; name another path")
    if is_empty(target):
        return
    if not (_is_ours(target) or (target / LEDGER / "plan.json").is_file()):
        raise BadRequest(
            f"output (={target}) exists and is no output of tilepipe, so it is never removed; "
            "name another path"
        )
    if not overwrite:
        raise BadRequest(f"output (={target}) exists; overwrite it or name another path")
    check_ours(target)


def check_target(path: str | Path, source_path: str | Path, *, touch: bool = True) -> None:
    """Check that an output can be created at ``path`` without touching the source.

    Raises BadRequest for an existing file, a folder that is missing or cannot be written, and a
    place equal to, inside or containing the source or inside another array. What else may lie
    at ``path`` is for `create_target` to judge. Leaves nothing behind; writes nothing to a bucket
    unless ``touch``.
    """
    target, source = locate(path, "output"), locate(source_path, "source")
    if target == source or _is_same_file(target, source):
        raise BadRequest(f"output (={path}) must not be the source (={source_path})")
    if source in target.parents:
        raise BadRequest(f"output (={path}) must not lie inside the source (={source_path})")
    if target in source.parents:
        raise BadRequest(f"output (={path}) must not contain the source (={source_path})")
    if isinstance(target, Path) and target.exists() and not target.is_dir():
        raise BadRequest(f"output (={path}) is an existing file; name another path")
    _check_parent(target, path)
    check_ways(target)
    if touch or isinstance(target, Path):
        _check_writable(target, path)
    for folder in target.parents:
        try:
            node = read_node(folder)
        except (BadRequest, OSError):
            continue
        if node is not None and node.kind == "array":
            raise BadRequest(f"output (={path}) must not lie inside the array {folder}")


def _check_writable(target: Place, path: object) -> None:
    if isinstance(target, Path):
        folder: Place = target if target.exists() else target.parent
    elif not target.path:
        raise BadRequest(f"output (={path}) must be a path in a bucket, not all of it")
    else:
        folder = target / LEDGER  # where what is there for a moment disturbs nobody
    try:
        check_writable(folder)
    except OSError as error:
        raise BadRequest(f"output (={path}) needs {folder} to be writable: {error}") from error


def _is_same_file(one: Place, other: Place) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.exists() and other.exists() and one.samefile(other)
    return False


def _check_parent(target: Place, path: object) -> None:
    if isinstance(target, Path) and not target.parent.is_dir():
        is_file = "is a file" if target.parent.exists() else "does not exist; create it first"
        raise BadRequest(f"output (={path}) needs the folder {target.parent}, which {is_file}")


def open_target(path: str | Path, *, leave: Leave | None = None, durable: bool = True) -> Target:
    """Open an output that `create_target` made, for writing; BadRequest for anything else.

    ``leave`` is asked before each object that is written; without one there must be nobody else
    who writes there. What is ``durable`` outlives a power failure as soon as it is written.
    """
    target = locate(path, "output")
    node = read_node(target) if _is_ours(target) else None
    image = None if node is None else parse_multiscale(node.attributes)
    if node is None or image is None or image.axes is None:
        raise BadRequest(f"output (={path}) is no output of tilepipe")
    if read_node(target / "0") is None:
        raise BadRequest(f"output (={path}) has lost its array 0")
    try:
        store = GuardedStore.of(target / "0", leave or Granted(), durable=durable)
        array = zarr.open_array(store, mode="r+", zarr_format=node.zarr_format)
    except Exception as error:
        cause = f"{type(error).__name__}: {explain(error)}"[:200]
        raise BadRequest(
            f"output (={path}) has an array 0 that cannot be opened: {cause}"
        ) from error
    axes = "".join(image.axes)
    first = 1 if axes.startswith("c") else 0
    return Target(
        path=str(target),
        axes=axes[first:],
        shape=array.shape[first:],
        channels=array.shape[0] if first else None,
        dtype=array.dtype,
        chunks=array.chunks[first:],
        shards=None if array.shards is None else array.shards[first:],
        _array=array,
        _store=store,
        _leave=leave or Granted(),
    )


def read_attributes(path: str | Path) -> dict[str, object]:
    """Return our own attributes of an output; BadRequest for a place that is no output."""
    target = locate(path, "output")
    node = read_node(target) if _is_ours(target) else None
    ours = None if node is None else node.attributes[OURS]
    if not isinstance(ours, dict):
        raise BadRequest(f"output (={path}) is no output of tilepipe")
    return ours


def update_attributes(
    path: str | Path, attributes: Mapping[str, object], *, leave: Leave | None = None
) -> None:
    """Set our own attributes of an output; those not named are kept. One writer at a time.

    ``leave`` is asked before they are written; without one it must be sure that we own the output.
    """
    merged = {**read_attributes(path), **attributes}
    target = locate(path, "output")
    with _told(target):
        store = GuardedStore.of(target, leave or Granted())
        group = zarr.open_group(store, mode="r+", use_consolidated=False)
        group.attrs[OURS] = cast("dict[str, JSON]", merged)
        store.sync()


def _told(place: Place) -> AbstractContextManager[None]:
    """Raise as an OSError what zarr hands on from a store."""
    return told(place) if isinstance(place, Key) else nullcontext()
