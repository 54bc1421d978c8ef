"""Opening a volume and reading regions of it: Zarr v2 and v3, OME-Zarr, TIFF and SVS.

Regions are in the order of the volume's axes without channels; arrays that are read have the
channels first, ``(channels, *region.shape)``, in the machine's byte order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape
from tilepipe.host.process import borrowed
from tilepipe.storage.location import locate
from tilepipe.storage.objects import explain, is_of_store
from tilepipe.volumes import tiff
from tilepipe.volumes.dimensions import name_axes, pick_channels
from tilepipe.volumes.images import check_dtype, choose_image, open_array
from tilepipe.volumes.ome import (
    Multiscale,
    dimension_names,
    no_array,
    parent_image,
    read_node,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tifffile
    from numpy.typing import NDArray
    from zarr.types import AnyArray

    from tilepipe.storage.location import Place
    from tilepipe.storage.objects import ObjectKey


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
    translation: tuple[float, ...]
    """Where the first voxel lies along ``axes``, in ``units``; 0.0 where nothing says it."""
    is_placed: bool
    """Whether its metadata can say where it lies: an OME-Zarr's that say how large voxels are."""
    channel_names: tuple[str, ...]
    """What the channels are called, in the order in which they are read; empty if not said."""
    notices: tuple[str, ...]
    """What is to be said of how the source was understood, and of what it holds besides."""
    series: int | None
    """The image asked for, of several; None where it was left to the source."""
    requested_channels: tuple[int | str, ...] | None
    """The channels asked for; None for all."""
    decoded_channels: int
    """Channels that are decoded where those that were asked for are read: whole chunks."""
    _array: AnyArray = field(repr=False)
    _letters: tuple[str | None, ...] = field(repr=False)
    """Axis of each dimension of ``_array``; None for one of length 1 that was dropped."""
    _picked: tuple[int, ...] | None = field(repr=False)
    """The channels that are read, in that order; None for all."""
    _file: tifffile.TiffFile | None = field(repr=False)

    def __post_init__(self) -> None:
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        request = self.requested_axes, self.level, self.series, self.requested_channels
        return _reopen, (self.path, *request)

    @property
    def dimensions(self) -> str:
        """Return the axes as stored, with channels; - is one of length 1 that was left out."""
        return "".join(letter or "-" for letter in self._letters)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all voxels and channels, uncompressed."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    def read(self, region: Region) -> NDArray[np.generic]:
        """Return the voxels ``(channels, *region.shape)`` of a region inside the volume.

        Raises ValueError for a region that reaches outside, OSError for voxels that cannot be
        read or decoded. A chunk that Zarr does not store reads as the fill value.
        """
        if region.intersect(Region.whole(self.shape)) != region:
            raise ValueError(f"region (={region}) must lie inside the volume {self.shape}")
        along: dict[str, slice | NDArray[np.intp]] = dict(
            zip(self.axes, region.slices, strict=True)
        )
        if self._picked is not None:
            along["c"] = np.asarray(self._picked, np.intp)
        index = tuple(
            0 if letter is None else along.get(letter, slice(None)) for letter in self._letters
        )
        try:  # orthogonally: channels may be in any order
            voxels = np.asarray(self._array.get_orthogonal_selection(index))
        except MemoryError:
            raise
        except Exception as error:
            # Each chunk of a store that does not answer would take as long to say so.
            place = "" if is_of_store(error) else self._culprit(region)
            raise OSError(
                f"cannot read voxels {region} of {self.path}{place}: {explain(error)}"
            ) from error
        named = [letter for letter in self._letters if letter is not None]
        voxels = np.moveaxis(voxels, named.index("c"), 0) if self.has_channels else voxels[None]
        if self._picked is not None and not self.has_channels:
            voxels = voxels[list(self._picked)]  # the one, as often as it was asked for
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


def _reopen(
    path: str,
    axes: str | None,
    level: int,
    series: int | None,
    channels: tuple[int | str, ...] | None,
) -> Volume:
    return open_volume(path, axes=axes, level=level, series=series, channels=channels)


