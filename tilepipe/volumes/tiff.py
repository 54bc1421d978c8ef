"""TIFF and SVS files as Zarr arrays, decoded strip by strip or tile by tile, never whole."""

from __future__ import annotations

import logging
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tifffile
import zarr

from tilepipe.errors import BadRequest
from tilepipe.volumes.calibration import channel_names, voxel_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zarr.types import AnyArray

    from tilepipe.geometry import Shape

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files, little- and big-endian."""
SUFFIXES = (".tif", ".tiff", ".svs", ".btf")
LETTERS = tuple("tzyxc")
_DAMAGED = re.compile(r"invalid (page )?offset|corrupt|TiffTag 2\d\d .*invalid")
_OFFSET = re.compile(r"offset(?: to first page)?[ =](\d+)")


@dataclass(frozen=True, slots=True)
class TiffImage:
    """One image of a TIFF file, at one of its resolutions; holds the file open."""

    array: AnyArray
    """The voxels, in the file's own order of axes."""
    axes: str
    """The file's own letter per dimension, such as ``YXS`` or ``IYX``."""
    sizes: Mapping[str, tuple[float, str | None]]
    """Size of a voxel and its unit, by axis of a volume; only those that the file says."""
    channel_names: tuple[str, ...]
    """What the file calls the channels; empty where it does not."""
    storage: tuple[object, ...]
    """What tells the voxels apart from others: sizes and times of files, and which image."""
    notices: tuple[str, ...]
    """What the file holds besides, and how it was understood."""
    file: tifffile.TiffFile
    """The open file; whoever holds the image closes it."""


