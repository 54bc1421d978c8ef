"""A prediction laid on its labels, and how often each pair of their values meets, by blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.evaluation.position import place_on
from tilepipe.evaluation.table import Table, add, tabulate
from tilepipe.geometry import Region, TileGrid, parse_region
from tilepipe.instances.blocks import block_of
from tilepipe.text import comma, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tilepipe.geometry import Shape
    from tilepipe.volumes.volume import Volume

    Stage = Callable[[str, int, int], None]
    """Called with the name of a stage, the blocks of it that are done, and their number."""
    Read = Callable[[Region], NDArray[np.generic]]
    """Returns the values in a part of the compared region."""

ROWS = 1_000_000
"""Rows of tables that are held before they are added up."""


@dataclass(frozen=True, slots=True)
class Labelling:
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
        plane: NDArray[np.generic] = image[self.channel or 0]
        if self.threshold is None:
            return plane
        above: NDArray[np.bool_] = np.greater(plane, self.threshold)
        return above.astype(np.uint8)

    def mask(self, image: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return where there are objects, of voxels ``(channels, ...)``."""
        return self.is_object(self.values(image))

    def is_object(self, values: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return which values are objects."""
        mask = values != 0 if self.objects is None else np.zeros(values.shape, bool)
        for value in self.objects or ():  # numpy.isin rounds integers of 64 bits
            mask |= values == value
        return mask if self.ignore is None else mask & (values != self.ignore)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prediction and labels of the same voxels."""

    prediction: Labelling
    labels: Labelling
    shape: Shape
    """Voxels compared."""
    progress: Stage | None

    @property
    def axes(self) -> str:
        """Axes of the labels."""
        return self.labels.volume.axes

    @property
    def region(self) -> Region:
        """The labels' voxels that are compared."""
        return Region.whole(self.shape).shift(self.labels.origin)

    def count(
        self, what: str, read_predicted: Read, read_true: Read, components: str = "volume"
    ) -> Table:
        """Count the pairs of values of each frame apart.

        With ``components`` of a ``plane`` those of each plane are counted apart, too.
        """
        lead = self.axes.index("y") if components == "plane" else self.axes.count("t")
        numbers = np.arange(math.prod(self.shape[:lead])).reshape(self.shape[:lead])
        chunks, others = self.labels.volume.chunks, self.prediction.volume.chunks
        block = block_of(
            self.shape, tuple(map(min, chunks, self.shape)), tuple(map(max, chunks, others))
        )
        grid = TileGrid(self.shape, block)
        tables, rows, progress = [add([])], 0, self.stage(what)
        for done, tile in enumerate(grid, start=1):
            predicted, true = read_predicted(tile.write), read_true(tile.write)
            plane = numbers[tile.write.slices[:lead]].reshape(
                *tile.write.shape[:lead], *(1,) * (len(self.shape) - lead)
            )
            if self.labels.ignore is not None:
                counted = self.labels.read(tile.write) != self.labels.ignore
                plane = np.broadcast_to(plane, counted.shape)[counted]
                predicted, true = predicted[counted], true[counted]
            tables.append(tabulate(predicted, true, plane=plane))
            rows += len(tables[-1])
            if rows > ROWS and rows > 2 * len(tables[0]):
                tables, rows = [add(tables)], 0
            progress(done, len(grid))
        return add(tables)

    def stage(self, what: str) -> Callable[[int, int], None]:
        """Return a function that passes on the progress of a stage."""
        return lambda done, blocks: self.progress(what, done, blocks) if self.progress else None


def open_comparison(
    prediction: Volume,
    labels: Volume,
    *,
    region: str | Region | None,
    threshold: float | None,
    channel: int | None,
    objects: tuple[int, ...] | None,
    label_objects: tuple[int, ...] | None,
    ignore: int | None,
    progress: Stage | None,
) -> Comparison:
    """Lay a prediction on its labels; raises BadRequest where they do not fit one another."""
    whole = Region.whole(labels.shape)
    if isinstance(region, str):
        region = parse_region(region, labels.shape)
    box = whole if region is None else region
    if box.size == 0 or box.intersect(whole) != box:
        raise BadRequest(f"region (={box}) must hold voxels, all inside the labels' {whole}")
    start = box.start if prediction.shape == labels.shape else (0,) * len(box.start)
    if placed := place_on(prediction, labels, None if region is None else box):
        box, start = placed
    elif prediction.shape not in (labels.shape, box.shape):
        hint = "" if region is None else f", or the region's, {comma(box.shape)}"
        raise BadRequest(
            f"prediction (={prediction.path}) of shape {comma(prediction.shape)} must have the"
            f" labels' shape, {comma(labels.shape)}{hint}"
            + (f": {labels.path}" if region is not None else f" ({labels.path}), or give region")
        )
    _check_values(prediction, labels, threshold=threshold, channel=channel)
    return Comparison(
        Labelling(prediction, start, channel, threshold, objects),
        Labelling(labels, box.start, objects=label_objects, ignore=ignore),
        box.shape,
        progress,
    )


def _check_values(
    prediction: Volume, labels: Volume, *, threshold: float | None, channel: int | None
) -> None:
    """Refuse volumes that do not hold one integer for each voxel, or do not say which."""
    if labels.channels > 1 or labels.dtype.kind == "f":
        raise BadRequest(
            f"labels (={labels.path}) must be integers of one channel, not {labels.dtype} of"
            f" {counted(labels.channels, 'channel')}"
        )
    if channel is not None and not 0 <= channel < prediction.channels:
        raise BadRequest(
            f"channel (={channel}) must lie in 0:{prediction.channels}, the channels of"
            f" {prediction.path}"
        )
    floats, several = prediction.dtype.kind == "f", prediction.channels > 1
    if floats and threshold is None and (channel is not None or not several):
        raise BadRequest(
            f"prediction (={prediction.path}) of type {prediction.dtype} holds no labels; give"
            " threshold, such as 0.5"
        )
    if several and channel is None and (not floats or threshold is not None):
        raise BadRequest(
            f"prediction (={prediction.path}) has {prediction.channels} channels; say which one"
            " with channel"
        )
