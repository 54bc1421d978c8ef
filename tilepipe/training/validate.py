"""Validation: what is held out is segmented as any volume is, and compared with its labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import zarr

from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks, Region
from tilepipe.segmentation.segment import segment
from tilepipe.training.targets import IGNORE
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tilepipe.options import Options
    from tilepipe.training.dataset import TrainingVolume
    from tilepipe.training.sampler import ClassReader
    from tilepipe.volumes.volume import Volume


@dataclass(frozen=True, slots=True)
class Score:
    """How well held-out regions were answered."""

    error: float
    """Share of labelled voxels with another class; of values, the root of the mean square."""
    dice: tuple[float, ...] = ()
    """Dice of each class; nan for one that neither the labels nor the answer hold."""
    iou: tuple[float, ...] = ()
    """Intersection over union of each class, in the same way."""

    @property
    def mean_iou(self) -> float:
        """The mean IoU of the classes; nan of values."""
        values = [value for value in self.iou if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    @property
    def good(self) -> float:
        """What the best checkpoint has most of: the mean Dice of the classes, or less error."""
        values = [value for value in self.dice if not math.isnan(value)]
        return sum(values) / len(values) if values else -self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """An image that is segmented to see how far the training is, and its labels."""

    source: str
    labels: Volume
    mask: Volume | None
    """A volume that is 0 where the labels say nothing."""
    region: Region
    """The part of the labels and of the mask that is judged; the image has just this size."""
    normalize: str | None
    """None where grey values are yet to be normalized, as the model does it."""
    axes: str | None = None
    level: int = 0
    series: int | None = None
    channels: tuple[int | str, ...] | None = None


def hold_out(
    volumes: Sequence[TrainingVolume],
    apart: Sequence[TrainingVolume],
    folder: Path,
    *,
    resumed: bool,
) -> list[HeldOut]:
    """Return what is held out; regions are copied into ``folder``, to be segmented as any volume.

    Their grey values are normalized as those of the whole image they are cut from. The volumes
    ``apart`` are held out whole and segmented where they lie.
    """
    held_out = []
    regions = [(volume, region) for volume in volumes for region in volume.held_out]
    for number, (volume, region) in enumerate(regions):
        path = folder / f"held-out-{number}.zarr"
        if not (resumed and path.exists()):
            _copy(volume, region, path)
        mask = None if volume.mask is None else volume.mask.volume
        held_out.append(
            HeldOut(
                source=str(path),
                labels=volume.labels.volume,
                mask=mask,
                region=region,
                normalize="none",
            )
        )
    for volume in apart:
        image = volume.image.volume
        held_out.append(
            HeldOut(
                source=image.path,
                labels=volume.labels.volume,
                mask=None,
                region=Region.whole(image.shape),
                normalize=None,
                axes=image.requested_axes,
                level=image.level,
                series=image.series,
                channels=image.requested_channels,
            )
        )
    return held_out


def _copy(volume: TrainingVolume, region: Region, path: Path) -> None:
    """Write a region of an image as a Zarr array of normalized grey values, block by block."""
    image = volume.image.volume
    array = zarr.create_array(
        store=str(path),
        shape=(image.channels, *region.shape),
        chunks=(1, *(min(a, b) for a, b in zip(image.chunks, region.shape, strict=True))),
        dtype=np.float32,
        dimension_names=("c", *image.axes),
        overwrite=True,
    )
    for block in Blocks.of(image.shape, image.chunks, region):
        inside = (slice(None), *block.within(region.start))
        array[inside] = volume.normalized(image.read(block))


def validate(
    model: Path,
    held_out: Sequence[HeldOut],
    reader: ClassReader,
    *,
    folder: Path,
    classes: int,
    options: Options,
) -> Score:
    """Segment the held-out images with a checkpoint, and compare them with labels by blocks.

    ``reader`` makes classes of the labels, ``classes`` is their number; what is segmented goes to
    ``folder``. Raises BadRequest for a class in the labels that the network does not know.
    """
    confusion = np.zeros((classes, classes), np.int64)
    square, known = 0.0, 0
    for number, held in enumerate(held_out):
        output = folder / f"held-out-{number}-segmented.zarr"
        report = segment(
            held.source,
            model=model,
            output=output,
            options=replace(
                options,
                normalize=held.normalize,
                axes=held.axes,
                level=held.level,
                series=held.series,
                channels=held.channels,
            ),
            engine="serial",  # this process has the device, and others of the team have theirs
            overwrite=True,
        )
        if report.failures:
            raise RuntimeError(f"validation failed: {report.failures[0].cause}")
        answer = open_volume(output)
        for block in Blocks.of(held.labels.shape, held.labels.chunks, held.region):
            predicted = answer.read(block.shift([-n for n in held.region.start]))
            if reader.target == "values":
                values = held.labels.read(block).astype(np.float64)
                finite = np.isfinite(values)
                if held.mask is not None:
                    finite &= held.mask.read(block) != 0
                square += float(((predicted.astype(np.float64) - values)[finite] ** 2).sum())
                known += int(finite.sum())
                continue
            truth = reader.read(held.labels, held.mask, block)
            labelled = truth != IGNORE
            if (most := int(truth[labelled].max(initial=0))) >= classes:
                raise BadRequest(
                    f"labels hold the class {most} in {block}, which is held out, but classes"
                    f" (={classes}) end before it; give --classes {most + 1} or --ignore {most}"
                )
            pairs = truth[labelled].astype(np.int64) * classes + predicted[0][labelled]
            confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    if reader.target == "values":
        return Score(math.sqrt(square / max(known, 1)))
    return score(confusion)


def score(confusion: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Score:
    """Return the score of a table of voxels, truth by answer.

    >>> score(np.array([[3, 1], [0, 4]])).error
    0.125
    """
    both = np.diag(confusion).astype(float)
    truth, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        dice, iou = 2 * both / (truth + predicted), both / (truth + predicted - both)
    total = int(confusion.sum())
    error = 1 - float(both.sum()) / total if total else 0.0
    return Score(error, tuple(map(float, dice)), tuple(map(float, iou)))