class _Complaints(logging.Filter):
    """Holds back what tifffile warns of in this thread until the file is understood."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.thread != self.thread:
            return True
        self.records.append(record)
        return False


def check_start(path: Path) -> None:
    """Refuse a file that does not begin as a TIFF does."""
    with path.open("rb") as file:
        magic = file.read(8)
    if not magic:
        raise BadRequest(f"source (={path}) is an empty file")
    if magic[:4] in MAGIC and len(magic) == 8:
        return
    if any(start.startswith(magic[:4]) for start in MAGIC):
        raise _truncated(path, f"at byte {len(magic)}, within its first words")
    named = path.suffix.lower() in SUFFIXES
    raise BadRequest(
        f"source (={path}) must be a Zarr store, a TIFF or an SVS file; "
        + ("this one is damaged at its start: copy it again" if named else "convert it")
    )


def open_tiff(path: Path, *, level: int, series: int | None = None) -> TiffImage:
    """Open an image of ``path``, of several number ``series``, at resolution ``level``.

    Equal images of one page each are a stack along z where no number is given. Raises BadRequest
    for a file that cannot be read, saying why, for a level or an image that is not there, and
    where there are several images of which none is the obvious one.
    """
    complaints = _Complaints()
    logger = logging.getLogger("tifffile")
    logger.addFilter(complaints)
    try:
        file = tifffile.TiffFile(path)
        try:
            image = _image(file, path, level=level, number=series, complaints=complaints.records)
        except BaseException:
            file.close()
            raise
    except (BadRequest, MemoryError):
        raise
    except struct.error as error:
        raise _truncated(path, "within its tables") from error
    except Exception as error:
        _check_offsets(complaints.records, path)
        if "corrupted IFD" in str(error):  # which tifffile says of tables that are cut off, too
            raise BadRequest(
                f"source (={path}) is truncated or damaged: its tables are not whole ({error});"
                " copy it again"
            ) from error
        raise _unreadable(path, str(error) or type(error).__name__) from error
    finally:
        logger.removeFilter(complaints)
    for record in complaints.records:
        logger.handle(record)
    return image


def count_images(path: Path) -> int:
    """Return how many images a TIFF file holds; 1 for what is none."""
    try:
        with tifffile.TiffFile(path) as file:
            return len(file.series)
    except (OSError, ValueError, struct.error):  # opening it will say what is wrong
        return 1


def _image(
    file: tifffile.TiffFile,
    path: Path,
    *,
    level: int,
    number: int | None,
    complaints: list[logging.LogRecord],
) -> TiffImage:
    try:
        images = file.series
    except IndexError:  # of a file without pages
        images = []
    messages = [record.getMessage() for record in complaints]
    _check_offsets(complaints, path)
    if damaged := [message for message in messages if _DAMAGED.search(message)]:
        raise _unreadable(path, damaged[0])
    if not images:
        raise _unreadable(path, "it holds no image")
    if wrong := [message for message in messages if "failed to reshape" in message]:
        raise _unreadable(path, f"its description does not fit its pages, {wrong[0]}")
    whole, index, notices = _chosen(file, path, number)
    if not 0 <= level < len(whole.levels):
        raise BadRequest(
            f"level (={level}) must be one of {', '.join(map(str, range(len(whole.levels))))}, "
            f"the resolutions of {path}"
        )
    image = whole.levels[level]
    _check_pages(image, path)
    notices += [f"tifffile says of the source: {text}" for text in messages if "OME series" in text]
    if len(whole.levels) > 1:
        notices.append(f"the source has {len(whole.levels)} resolutions: level {level} is read")
    sizes = voxel_sizes(file, whole, index)
    for axis, full, part in zip(whole.axes.lower(), whole.shape, image.shape, strict=True):
        if axis in sizes and full != part:
            sizes[axis] = (sizes[axis][0] * full / part, sizes[axis][1])
    return TiffImage(
        zarr.open_array(whole.aszarr(level=level), mode="r", zarr_format=2),
        image.axes,
        sizes,
        channel_names(file, index),
        (*_stored(image, path), "stack" if whole not in file.series else index),
        tuple(notices),
        file,
    )


def _check_offsets(complaints: list[logging.LogRecord], path: Path) -> None:
    """Refuse a file whose tables point past its end, where tifffile has complained of that.

    It calls the place of a value wrong where the value, not the place alone, is past the end.
    """
    end = path.stat().st_size
    for text in (record.getMessage() for record in complaints):
        places = [int(place) for place in _OFFSET.findall(text)]
        if any(place >= end or ("value" in text and place >= 8) for place in places):
            raise _truncated(path, f"at byte {end:,}, and its tables point past that")


def _chosen(
    file: tifffile.TiffFile, path: Path, number: int | None
) -> tuple[tifffile.TiffPageSeries, int, list[str]]:
    """Return the image to read, its number, and what is to be said of the others."""
    images = file.series
    count = len(images)
    if number is not None:
        if not 0 <= number < count:
            raise BadRequest(
                f"series (={number}) must be one of {_listed(images)}: the images of {path}"
            )
        others = count > 1
        return images[number], number, [_others(images, number)] if others else []
    first = images[0]
    if count == 1:
        return first, 0, []
    if _is_stack(images):
        pages = [image.keyframe for image in images]
        stack = tifffile.TiffPageSeries(
            pages, (count, *first.shape), first.dtype, "Z" + first.axes, kind=first.kind
        )
        notice = f"the source holds {count} equal images of one page: read as a stack along z"
        return stack, 0, [f"{notice} (--series reads one of them)"]
    if first.name == "Baseline" or all(image.keyframe.is_reduced for image in images[1:]):
        return first, 0, [_others(images, 0)]
    raise BadRequest(
        f"source (={path}) holds {count} images; choose one with series: {_listed(images)}"
    )


def _is_stack(images: Sequence[tifffile.TiffPageSeries]) -> bool:
    """Return whether the images are pages of one kind that were written one by one.

    The images of OME-TIFF and of slides are said to be several, and are none.
    """
    return (
        all(image.kind in ("shaped", "generic") for image in images)
        and all(len(image) == 1 and len(image.levels) == 1 for image in images)
        and all(image.axes in ("YX", "YXS", "SYX") for image in images)
        and len({(image.shape, image.axes, image.keyframe.hash) for image in images}) == 1
    )


def _others(images: Sequence[tifffile.TiffPageSeries], number: int) -> str:
    return f"the source holds {len(images)} images: number {number} is read of {_listed(images)}"


def _listed(images: Sequence[tifffile.TiffPageSeries]) -> str:
    """Return numbers, names and shapes of the first images."""
    shown = [
        f"{number} ({image.name + ', ' if image.name else ''}{image.axes}"
        f" {'x'.join(map(str, image.shape))})"
        for number, image in enumerate(images[:8])
    ]
    return ", ".join(shown) + (f", ... {len(images) - 1}" if len(images) > 8 else "")


def _stored(image: tifffile.TiffPageSeries, path: Path) -> tuple[object, ...]:
    """Return size and time of the file, and of the others that an image's pages lie in."""
    paths = {path}
    if image.is_multifile:
        paths |= {Path(page.parent.filehandle.path) for page in image.pages if page is not None}
    files = [(file.name, file.stat()) for file in sorted(paths)]
    if len(files) == 1:
        return files[0][1].st_size, files[0][1].st_mtime_ns
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in files)


