"""How far a training is: held-out regions segmented as any volume is, and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks
from tilepipe.segmentation.segment import segment
from tilepipe.training.targets import IGNORE
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tilepipe.options import Options
    from tilepipe.training.dataset import HeldOut
    from tilepipe.training.sampler import Kind


@dataclass(frozen=True, slots=True)
class Score:
    """How well held-out regions were answered."""

    error: float
    """Share of labelled voxels with another class; of values, the root of the mean square."""
    dice: tuple[float, ...] = ()
    """Of each class; nan for one that neither the labels nor the answer hold."""
    iou: tuple[float, ...] = ()

    @property
    def mean_iou(self) -> float:
        """The mean IoU of the classes; nan of values."""
        there = [value for value in self.iou if not math.isnan(value)]
        return sum(there) / len(there) if there else math.nan

    @property
    def good(self) -> float:
        """What the best checkpoint has most of: the mean Dice of the classes, or less error."""
        there = [value for value in self.dice if not math.isnan(value)]
        return sum(there) / len(there) if there else -self.error


def validate(
    model: Path,
    held_out: Sequence[HeldOut],
    kind: Kind,
    *,
    folder: Path,
    classes: int,
    options: Options,
) -> Score:
    """Segment the held-out images with a checkpoint, and compare with the labels, by blocks."""
    confusion = np.zeros((classes, classes), np.int64)
    square, known = 0.0, 0
    for number, held in enumerate(held_out):
        place = folder / f"held-out-{number}-segmented.zarr"
        report = segment(
            held.source,
            model=model,
            output=place,
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
        answer = open_volume(place)
        for block in Blocks.of(held.labels.shape, held.labels.chunks, held.region):
            found = answer.read(block.shift([-n for n in held.region.start]))
            if kind.target == "values":
                wanted = held.labels.read(block).astype(np.float64)
                finite = np.isfinite(wanted)
                if held.mask is not None:
                    finite &= held.mask.read(block) != 0
                square += float(((found.astype(np.float64) - wanted)[finite] ** 2).sum())
                known += int(finite.sum())
                continue
            truth = kind.read(held.labels, held.mask, block)
            said = truth != IGNORE
            if (most := int(truth[said].max(initial=0))) >= classes:
                raise BadRequest(
                    f"labels hold the class {most} in {block}, which is held out, but classes"
                    f" (={classes}) end before it; give --classes {most + 1} or --ignore {most}"
                )
            pairs = truth[said].astype(np.int64) * classes + found[0][said]
            confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    if kind.target == "values":
        return Score(math.sqrt(square / max(known, 1)))
    return score(confusion)


def score(confusion: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Score:
    """Return the score of a table of voxels, truth by answer.

    >>> score(np.array([[3, 1], [0, 4]])).error
    0.125
    """
    both = np.diag(confusion).astype(float)
    truth, found = confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        dice, iou = 2 * both / (truth + found), both / (truth + found - both)
    total = int(confusion.sum())
    error = 1 - float(both.sum()) / total if total else 0.0
    return Score(error, tuple(map(float, dice)), tuple(map(float, iou)))
