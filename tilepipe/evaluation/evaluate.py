"""The story of ``tilepipe evaluate``: a segmentation compared with its labels, block by block.

Memory is a few blocks, whatever the volumes' size, and one count for each pair of labels that
meet. Where objects must be numbered first, their numbers go to a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.evaluation.comparison import Comparison, Labelling, open_comparison
from tilepipe.evaluation.scores import Scores, object_scores, partition_scores, pixel_scores
from tilepipe.evaluation.table import Table
from tilepipe.evaluation.warping import LARGEST_PLANE, warping_mismatches
from tilepipe.geometry import Region, TileGrid
from tilepipe.host.process import borrowed
from tilepipe.instances.components import label_components
from tilepipe.instances.growth import grow_objects
from tilepipe.options import COMPONENTS, KINDS
from tilepipe.text import comma
from tilepipe.volumes.source import open_named
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilepipe.evaluation.comparison import Read, Stage
    from tilepipe.evaluation.scores import ObjectScores, PartitionScores

    Kind = Literal["auto", "classes", "mask", "instances", "membrane"]
    Components = Literal["plane", "volume"]

MOST_CLASSES = 256
"""More values than that are taken for numbers of objects."""


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
    progress: Stage | None = None,
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
    comparison = open_comparison(
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
    kind = _checked_kind(kind, comparison, warping=warping, components=components)
    try:
        return _compare(comparison, kind, components, warping=warping)
    except OSError as error:
        raise BadRequest(f"the comparison cannot go on: {error}") from error


def _compare(
    comparison: Comparison, kind: Kind, components: Components | None, *, warping: bool
) -> Scores:
    prediction, labels, region = comparison.prediction, comparison.labels, comparison.region
    pixels = partition = thinned = objects = None
    within: Components | None = None
    table = comparison.count("values", prediction.read, labels.read)
    if not table.total:
        raise BadRequest(f"ignore (={labels.ignore}) leaves no voxel of {region} to compare")
    if kind == "auto":
        kind = _chosen_kind(table, prediction, labels)
    if kind == "instances":
        within = components or "volume"
        table = comparison.count("objects", prediction.read, labels.read, within)
        partition, objects = partition_scores(table), object_scores(table)
    elif kind == "classes":
        pixels = pixel_scores(_checked_classes(table))
    else:
        pixels = pixel_scores(_as_masks(table, comparison))
    if kind == "membrane":
        within = components or "plane"
        partition, thinned, objects = _membrane(comparison, within, table)
    if within is not None and partition is None:
        raise BadRequest(
            f"labels (={labels.volume.path}) hold no object in {region}; take kind mask or classes"
        )
    return Scores(
        prediction=prediction.volume.path,
        labels=labels.volume.path,
        kind=kind,
        region=str(region),
        voxels=table.total,
        components=within,
        pixels=pixels,
        partition=partition,
        thinned=thinned,
        objects=objects,
        warping_error=_warping(comparison) / table.total if warping else None,
    )


def _checked_kind(
    kind: Kind, comparison: Comparison, *, warping: bool, components: str | None
) -> Kind:
    prediction, labels = comparison.prediction, comparison.labels
    masks = [
        f"{name} (={value})"
        for name, value in (
            ("threshold", prediction.threshold),
            ("objects", prediction.objects and comma(prediction.objects)),
            ("label_objects", labels.objects and comma(labels.objects)),
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
    plane = math.prod(comparison.shape[-2:])
    if warping and plane > LARGEST_PLANE:
        raise BadRequest(
            f"warping needs planes of at most {LARGEST_PLANE:,} pixels, in memory; {plane:,} are"
            " more: choose a smaller region"
        )
    return "mask" if masks and kind == "auto" else kind


def _chosen_kind(table: Table, prediction: Labelling, labels: Labelling) -> Kind:
    """Return the kind that the values and their types suggest; see `evaluate`."""
    predicted, true = (len(np.setdiff1d(values, [0])) for values in (table.predicted, table.true))
    wide = labels.volume.dtype.itemsize > 1
    if true <= 1 or (wide and predicted <= 1):
        return "mask"
    numbered = prediction.volume.dtype.kind in "iu" and prediction.volume.dtype.itemsize > 1
    return "instances" if wide and numbered else "classes"


def _checked_classes(table: Table) -> Table:
    """Return the table, if its values may be classes."""
    predicted, true = (np.unique(labels).tolist() for labels in table.labels)
    values = len({*predicted, *true})
    if values > MOST_CLASSES:
        raise BadRequest(
            f"kind (=classes) is for at most {MOST_CLASSES} classes; {values:,} values were found:"
            " take instances"
        )
    return table


def _as_masks(table: Table, comparison: Comparison) -> Table:
    """Return the table of objects, 1, and what is none, 0; rows may repeat."""
    predicted, true = table.labels
    return Table(
        table.plane,
        comparison.prediction.is_object(predicted).astype(np.int64),
        comparison.labels.is_object(true).astype(np.int64),
        table.voxels,
    )


def _membrane(
    comparison: Comparison, components: Components, raw: Table
) -> tuple[PartitionScores | None, PartitionScores | None, ObjectScores]:
    """Return scores of the components as they are, after their borders are thinned, and of each."""
    per_plane = components == "plane"
    is_mask = comparison.labels.objects is not None or len(np.setdiff1d(raw.true, [0])) < 2
    with tempfile.TemporaryDirectory(prefix="tilepipe-") as folder:

        def reader(name: str) -> Read:
            volume = open_volume(Path(folder) / name, axes=comparison.axes)
            return lambda region: volume.read(region)[0]

        def number(labelling: Labelling, name: str) -> None:
            label_components(
                labelling.volume,
                Path(folder) / name,
                foreground=labelling.mask,
                region=Region.whole(comparison.shape).shift(labelling.origin),
                per_plane=per_plane,
                progress=comparison.stage(f"numbering {name}"),
            )

        number(comparison.prediction, "prediction")
        if is_mask:
            number(comparison.labels, "labels")
        read_true = reader("labels") if is_mask else comparison.labels.read
        table = comparison.count("objects", reader("prediction"), read_true, components)
        grow_objects(
            open_volume(Path(folder) / "prediction", axes=comparison.axes),
            Path(folder) / "thinned",
            per_plane=per_plane,
            progress=comparison.stage("thinning"),
        )
        thin = comparison.count("thinned objects", reader("thinned"), read_true, components)
    return partition_scores(table), partition_scores(thin), object_scores(table)


def _warping(comparison: Comparison) -> int:
    """Return how many pixels differ after warping, plane by plane."""
    grid = TileGrid(comparison.shape, (1,) * (len(comparison.shape) - 2) + comparison.shape[-2:])
    progress, mismatches = comparison.stage("warping"), 0
    for done, tile in enumerate(grid, start=1):
        predicted, true = (
            read(tile.write).reshape(comparison.shape[-2:])
            for read in (comparison.prediction.read_mask, comparison.labels.read_mask)
        )
        fixed = None
        if comparison.labels.ignore is not None:
            labels = comparison.labels.read(tile.write)
            fixed = (labels == comparison.labels.ignore).reshape(true.shape)
        mismatches += int(warping_mismatches(predicted, true, fixed=fixed).sum())
        progress(done, len(grid))
    return mismatches
