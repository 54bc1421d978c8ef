"""The source of a segmentation, opened as its options ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.volumes.images import count_images, lying_beside
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.options import Options
    from tilepipe.volumes.volume import Volume


def open_source(path: str | Path, options: Options) -> Volume:
    """Open a source as it is asked for; every process opens it so."""
    return open_volume(
        path,
        axes=options.axes,
        level=options.level,
        series=options.series,
        channels=options.channels,
    )


def source_notices(volume: Volume) -> list[str]:
    """Return how a source was understood, and what it holds beyond what is read."""
    return [*volume.notices, *lying_beside(volume.path, volume.series)]


def series_for(path: str | Path, series: int | None) -> int | None:
    """Return the image asked for if a file holds several; None for one that holds one."""
    return series if series is not None and count_images(path) > 1 else None


def open_named(path: str | Path, axes: str | None, series: int | None) -> Volume:
    """Open a volume; ``axes`` are for a file that does not say them."""
    series = series_for(path, series)
    try:
        volume = open_volume(path, series=series)
    except BadRequest:
        if axes is None:
            raise
        return open_volume(path, axes=axes, series=series)
    needed = axes is not None and volume.axes_assumed
    return open_volume(path, axes=axes, series=series) if needed else volume
