"""TIFF and SVS files as Zarr arrays, decoded strip by strip or tile by tile, never whole."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tifffile
import zarr

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.types import AnyArray

    from tilepipe.geometry import Shape

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files, little- and big-endian."""
SUFFIXES = (".tif", ".tiff", ".svs", ".btf")
LETTERS = tuple("tzyxc")
_BROKEN = re.compile(
    r"invalid (page offset|offset to page)|corrupt|failed to reshape|TiffTag 2\d\d .*invalid"
)


@dataclass(frozen=True, slots=True)
class TiffImage:
    """The first image of a TIFF file, at one of its resolutions; holds the file open."""

    array: AnyArray
    """The voxels, in the file's own order of axes."""
    axes: str
    """The file's own letter per dimension, such as ``YXS`` or ``IYX``."""
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


def open_tiff(path: Path, *, level: int) -> TiffImage:
    """Open the first image of ``path`` at resolution ``level``.

    Raises BadRequest for a file that is truncated or no TIFF, and a level that is not there.
    """
    complaints = _Complaints()
    logger = logging.getLogger("tifffile")
    logger.addFilter(complaints)
    try:
        file = tifffile.TiffFile(path)
        try:
            image = _first_image(file, path, level=level, complaints=complaints.records)
        except BaseException:
            file.close()
            raise
    except BadRequest:
        raise
    except Exception as error:
        raise _broken(path, str(error)) from error
    finally:
        logger.removeFilter(complaints)
    for record in complaints.records:
        logger.handle(record)
    return image


def _first_image(
    file: tifffile.TiffFile, path: Path, *, level: int, complaints: list[logging.LogRecord]
) -> TiffImage:
    if not file.series:
        raise _broken(path, "it holds no image")
    series = file.series[0]
    messages = [record.getMessage() for record in complaints]
    broken = [message for message in messages if _BROKEN.search(message)]
    if broken:
        raise _broken(path, broken[0])
    if not 0 <= level < len(series.levels):
        raise BadRequest(
            f"level (={level}) must be one of {', '.join(map(str, range(len(series.levels))))}, "
            f"the resolutions of {path}"
        )
    chosen = series.levels[level]
    if _last_byte(chosen) > path.stat().st_size:
        raise _broken(path, "the voxels go on past the end of the file")
    array = zarr.open_array(series.aszarr(level=level), mode="r", zarr_format=2)
    return TiffImage(array, chosen.axes, file)


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


def _broken(path: Path, cause: str) -> BadRequest:
    cause = " ".join(cause.split())[:200]
    return BadRequest(f"source (={path}) is no whole TIFF file, perhaps truncated: {cause}")


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