@borrowed()
def open_volume(
    path: str | Path,
    *,
    axes: str | None = None,
    level: int = 0,
    series: int | None = None,
    channels: Sequence[int | str] | None = None,
) -> Volume:
    """Open a Zarr array, an OME-Zarr image, a TIFF or an SVS file for reading.

    Args:
        path: Where it lies: a path, which may lead into a store (``volume.zarr/em/raw``), or an
            address (``s3://...``, ``https://...``).
        axes: The dimensions as they are stored, with letters of ``t z y x c``. Without it the file
            says them, or they are assumed from their number.
        level: The resolution of a pyramid; 0 is the full one.
        series: The image, where a file or a group holds several.
        channels: The channels that are read, in this order, by number or by the name that the
            source gives them; by default all.

    Returns:
        The open volume. Its ``read`` takes a region in voxels along its axes without channels, and
        returns ``(channels, *region.shape)``.

    Raises:
        BadRequest: There is no volume of at least two dimensions of integers or floats, or what is
            asked for is not in it.
    """
    if not str(path):
        raise BadRequest("source is empty; name a Zarr, an OME-Zarr or a TIFF")
    resolved = locate(path, "source")
    request = _SourceRequest(axes, level, series, None if channels is None else tuple(channels))
    try:
        if not isinstance(resolved, Path):
            return _open_remote(resolved, request)
        if not resolved.exists():
            raise BadRequest(f"source (={path}) does not exist")
        if resolved.is_dir():
            return _open_zarr(resolved, request)
        if not resolved.is_file():
            raise BadRequest(f"source (={path}) must be a file or a folder")
        return _open_tiff(resolved, request)
    except BadRequest:
        raise
    except (OSError, ValueError) as error:
        raise BadRequest(f"source (={path}) cannot be opened: {error}") from error


@dataclass(frozen=True, slots=True)
class _SourceRequest:
    """What is asked of a source; see `open_volume`."""

    axes: str | None
    level: int
    series: int | None
    channels: tuple[int | str, ...] | None


def _open_remote(key: ObjectKey, request: _SourceRequest) -> Volume:
    if key.suffix.lower() in tiff.SUFFIXES:
        raise BadRequest(
            f"source (={key}) must be a Zarr store, or a file here; copy or convert it"
        )
    return _open_zarr(key, request)


def _open_tiff(path: Path, request: _SourceRequest) -> Volume:
    tiff.check_start(path)
    image = tiff.open_tiff(path, level=request.level, series=request.series)
    try:
        stated, notices = None, list(image.notices)
        if request.axes is None:
            try:
                stated = tiff.plain_axes(image.axes, image.array.shape)
            except ValueError as error:
                raise BadRequest(f"{error} in {path}; name them with axes") from error
            notices += tiff.renamed(image.axes, stated)
        letters = tuple((request.axes or "").lower()) if stated is None else stated
        sizes = [image.sizes.get(letter or "") for letter in letters]
        return _volume(
            path,
            image.array,
            request,
            stated=stated,
            kind="TIFF",
            storage=image.storage,
            scale=tuple(1.0 if size is None else size[0] for size in sizes) if any(sizes) else None,
            units=tuple(None if size is None else size[1] for size in sizes),
            channel_names=image.channel_names,
            notices=notices,
            file=image.file,
        )
    except BaseException:
        image.file.close()
        raise