def _check_pages(image: tifffile.TiffPageSeries, path: Path) -> None:
    """Refuse an image of which not all voxels are there, or that cannot be decoded."""
    if image.kind in ("ome", "mmstack", "ndtiff"):  # whose metadata name planes, maybe elsewhere
        missing = sum(page is None for page in image.pages)
        if missing:
            raise BadRequest(
                f"source (={path}) lacks {missing} of the {len(image)} planes that its metadata"
                " name; put the files beside it that hold them"
            )
    if image.is_multifile:
        return
    last, end = _last_byte(image), path.stat().st_size
    if last > end:
        raise _truncated(path, f"at byte {end:,}, its voxels at {last:,}")
    try:
        image.keyframe.decode(None, 0)
    except Exception as error:
        raise BadRequest(
            f"source (={path}) has voxels that cannot be decoded: {error}; convert it"
        ) from error


def _last_byte(series: tifffile.TiffPageSeries) -> int:
    """Return where the voxels of the last page end, as the file says."""
    if series.dataoffset is not None:
        return int(series.dataoffset) + int(series.nbytes)
    page = series[len(series) - 1]
    if page is None:
        return 0
    return max(
        (a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0
    )


def _truncated(path: Path, where: str) -> BadRequest:
    return BadRequest(f"source (={path}) is truncated: it ends {where}; copy it again")


def _unreadable(path: Path, cause: str) -> BadRequest:
    cause = " ".join(cause.split())[:200]
    return BadRequest(f"source (={path}) cannot be read as a TIFF: {cause}")


def plain_axes(axes: str, shape: Shape) -> tuple[str | None, ...]:
    """Return the file's axes as ``t z y x c``, None for one of length 1 that is to be dropped.

    Samples are channels; unnamed pages are ``z``, or ``t`` where there is a ``z``. Raises
    ValueError where more axes are left than there are letters.

    >>> plain_axes("IYX", (40, 256, 256)), plain_axes("QYXS", (1, 8, 8, 3))
    (('z', 'y', 'x'), (None, 'y', 'x', 'c'))
    """
    named: list[str | None] = [{"S": "c"}.get(a, a.lower()) for a in axes]
    for place, length in enumerate(shape):
        if length == 1 and (named[place] not in LETTERS or named.count(named[place]) > 1):
            named[place] = None
    for place, name in enumerate(named):
        if name is None or (name in LETTERS and name not in named[:place]):
            continue
        free = [letter for letter in "zt" if letter not in named]
        if name in LETTERS or not free:
            raise ValueError(f"axes {axes} of shape {shape} cannot be told apart")
        named[place] = free[0]
    return tuple(named)


def renamed(axes: str, plain: Sequence[str | None]) -> list[str]:
    """Return what to say where the file's own axes are taken for others.

    >>> renamed("IYX", ("z", "y", "x")), renamed("TZYXS", ("t", "z", "y", "x", "c"))
    (['the source has axes IYX without meaning: read as zyx'], [])
    """
    letters = {"S": "c", **{letter.upper(): letter for letter in LETTERS}}
    if all(name is None or letters.get(a) == name for a, name in zip(axes, plain, strict=True)):
        return []
    read = "".join(name for name in plain if name)
    return [f"the source has axes {axes} without meaning: read as {read}"]
