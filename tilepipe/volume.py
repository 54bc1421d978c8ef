"""Opening a volume and reading regions of it: Zarr v2 and v3, OME-Zarr, TIFF and SVS.

Regions are in the order of the volume's axes without channels; arrays that are read have the
channels first, ``(channels, *region.shape)``, in the machine's byte order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import zarr

from tilepipe import tiff
from tilepipe.bucket import explain, is_of_store
from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape, mirror
from tilepipe.ome import (
    AXES,
    Multiscale,
    Node,
    dimension_names,
    no_array,
    parent_image,
    parse_multiscale,
    read_node,
)
from tilepipe.place import locate, zarr_store
from tilepipe.process import borrowed

if TYPE_CHECKING:
    import tifffile
    from numpy.typing import NDArray
    from zarr.types import AnyArray

    from tilepipe.bucket import Key
    from tilepipe.place import Place

_ASSUMED = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}
_ORDERS = ("yx", "zyx", "tyx", "tzyx")
_warnings_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Volume:
    """An open array of voxels, of which regions are read; safe to share between threads.

    Pickled, it is opened again by the same request in the other process.
    """

    path: str
    """Where it lies, links resolved; a path, or an address such as ``s3://...``."""
    axes: str
    """Axes as stored, without channels: ``yx``, ``zyx``, ``tyx`` or ``tzyx``."""
    shape: Shape
    """Voxels along each of ``axes``."""
    channels: int
    """Values per voxel; 1 where there is no channel axis."""
    has_channels: bool
    """Whether there is a channel axis, be it of length 1."""
    dtype: np.dtype[np.generic]
    """Type of what is read, in the machine's byte order; an integer or a float."""
    scale: tuple[float, ...]
    """Size of a voxel along each of ``axes`` in ``units``; 1.0 where nothing says it."""
    units: tuple[str | None, ...]
    """Unit of ``scale`` along each of ``axes``; None where nothing says it."""
    chunks: Shape
    """What one read decodes at least, along each of ``axes``."""
    channel_chunk: int
    """Channels in a chunk."""
    shards: Shape | None
    """Voxels of a shard along each of ``axes``; None where there are no shards."""
    identity: str
    """SHA-256 of the path, the level and how the voxels are stored; not of the voxels."""
    axes_assumed: bool
    """True where nothing said the axes and they were guessed from the number of dimensions."""
    kind: str
    """The format, such as ``OME-Zarr 0.5``, for messages."""
    requested_axes: str | None
    """The axes asked for; None where they were left to the file."""
    level: int
    """The resolution asked for; 0 is the full one."""
    _array: AnyArray = field(repr=False)
    _letters: tuple[str | None, ...] = field(repr=False)
    """Axis of each dimension of ``_array``; None for one of length 1 that was dropped."""
    _file: tifffile.TiffFile | None = field(repr=False)

    def __post_init__(self) -> None:
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def __reduce__(self) -> tuple[object, tuple[str, str | None, int]]:
        return _reopen, (self.path, self.requested_axes, self.level)

    @property
    def dimensions(self) -> str:
        """Axes as stored, channels among them; - for one of length 1 that was left out."""
        return "".join(letter or "-" for letter in self._letters)

    @property
    def nbytes(self) -> int:
        """Bytes of all voxels and channels, uncompressed."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    def read(self, region: Region) -> NDArray[np.generic]:
        """Return the voxels ``(channels, *region.shape)`` of a region inside the volume.

        Raises ValueError for a region that reaches outside, OSError for voxels that cannot be
        read or decoded. A chunk that Zarr does not store reads as the fill value.
        """
        if region.intersect(Region.whole(self.shape)) != region:
            raise ValueError(f"region (={region}) must lie inside the volume {self.shape}")
        along = dict(zip(self.axes, region.slices, strict=True))
        index = tuple(
            0 if letter is None else along.get(letter, slice(None)) for letter in self._letters
        )
        try:
            voxels = np.asarray(self._array[index])
        except MemoryError:
            raise
        except Exception as error:
            # Each chunk of a store that does not answer would take as long to say so.
            place = "" if is_of_store(error) else self._culprit(region)
            raise OSError(
                f"cannot read voxels {region} of {self.path}{place}: {explain(error)}"
            ) from error
        kept = [letter for letter in self._letters if letter is not None]
        voxels = np.moveaxis(voxels, kept.index("c"), 0) if self.has_channels else voxels[None]
        return np.ascontiguousarray(voxels, dtype=self.dtype)

    def _culprit(self, region: Region) -> str:
        """Name the first stored chunk in a region that cannot be read, where chunks have names."""
        if self._file is not None:
            return ""
        stored = self._array.shards or self._array.chunks
        along = dict(zip(self.axes, zip(region.start, region.stop, strict=True), strict=True))
        spans = []
        for letter, edge, length in zip(self._letters, stored, self._array.shape, strict=True):
            start, stop = along.get(letter or "", (0, length))
            spans.append(range(start // edge, -(-stop // edge)))
        for place in itertools.product(*spans):
            try:
                self._array[
                    tuple(slice(n * e, (n + 1) * e) for n, e in zip(place, stored, strict=True))
                ]
            except Exception:  # as before
                return f" (chunk {self._array.metadata.encode_chunk_key(place)})"
        return ""


def _reopen(path: str, axes: str | None, level: int) -> Volume:
    return open_volume(path, axes=axes, level=level)


class Readable(Protocol):
    """What regions are read of: a volume, or one whose chunks are kept."""

    @property
    def shape(self) -> Shape: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype[np.generic]: ...  # noqa: D102
    def read(self, region: Region) -> NDArray[np.generic]: ...  # noqa: D102


def read_mirrored(volume: Readable, region: Region) -> NDArray[np.generic]:
    """Return the voxels of a region that may reach outside the volume, which goes on mirrored.

    Only the voxels that are needed are read, once. Law: equals the same region of the whole
    volume grown by ``numpy.pad(mode="reflect")``, repeated as often as needed.
    """
    if region.size == 0:
        return np.zeros((volume.channels, *region.shape), dtype=volume.dtype)
    places = [mirror(*ends) for ends in zip(region.start, region.stop, volume.shape, strict=True)]
    box = Region(tuple(int(p.min()) for p in places), tuple(int(p.max()) + 1 for p in places))
    voxels = volume.read(box)
    for axis, (place, origin) in enumerate(zip(places, box.start, strict=True), start=1):
        wanted = place - origin
        if not np.array_equal(wanted, np.arange(voxels.shape[axis])):
            voxels = np.take(voxels, wanted, axis=axis)
    return voxels


def read_zero_padded(volume: Volume, region: Region) -> NDArray[np.generic]:
    """Return the voxels of a region that may reach outside the volume, which goes on as zeros."""
    inside = region.intersect(Region.whole(volume.shape))
    if inside == region:
        return volume.read(region)
    voxels = np.zeros((volume.channels, *region.shape), dtype=volume.dtype)
    if inside.size:
        voxels[(slice(None), *inside.within(region.start))] = volume.read(inside)
    return voxels


@borrowed()
def open_volume(path: str | Path, *, axes: str | None = None, level: int = 0) -> Volume:
    """Open a Zarr array, an OME-Zarr image, a TIFF or an SVS file for reading.

    ``path`` may lead into a store (``volume.zarr/em/raw``). ``axes`` names the dimensions as
    they are stored, with letters of ``t z y x c``; without it the file says them, or they are
    assumed from their number. ``level`` chooses the resolution, 0 being the full one.

    Raises BadRequest for whatever is no volume of at least two dimensions of integers or floats.
    """
    if not str(path):
        raise BadRequest("source is empty; name a Zarr, an OME-Zarr or a TIFF")
    resolved = locate(path, "source")
    try:
        if not isinstance(resolved, Path):
            return _open_remote(resolved, axes=axes, level=level)
        if not resolved.exists():
            raise BadRequest(f"source (={path}) does not exist")
        if resolved.is_dir():
            return _open_zarr(resolved, axes=axes, level=level)
        if not resolved.is_file():
            raise BadRequest(f"source (={path}) must be a file or a folder")
        return _open_tiff(resolved, axes=axes, level=level)
    except BadRequest:
        raise
    except (OSError, ValueError) as error:
        raise BadRequest(f"source (={path}) cannot be opened: {error}") from error


def _open_remote(key: Key, *, axes: str | None, level: int) -> Volume:
    if key.suffix.lower() in tiff.SUFFIXES:
        raise BadRequest(
            f"source (={key}) must be a Zarr store, or a file here; copy or convert it"
        )
    return _open_zarr(key, axes=axes, level=level)


def _open_tiff(path: Path, *, axes: str | None, level: int) -> Volume:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise BadRequest(f"source (={path}) is an empty file")
    if magic not in tiff.MAGIC:
        raise BadRequest(
            f"source (={path}) must be a Zarr store, a TIFF or an SVS file; "
            + (
                "this one is damaged at its start: copy it again"
                if path.suffix.lower() in tiff.SUFFIXES
                else "convert it"
            )
        )
    image = tiff.open_tiff(path, level=level)
    try:
        stated = None
        if axes is None:
            try:
                stated = tiff.plain_axes(image.axes, image.array.shape)
            except ValueError as error:
                raise BadRequest(f"{error} in {path}; name them with axes") from error
        status = path.stat()
        return _volume(
            path,
            image.array,
            axes=axes,
            level=level,
            stated=stated,
            kind="TIFF",
            storage=[status.st_size, status.st_mtime_ns],
            file=image.file,
        )
    except BaseException:
        image.file.close()
        raise


def _open_zarr(path: Place, *, axes: str | None, level: int) -> Volume:
    node = read_node(path)
    if node is None or node.kind == "group":
        image = None if node is None else _image(path, node)
        if image is None:
            raise BadRequest(no_array(path))
        if not 0 <= level < len(image.paths):
            raise BadRequest(
                f"level (={level}) must be one of {', '.join(map(str, range(len(image.paths))))}, "
                f"the resolutions of {path}"
            )
        folder = path / image.paths[level]
        node = read_node(folder)
        if node is None or node.kind != "array":
            raise BadRequest(f"source (={path}) lacks its array {image.paths[level]}")
        kind, place = f"OME-Zarr {image.version}", level
    else:
        if level != 0:
            raise BadRequest(f"level (={level}) must be 0; {path} is one array, not an image group")
        folder, kind = path, f"zarr v{node.zarr_format}"
        image, place = parent_image(path)
    array = _open_array(folder, node)
    stated: tuple[str | None, ...] | None = None
    if image is not None and image.axes is not None:
        stated = image.axes
    elif axes is None:
        stated = dimension_names(node, folder)
    return _volume(
        path,
        array,
        axes=axes,
        level=level,
        stated=stated,
        kind=kind,
        storage=node.metadata,
        scale=None if image is None else image.scales[place],
        units=None if image is None else image.units,
    )


def _image(path: Place, node: Node) -> Multiscale | None:
    try:
        return parse_multiscale(node.attributes)
    except ValueError as error:
        raise BadRequest(
            f"source (={path}) has wrong OME metadata: {error}; name one of its arrays instead"
        ) from error


def _open_array(path: Place, node: Node) -> AnyArray:
    """Open the array and check what can be checked before zarr warns or fails on it."""
    stated = node.metadata.get("data_type", node.metadata.get("dtype"))
    if isinstance(stated, dict):
        stated = stated.get("name")
    try:
        dtype = np.dtype(stated if isinstance(stated, str) else "O")
    except TypeError:
        dtype = np.dtype("O")
    _check_dtype(dtype, str(stated), path)
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of codecs outside the specification, and the like
            return zarr.open_array(
                zarr_store(path, read_only=True), mode="r", zarr_format=node.zarr_format
            )
    except Exception as error:
        cause = f"{type(error).__name__}: {explain(error)}"[:200]
        raise BadRequest(f"source (={path}) cannot be opened by zarr: {cause}") from error


def _check_dtype(dtype: np.dtype[np.generic], stated: str, path: Place) -> None:
    if dtype.kind not in "iuf":
        remedy = "uint8" if dtype.kind == "b" else "float32"
        raise BadRequest(
            f"source (={path}) has voxels of type {stated}; they must be integers or floats: "
            f"convert it, for example to {remedy}"
        )


def _letters(
    axes: str | None, stated: tuple[str | None, ...] | None, shape: Shape, path: Place
) -> tuple[tuple[str | None, ...], bool]:
    """Return the axis of each dimension (None: dropped), and whether they were assumed."""
    letters: tuple[str | None, ...]
    if axes is not None:
        letters = tuple(axes.lower())
    elif stated is not None:
        letters = tuple(
            None if letter == "t" and length == 1 else letter
            for letter, length in zip(stated, shape, strict=False)
        )
    elif len(shape) in _ASSUMED:
        letters = tuple(_ASSUMED[len(shape)])
    else:
        raise BadRequest(f"source (={path}) of shape {shape} must have 2 to 5 dimensions")
    given = axes if axes is not None else "".join(letter or "t" for letter in letters)
    kept = [letter for letter in letters if letter is not None]
    if len(letters) != len(shape) or (stated is not None and len(stated) != len(shape)):
        raise BadRequest(
            f"axes (={given}) must name the {len(shape)} dimensions of {path}, shape {shape}"
        )
    if len(set(kept)) != len(kept) or not all(letter in tuple(AXES) for letter in kept):
        raise BadRequest(f"axes (={given}) must be letters of {AXES}, each once; name them anew")
    if not {"y", "x"} <= set(kept):
        raise BadRequest(f"axes (={given}) must contain y and x; name them with axes")
    if "".join(kept).replace("c", "") not in _ORDERS:
        raise BadRequest(f"axes (={given}) must end in (z)yx; transpose the array")
    return letters, axes is None and stated is None


def _volume(
    path: Place,
    array: AnyArray,
    *,
    axes: str | None,
    level: int,
    stated: tuple[str | None, ...] | None,
    kind: str,
    storage: object,
    scale: tuple[float, ...] | None = None,
    units: tuple[str | None, ...] | None = None,
    file: tifffile.TiffFile | None = None,
) -> Volume:
    """Return the handle; ``scale`` and ``units`` are per dimension of ``array``."""
    _check_dtype(array.dtype, str(array.dtype), path)
    if 0 in array.shape:
        raise BadRequest(f"source (={path}) of shape {array.shape} must have no axis of length 0")
    letters, assumed = _letters(axes, stated, array.shape, path)
    dims = [place for place, letter in enumerate(letters) if letter not in (None, "c")]
    channel = letters.index("c") if "c" in letters else None
    try:
        chunks, shards = array.chunks, array.shards
    except NotImplementedError as error:
        raise BadRequest(f"source (={path}) must have chunks of one size: {error}") from error
    if scale is not None and len(scale) != array.ndim:
        raise BadRequest(f"scale (={scale}) in the metadata of {path} must have one per dimension")
    described = json.dumps([str(path), level, storage], sort_keys=True)
    return Volume(
        path=str(path),
        axes="".join(letters[place] or "" for place in dims),
        shape=tuple(array.shape[place] for place in dims),
        channels=1 if channel is None else array.shape[channel],
        has_channels=channel is not None,
        dtype=array.dtype.newbyteorder("="),
        scale=tuple(1.0 if scale is None else scale[place] for place in dims),
        units=tuple(None if units is None else units[place] for place in dims),
        chunks=tuple(chunks[place] for place in dims),
        channel_chunk=1 if channel is None else chunks[channel],
        shards=None if shards is None else tuple(shards[place] for place in dims),
        identity=hashlib.sha256(described.encode()).hexdigest(),
        axes_assumed=assumed,
        kind=kind,
        requested_axes=axes,
        level=level,
        _array=array,
        _letters=letters,
        _file=file,
    )