def _open_zarr(path: Place, request: _SourceRequest) -> Volume:
    node, level = read_node(path), request.level
    notices: list[str] = []
    image: Multiscale | None
    if node is None or node.kind == "group":
        if node is None or (chosen := choose_image(path, node, request.series)) is None:
            raise BadRequest(no_array(path))
        image, group = chosen.image, chosen.group
        notices += chosen.notices
        if not 0 <= level < len(image.paths):
            raise BadRequest(
                f"level (={level}) must be one of {', '.join(map(str, range(len(image.paths))))}, "
                f"the resolutions of {path}"
            )
        folder = group / image.paths[level]
        node = read_node(folder)
        if node is None or node.kind != "array":
            raise BadRequest(f"source (={path}) lacks its array {image.paths[level]}")
        kind, place = f"OME-Zarr {image.version}", level
        if len(image.paths) > 1:
            notices.append(f"the source has {len(image.paths)} resolutions: level {level} is read")
    else:
        if level != 0:
            raise BadRequest(f"level (={level}) must be 0; {path} is one array, not an image group")
        if request.series not in (None, 0):
            raise BadRequest(f"series (={request.series}) must be 0; {path} is one array")
        folder, kind = path, f"zarr v{node.zarr_format}"
        image, place = parent_image(path)
    array = open_array(folder, node)
    stated: tuple[str | None, ...] | None = None
    if image is not None and image.axes is not None:
        stated = image.axes
    elif request.axes is None:
        stated = dimension_names(node, folder)
    return _volume(
        path,
        array,
        request,
        stated=stated,
        kind=kind,
        storage=[node.metadata, str(folder)],
        scale=None if image is None else image.scales[place],
        units=None if image is None else image.units,
        translation=None if image is None else image.translations[place],
        channel_names=() if image is None else image.channel_names,
        notices=notices,
    )


def _volume(
    path: Place,
    array: AnyArray,
    request: _SourceRequest,
    *,
    stated: tuple[str | None, ...] | None,
    kind: str,
    storage: object,
    scale: tuple[float, ...] | None = None,
    units: tuple[str | None, ...] | None = None,
    translation: tuple[float, ...] | None = None,
    channel_names: tuple[str, ...] = (),
    notices: Sequence[str] = (),
    file: tifffile.TiffFile | None = None,
) -> Volume:
    """Return the handle; ``scale`` and the like are per dimension of ``array``."""
    check_dtype(array.dtype, str(array.dtype), path)
    if 0 in array.shape:
        raise BadRequest(f"source (={path}) of shape {array.shape} must have no axis of length 0")
    letters, assumed = name_axes(request.axes, stated, array.shape, path)
    dims = [place for place, letter in enumerate(letters) if letter not in (None, "c")]
    channel = letters.index("c") if "c" in letters else None
    try:
        chunks, shards = array.chunks, array.shards
    except NotImplementedError as error:
        raise BadRequest(f"source (={path}) must have chunks of one size: {error}") from error
    for name, numbers in (("scale", scale), ("translation", translation)):
        if numbers is not None and len(numbers) != array.ndim:
            raise BadRequest(
                f"{name} (={numbers}) in the metadata of {path} must have one per dimension"
            )
    count, chunk = (1, 1) if channel is None else (array.shape[channel], chunks[channel])
    picked = None
    if request.channels is not None:
        picked = pick_channels(request.channels, count, channel_names, path)
    names = channel_names if len(channel_names) == count else ()
    decoded = {n // chunk for n in (range(count) if picked is None else picked)}
    described = json.dumps([str(path), request.level, storage, picked], sort_keys=True)
    return Volume(
        path=str(path),
        axes="".join(letters[place] or "" for place in dims),
        shape=tuple(array.shape[place] for place in dims),
        channels=count if picked is None else len(picked),
        has_channels=channel is not None,
        dtype=array.dtype.newbyteorder("="),
        scale=tuple(1.0 if scale is None else scale[place] for place in dims),
        units=tuple(None if units is None else units[place] for place in dims),
        chunks=tuple(chunks[place] for place in dims),
        channel_chunk=chunk,
        shards=None if shards is None else tuple(shards[place] for place in dims),
        identity=hashlib.sha256(described.encode()).hexdigest(),
        axes_assumed=assumed,
        kind=kind,
        requested_axes=request.axes,
        level=request.level,
        translation=tuple(0.0 if translation is None else translation[place] for place in dims),
        is_placed=scale is not None and file is None,
        channel_names=tuple(names[n] for n in picked or range(count)) if any(names) else (),
        notices=tuple(notices),
        series=request.series,
        requested_channels=request.channels,
        decoded_channels=max(
            sum(min(chunk, count - n * chunk) for n in decoded), len(picked or ())
        ),
        _array=array,
        _letters=letters,
        _picked=picked,
        _file=file,
    )
