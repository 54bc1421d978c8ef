"""The story of ``tilepipe evaluate``: a segmentation compared with its labels, block by block.

Memory is a few blocks, whatever the volumes' size, and one count for each pair of labels that
meet. Where objects must be numbered first, their numbers go to a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.evaluation.position import place_on
from tilepipe.evaluation.scores import (
    Scores,
    Table,
    add,
    object_scores,
    partition_scores,
    pixel_scores,
    tabulate,
)
from tilepipe.evaluation.warping import LARGEST_PLANE, warping_mismatches
from tilepipe.geometry import Region, TileGrid, parse_region
from tilepipe.host.process import borrowed
from tilepipe.instances.blocks import block_of
from tilepipe.instances.components import label_components
from tilepipe.instances.growth import grow_objects
from tilepipe.options import COMPONENTS, KINDS
from tilepipe.text import comma, counted
from tilepipe.volumes.source import open_named
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tilepipe.evaluation.scores import ObjectScores, PartitionScores
    from tilepipe.geometry import Shape
    from tilepipe.volumes.volume import Volume

    Kind = Literal["auto", "classes", "mask", "instances", "membrane"]
    Components = Literal["plane", "volume"]
    Progress = Callable[[str, int, int], None]
    Read = Callable[[Region], NDArray[np.generic]]

MOST_CLASSES = 256
"""More values than that are taken for numbers of objects."""


@dataclass(frozen=True, slots=True)
class _Side:
    """The prediction or the labels: one integer for each voxel of the compared region."""

    volume: Volume
    origin: Shape
    """The region's first voxel in the volume."""
    channel: int | None = None
    threshold: float | None = None
    objects: tuple[int, ...] | None = None
    """Values that are objects; None: all but 0."""
    ignore: int | None = None
    """A value that is no object."""

    def read(self, region: Region) -> NDArray[np.generic]:
        """Return the values in a part of the compared region."""
        return self.values(self.volume.read(region.shift(self.origin)))

    def read_mask(self, region: Region) -> NDArray[np.bool_]:
        """Return where there are objects in a part of the compared region."""
        return self.mask(self.volume.read(region.shift(self.origin)))

    def values(self, image: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return the values of voxels ``(channels, ...)``."""
        if self.channel is None and len(image) > 1:
            largest: NDArray[np.intp] = image.argmax(axis=0)
            return largest
        one: NDArray[np.generic] = image[self.channel or 0]
        return one if self.threshold is None else np.greater(one, self.threshold).astype(np.uint8)

    def mask(self, image: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return where there are objects, of voxels ``(channels, ...)``."""
        return self.is_object(self.values(image))

    def is_object(self, values: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return which values are objects; those of a table are as `tabulate` returns them."""
        if self.volume.dtype == np.uint64:
            values = values.astype(np.uint64, copy=False)  # a table holds them with a sign
        found = values != 0 if self.objects is None else np.zeros(values.shape, bool)
        for value in self.objects or ():  # numpy.isin rounds integers of 64 bits
            found |= values == value
        return found if self.ignore is None else found & (values != self.ignore)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Prediction and labels, and how far the comparison is told to be."""

    prediction: _Side
    labels: _Side
    shape: Shape
    """Voxels compared."""
    progress: Progress | None

    @property
    def axes(self) -> str:
        """Axes of the labels."""
        return self.labels.volume.axes

    def count(self, what: str, read: Read, read_true: Read, components: str = "volume") -> Table:
        """Count the pairs of values; frames, and planes where asked for, apart."""
        lead = self.axes.index("y") if components == "plane" else self.axes.count("t")
        numbers = np.arange(math.prod(self.shape[:lead])).reshape(self.shape[:lead])
        chunks, others = self.labels.volume.chunks, self.prediction.volume.chunks
        block = block_of(
            self.shape, tuple(map(min, chunks, self.shape)), tuple(map(max, chunks, others))
        )
        grid = TileGrid(self.shape, block)
        tables, rows, told = [add([])], 0, self.stage(what)
        for done, tile in enumerate(grid, start=1):
            found, true = read(tile.write), read_true(tile.write)
            plane = numbers[tile.write.slices[:lead]].reshape(
                *tile.write.shape[:lead], *(1,) * (len(self.shape) - lead)
            )
            if self.labels.ignore is not None:
                kept = self.labels.read(tile.write) != self.labels.ignore
                plane = np.broadcast_to(plane, kept.shape)[kept]
                found, true = found[kept], true[kept]
            tables.append(tabulate(found, true, plane=plane))
            rows += len(tables[-1])
            if rows > 1_000_000 and rows > 2 * len(tables[0]):
                tables, rows = [add(tables)], 0
            told(done, len(grid))
        return add(tables)

    def stage(self, what: str) -> Callable[[int, int], None]:
        """Return what tells the progress of a stage."""
        return lambda done, blocks: self.progress(what, done, blocks) if self.progress else None


@borrowed()
def evaluate(
    prediction: str | Path,
    labels: str | Path,
    *,
    kind: Kind = "auto",
    axes: str | None = None,
    series: int | None = None,
    region: str | Region | None = None,
    threshold: float | None = None,
    channel: int | None = None,
    objects: Sequence[int] | None = None,
    label_objects: Sequence[int] | None = None,
    ignore: int | None = None,
    components: Components | None = None,
    warping: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Compare a prediction with labels of the same shape, or with a region of labels.

    Where the metadata of both say that the prediction lies elsewhere, by whole voxels, the labels
    there are compared. What the scores mean is said in docs/scores.md.

    Args:
        prediction: The path of the prediction: labels ``axes``, or values ``(channels, *axes)``.
        labels: The path of the labels, ``axes``.
        kind: What is compared. ``classes``: each value is a class. ``mask``: objects against the
            rest. ``instances``: both number objects. ``membrane``: a mask of cell interiors, whose
            components (faces connect) are the predicted objects. ``auto`` is ``mask`` where labels
            hold at most one value besides 0, or the prediction does and labels are wider than 8
            bits; ``instances`` where both are wider; else ``classes``.
        axes: The axes of a file that does not say them, such as ``zyx``.
        series: The image of each file that holds several.
        region: The part of the labels that is compared, in voxels along their axes, such as
            ``20:24,:,:``; by default where the prediction lies.
        threshold: Turns the values of ``channel`` into 1 above it, and else 0.
        channel: The channel that is compared; without it the number of the largest is the value.
        objects: The values of the prediction that are objects; by default all but 0.
        label_objects: The values of the labels that are objects; by default all but 0.
        ignore: The label whose voxels do not count.
        components: Whether objects lie within each ``plane`` or the ``volume``; by default planes
            for ``membrane``, as in the ISBI 2012 challenge, and the volume for ``instances``.
            Labels of ``membrane`` with one value besides 0 are a mask, whose components are the
            true objects; else they number the objects.
        warping: Whether the warping error of ``mask`` and ``membrane`` is added, plane by plane.
        progress: Is called with what is being done, blocks done and their number.

    Returns:
        The scores; those that do not belong to ``kind`` are None.

    Raises:
        BadRequest: A file cannot be read, shapes differ, or what is to be compared is not there.
    """
    pair = _open_pair(
        open_named(prediction, axes, series),
        open_named(labels, axes, series),
        region=region,
        threshold=threshold,
        channel=channel,
        objects=None if objects is None else tuple(objects),
        label_objects=None if label_objects is None else tuple(label_objects),
        ignore=ignore,
        progress=progress,
    )
    kind = _checked_kind(kind, pair, warping=warping, components=components)
    try:
        return _compare(pair, kind, components, warping=warping)
    except OSError as error:
        raise BadRequest(f"the comparison cannot go on: {error}") from error


def _compare(pair: _Pair, kind: Kind, components: Components | None, *, warping: bool) -> Scores:
    mine, theirs = pair.prediction, pair.labels
    pixels = partition = thinned = found = None
    chosen: Components | None = None
    table = pair.count("values", mine.read, theirs.read)
    if not table.total:
        raise BadRequest(f"ignore (={theirs.ignore}) leaves no voxel of {_told(pair)} to compare")
    if kind == "auto":
        kind = _chosen_kind(table, mine, theirs)
    if kind == "instances":
        chosen = components or "volume"
        table = pair.count("objects", mine.read, theirs.read, chosen)
        partition, found = partition_scores(table), object_scores(table)
    else:
        pixels = pixel_scores(_few(table) if kind == "classes" else _as_masks(table, pair))
    if kind == "membrane":
        chosen = components or "plane"
        partition, thinned, found = _membrane(pair, chosen, table)
    if chosen is not None and partition is None:
        raise BadRequest(
            f"labels (={theirs.volume.path}) hold no object in {_told(pair)}; take kind mask or"
            " classes"
        )
    return Scores(
        prediction=mine.volume.path,
        labels=theirs.volume.path,
        kind=kind,
        region=_told(pair),
        voxels=table.total,
        components=chosen,
        pixels=pixels,
        partition=partition,
        thinned=thinned,
        objects=found,
        warping_error=_warping(pair) / table.total if warping else None,
    )


def _told(pair: _Pair) -> str:
    return str(Region.whole(pair.shape).shift(pair.labels.origin))


def _open_pair(
    mine: Volume,
    theirs: Volume,
    *,
    region: str | Region | None,
    threshold: float | None,
    channel: int | None,
    objects: tuple[int, ...] | None,
    label_objects: tuple[int, ...] | None,
    ignore: int | None,
    progress: Progress | None,
) -> _Pair:
    whole = Region.whole(theirs.shape)
    if isinstance(region, str):
        region = parse_region(region, theirs.shape)
    box = whole if region is None else region
    if box.size == 0 or box.intersect(whole) != box:
        raise BadRequest(f"region (={box}) must hold voxels, all inside the labels' {whole}")
    start = box.start if mine.shape == theirs.shape else (0,) * len(box.start)
    if placed := place_on(mine, theirs, None if region is None else box):
        box, start = placed
    elif mine.shape not in (theirs.shape, box.shape):
        hint = "" if region is None else f", or the region's, {comma(box.shape)}"
        raise BadRequest(
            f"prediction (={mine.path}) of shape {comma(mine.shape)} must have the labels' shape,"
            f" {comma(theirs.shape)}{hint}"
            + (f": {theirs.path}" if region is not None else f" ({theirs.path}), or give region")
        )
    if theirs.channels > 1 or theirs.dtype.kind == "f":
        raise BadRequest(
            f"labels (={theirs.path}) must be integers of one channel, not {theirs.dtype} of"
            f" {counted(theirs.channels, 'channel')}"
        )
    if channel is not None and not 0 <= channel < mine.channels:
        raise BadRequest(
            f"channel (={channel}) must lie in 0:{mine.channels}, the channels of {mine.path}"
        )
    if mine.dtype.kind == "f" and threshold is None and (channel is not None or mine.channels == 1):
        raise BadRequest(
            f"prediction (={mine.path}) of type {mine.dtype} holds no labels; give threshold, such"
            " as 0.5"
        )
    if mine.channels > 1 and channel is None and (mine.dtype.kind != "f" or threshold is not None):
        raise BadRequest(
            f"prediction (={mine.path}) has {mine.channels} channels; say which one with channel"
        )
    return _Pair(
        _Side(mine, start, channel, threshold, objects),
        _Side(theirs, box.start, objects=label_objects, ignore=ignore),
        box.shape,
        progress,
    )


def _checked_kind(kind: Kind, pair: _Pair, *, warping: bool, components: str | None) -> Kind:
    mine, theirs = pair.prediction, pair.labels
    masks = [
        f"{name} (={value})"
        for name, value in (
            ("threshold", mine.threshold),
            ("objects", mine.objects and comma(mine.objects)),
            ("label_objects", theirs.objects and comma(theirs.objects)),
            ("warping", warping or None),
        )
        if value is not None
    ]
    if kind not in KINDS:
        raise BadRequest(f"kind (={kind}) must be one of {', '.join(KINDS)}")
    if components is not None and components not in COMPONENTS:
        raise BadRequest(f"components (={components}) must be plane or volume")
    if components is not None and kind not in ("instances", "membrane"):
        raise BadRequest(f"components (={components}) needs kind instances or membrane, not {kind}")
    if masks and kind in ("classes", "instances"):
        raise BadRequest(f"{masks[0]} is for masks; take kind mask or membrane, not {kind}")
    plane = math.prod(pair.shape[-2:])
    if warping and plane > LARGEST_PLANE:
        raise BadRequest(
            f"warping needs planes of at most {LARGEST_PLANE:,} pixels, in memory; {plane:,} are"
            " more: choose a smaller region"
        )
    return "mask" if masks and kind == "auto" else kind


def _chosen_kind(table: Table, mine: _Side, theirs: _Side) -> Kind:
    """Return the kind that the values and their types suggest; see `evaluate`."""
    found, true = (len(np.setdiff1d(values, [0])) for values in (table.predicted, table.true))
    wide = theirs.volume.dtype.itemsize > 1
    if true <= 1 or (wide and found <= 1):
        return "mask"
    labelled = mine.volume.dtype.kind in "iu" and mine.volume.dtype.itemsize > 1
    return "instances" if wide and labelled else "classes"


def _few(table: Table) -> Table:
    """Return the table, if its values may be classes."""
    values = len(np.union1d(table.predicted, table.true))
    if values > MOST_CLASSES:
        raise BadRequest(
            f"kind (=classes) is for at most {MOST_CLASSES} classes; {values:,} values were found:"
            " take instances"
        )
    return table


def _as_masks(table: Table, pair: _Pair) -> Table:
    """Return the table of objects, 1, and what is none, 0; rows may repeat."""
    return Table(
        table.plane,
        pair.prediction.is_object(table.predicted).astype(np.int64),
        pair.labels.is_object(table.true).astype(np.int64),
        table.voxels,
    )


def _membrane(
    pair: _Pair, components: Components, raw: Table
) -> tuple[PartitionScores | None, PartitionScores | None, ObjectScores]:
    """Return scores of the components as they are, after their borders are thinned, and of each."""
    per_plane = components == "plane"
    is_mask = pair.labels.objects is not None or len(np.setdiff1d(raw.true, [0])) < 2
    with tempfile.TemporaryDirectory(prefix="tilepipe-") as folder:

        def reader(name: str) -> Read:
            volume = open_volume(Path(folder) / name, axes=pair.axes)
            return lambda region: volume.read(region)[0]

        def number(side: _Side, name: str) -> None:
            label_components(
                side.volume,
                Path(folder) / name,
                foreground=side.mask,
                region=Region.whole(pair.shape).shift(side.origin),
                per_plane=per_plane,
                progress=pair.stage(f"numbering {name}"),
            )

        number(pair.prediction, "prediction")
        if is_mask:
            number(pair.labels, "labels")
        true = reader("labels") if is_mask else pair.labels.read
        table = pair.count("objects", reader("prediction"), true, components)
        grow_objects(
            open_volume(Path(folder) / "prediction", axes=pair.axes),
            Path(folder) / "thinned",
            per_plane=per_plane,
            progress=pair.stage("thinning"),
        )
        thin = pair.count("thinned objects", reader("thinned"), true, components)
    return partition_scores(table), partition_scores(thin), object_scores(table)


def _warping(pair: _Pair) -> int:
    """Return how many pixels differ after warping, plane by plane."""
    grid = TileGrid(pair.shape, (1,) * (len(pair.shape) - 2) + pair.shape[-2:])
    told, mismatches = pair.stage("warping"), 0
    for done, tile in enumerate(grid, start=1):
        found, true = (
            read(tile.write).reshape(pair.shape[-2:])
            for read in (pair.prediction.read_mask, pair.labels.read_mask)
        )
        fixed = None
        if pair.labels.ignore is not None:
            fixed = (pair.labels.read(tile.write) == pair.labels.ignore).reshape(true.shape)
        mismatches += int(warping_mismatches(found, true, fixed=fixed).sum())
        told(done, len(grid))
    return mismatches
