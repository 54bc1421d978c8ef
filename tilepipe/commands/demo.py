"""The command demo: an image with known truth is made, segmented in tiles and compared."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilepipe.commands.exits import refusing
from tilepipe.commands.progress import SegmentProgress
from tilepipe.commands.types import Place
from tilepipe.errors import BadRequest
from tilepipe.host.allocator import keep_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tilepipe.segmentation.report import Report

SHOWN = 1024
"""Pixels of each side, at most, of the picture and of the comparison."""


@click.command()
@click.option("--size", type=int, default=1024, show_default=True, help="The pixels of each side.")
@click.option(
    "-o", "--output", type=Place(), default="demo", show_default=True,
    help="A folder for the results.",
)  # fmt: skip
@refusing
def demo(size: int, output: str) -> None:
    """Make an image of nuclei, segment it in tiles and compare it with the truth."""
    if "://" in output:
        raise BadRequest(f"output (={output}) must be a folder of this machine")
    keep_memory()
    progress = SegmentProgress()
    for line in _demonstrate(Path(output), size=size, progress=progress):
        progress.end()
        click.echo(line)


def network_path() -> Path:
    """Return the file of the network that is shipped."""
    return Path(str(files("tilepipe") / "networks" / "nuclei-2d.pt"))


def _demonstrate(
    folder: Path, *, size: int, progress: Callable[[Report], None] | None = None
) -> Iterator[str]:
    """Do it, and yield a line for each thing that was done."""
    from tilepipe.geometry import Region
    from tilepipe.options import Options
    from tilepipe.segmentation.segment import segment
    from tilepipe.volumes.overlay import dice, write_overlay
    from tilepipe.volumes.synthetic import write_synthetic
    from tilepipe.volumes.volume import open_volume

    if size < 64:
        raise BadRequest(f"size (={size}) must be at least 64")
    if folder.exists() and not folder.is_dir():
        raise BadRequest(f"output (={folder}) must be a folder; a file of that name exists")
    picture = folder / "overlay.png"
    if picture.exists() or picture.is_symlink():
        raise BadRequest(f"output (={folder}) holds {picture.name} already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    image, truth, target = (folder / f"{n}.zarr" for n in ("nuclei", "truth", "nuclei-segmented"))
    write_synthetic(image, (size, size), seed=1, labels_path=truth)
    yield f"made an image of {size} x {size} pixels with known truth: {image}"
    tile = min(256, size // 64 * 64)
    report = segment(
        image,
        model=network_path(),
        output=target,
        options=Options(tile=(tile, tile)),
        overwrite=True,
        progress=progress,
    )
    rate = report.voxels / max(report.seconds, 1e-9) / 1e6
    yield f"segmented in {report.tiles} tiles, {rate:.3g} megapixels/s: {target}"
    shown = Region.whole((min(size, SHOWN),) * 2)
    grey, found, known = (open_volume(p).read(shown)[0] for p in (image, target, truth))
    write_overlay(picture, grey, found, known)
    yield f"Dice against the truth: {dice(found > 0, known > 0):.3f}"
    yield f"look at it: {picture}"
