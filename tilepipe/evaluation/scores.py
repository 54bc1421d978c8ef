"""How well one labelling agrees with another, from counts alone: sums over blocks of any volume.

A table of how many voxels bear each pair of labels is all that the measures need; tables of
blocks add up, so volumes larger than memory are scored exactly.

Measures of partitions follow the ISBI 2012 challenge, I. Arganda-Carreras et al. 2015, Front.
Neuroanat. 9:142, and its scripts for Fiji: voxels whose true label is 0 are left out, and each
other voxel that is predicted 0 counts as an object of its own. Pairs of voxels are drawn with
replacement, so a voxel is a pair with itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.evaluation.table import Table, group_starts, in_own_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

TWENTIETHS = tuple(range(10, 20))
"""Thresholds of the intersection over union, 0.50 to 0.95, in twentieths."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Agreement on the voxels of one class."""

    label: int
    predicted: int
    """Voxels predicted to be of the class."""
    true: int
    """Voxels that are of the class."""
    dice: float
    iou: float
    """Intersection over union."""


@dataclass(frozen=True, slots=True)
class PixelScores:
    """Agreement voxel by voxel."""

    pixel_error: float
    """Share of the voxels whose labels differ."""
    classes: tuple[ClassScores, ...]
    """Of each label that is predicted or true anywhere, in order."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One measure of two partitions, 0 to 1; 1 is perfect."""

    score: float
    """Harmonic mean of the two others (the F-score with alpha 0.5)."""
    split: float
    """Below 1 where true objects are cut apart."""
    merge: float
    """Below 1 where true objects run together."""


@dataclass(frozen=True, slots=True)
class PartitionScores:
    """Agreement of two partitions into objects, within the true objects.

    All but `rand_error` are means over the planes that hold true objects, as the challenge's.
    """

    planes: int
    """Planes with true objects; 1 for a volume that is scored as a whole."""
    voxels: int
    """Voxels in true objects."""
    v_rand: Agreement
    """Foreground-restricted Rand score."""
    v_info: Agreement
    """Foreground-restricted information theoretic score."""
    rand_error: float
    """One less the F-score of the Rand index, pairs of all planes pooled: adapted Rand error."""
    voi_split: float
    """Bits that the prediction says beyond the truth: conditional entropy H(predicted | true)."""
    voi_merge: float
    """Bits of the truth that the prediction lacks: conditional entropy H(true | predicted)."""


@dataclass(frozen=True, slots=True)
class Match:
    """Objects found at one threshold of the intersection over union."""

    threshold: float
    """A predicted object is a hit where its intersection over union with a true one is larger."""
    hits: int
    precision: float
    """Hits / (hits + false objects + missed objects)."""


@dataclass(frozen=True, slots=True)
class ObjectScores:
    """Objects found, objects of all planes pooled; average precision as in DSB2018, StarDist."""

    predicted: int
    true: int
    average_precision: float
    """Mean of the precisions over thresholds 0.50, 0.55 to 0.95."""
    matches: tuple[Match, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How well a prediction agrees with the labels."""

    prediction: str
    """Where the prediction lies."""
    labels: str
    """Where the labels lie."""
    kind: str
    """``classes``, ``mask``, ``instances`` or ``membrane``."""
    region: str
    """The labels' voxels that were compared, such as ``20:24,0:512,0:512``."""
    voxels: int
    """Voxels compared, less those to be ignored."""
    components: str | None
    """Whether objects and pairs lie within a ``plane`` or the ``volume``; None without objects."""
    pixels: PixelScores | None
    """Classes as they are; of ``mask`` and ``membrane``, 1 is object and 0 is not."""
    partition: PartitionScores | None
    """Of ``instances`` and ``membrane``: the objects as they are predicted."""
    thinned: PartitionScores | None
    """Of ``membrane``: the same after the borders between predicted objects were thinned."""
    objects: ObjectScores | None
    """Of ``instances`` and ``membrane``: which objects were found."""
    warping_error: float | None
    """Share of the pixels that differ in topology, where it was asked for."""

    def asdict(self) -> dict[str, object]:
        """Return plain values, as JSON has them."""
        return asdict(self)


def _sizes(labels: Ints, voxels: Ints, plane: Ints | None = None) -> tuple[Ints, Ints, Ints]:
    """Return plane, label and voxels of each label of each plane, in order."""
    where = np.zeros(len(labels), np.int64) if plane is None else plane
    order = np.lexsort((labels, where))
    where, labels = where[order], labels[order]
    begins = group_starts((where, labels))
    counts = np.add.reduceat(voxels[order], begins) if begins.size else voxels
    return where[begins], labels[begins], counts


def _by_label(labels: Ints, voxels: Ints, unsigned: bool) -> dict[int, int]:
    """Return how many voxels bear each label, by the labels as they are."""
    _, label, count = _sizes(labels, voxels)
    return dict(zip(in_own_type(label, unsigned).tolist(), count.tolist(), strict=True))


def pixel_scores(table: Table) -> PixelScores:
    """Return pixel error, Dice and intersection over union of each class.

    >>> from tilepipe.evaluation.table import tabulate
    >>> scores = pixel_scores(tabulate(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])))
    >>> scores.pixel_error, scores.classes[1].dice, scores.classes[1].iou
    (0.25, 0.8, 0.6666666666666666)
    """
    predicted = _by_label(table.predicted, table.voxels, table.unsigned[0])
    true = _by_label(table.true, table.voxels, table.unsigned[1])
    same = table.where(table.equal)
    both = _by_label(same.true, same.voxels, table.unsigned[1])
    classes = []
    for label in sorted(predicted.keys() | true.keys()):
        p, t, n = (counts.get(label, 0) for counts in (predicted, true, both))
        classes.append(ClassScores(label, p, t, 2 * n / (p + t), n / (p + t - n)))
    wrong = table.total - same.total
    return PixelScores(wrong / table.total if table.total else 0.0, tuple(classes))


def partition_scores(table: Table) -> PartitionScores | None:
    """Return how well the predicted objects partition the true ones; None where there are none.

    Law: equals the definitions over all pairs of voxels; renumbering changes nothing; equal
    partitions score exactly 1.

    >>> from tilepipe.evaluation.table import tabulate
    >>> table = tabulate(np.array([1, 1, 1, 1]), np.array([1, 1, 2, 2]))
    >>> scores = partition_scores(table)
    >>> scores.v_rand
    Agreement(score=0.6666666666666666, split=1.0, merge=0.5)
    >>> scores.voi_split, scores.voi_merge
    (0.0, 1.0)
    """
    inside = table.where(table.true != 0)
    if not len(inside):
        return None
    cuts = [*group_starts((inside.plane,)).tolist(), len(inside)]
    rows: list[tuple[float, ...]] = []
    pairs = []
    for a, b in pairwise(cuts):
        predicted, true, voxels = inside.predicted[a:b], inside.true[a:b], inside.voxels[a:b]
        objects = predicted != 0
        single = float(voxels[~objects].sum())
        joint = voxels[objects].astype(np.float64)
        predicted_sizes = _sizes(predicted[objects], voxels[objects])[2].astype(np.float64)
        true_sizes = _sizes(true, voxels)[2].astype(np.float64)
        in_both = math.fsum((joint * joint).tolist()) + single
        in_predicted = math.fsum((predicted_sizes * predicted_sizes).tolist()) + single
        in_true = math.fsum((true_sizes * true_sizes).tolist())
        pairs.append((in_both, in_predicted, in_true))
        total = float(voxels.sum())
        rand = 2 * in_both / (in_predicted + in_true), in_both / in_true, in_both / in_predicted
        rows.append((*rand, *_information(joint, predicted_sizes, true_sizes, total)))
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    in_both, in_predicted, in_true = (math.fsum(column) for column in zip(*pairs, strict=True))
    return PartitionScores(
        planes=len(rows),
        voxels=inside.total,
        v_rand=Agreement(*means[:3]),
        v_info=Agreement(*means[3:6]),
        rand_error=1 - 2 * in_both / (in_predicted + in_true),
        voi_split=means[6],
        voi_merge=means[7],
    )


def _information(
    joint: NDArray[np.float64],
    predicted: NDArray[np.float64],
    true: NDArray[np.float64],
    total: float,
) -> tuple[float, ...]:
    """Return V-Info, its split and merge parts, H(predicted | true), H(true | predicted), in bits.

    Objects of one voxel add nothing to the sums, so they are left out of the counts. Counts are
    sorted, so that equal ones give equal sums to the last bit.
    """
    of_joint, of_predicted, of_true = (
        max(math.log2(total) - math.fsum((n * np.log2(n)).tolist()) / total, 0.0)
        for n in map(np.sort, (joint, predicted, true))
    )
    of_each = of_predicted + of_true
    shared = max(of_each - of_joint, 0.0)
    score = 2 * shared / of_each if of_each else 1.0
    split, merge = (min(shared / h, 1.0) if h else 1.0 for h in (of_predicted, of_true))
    beyond, lacking = max(of_joint - of_true, 0.0), max(of_joint - of_predicted, 0.0)
    return min(score, 1.0), split, merge, beyond, lacking


def object_scores(table: Table) -> ObjectScores:
    """Return average precision: hits / (hits + false + missed), over ten thresholds.

    Above one half an object can be a hit for one other only, so none is counted twice. Where
    there is nothing to find and nothing found, the precision is 1.

    >>> from tilepipe.evaluation.table import tabulate
    >>> scores = object_scores(tabulate(np.array([1, 1, 1, 0, 2]), np.array([1, 1, 1, 1, 0])))
    >>> scores.matches[0], round(scores.average_precision, 3)
    (Match(threshold=0.5, hits=1, precision=0.5), 0.25)
    """
    predicted = table.where(table.predicted != 0)
    true = table.where(table.true != 0)
    shared = predicted.where(predicted.true != 0)
    sizes = []
    for whole, column in ((predicted, "predicted"), (true, "true")):
        plane, label, voxels = _sizes(getattr(whole, column), whole.voxels, whole.plane)
        keys = (
            np.concatenate((plane, shared.plane)),
            np.concatenate((label, getattr(shared, column))),
        )
        numbers = _numbers(*keys)
        by_number = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
        by_number[numbers[: len(label)]] = voxels
        sizes.append((len(label), by_number[numbers[len(label) :]]))
    (predicted_count, predicted_voxels), (true_count, true_voxels) = sizes
    union = predicted_voxels + true_voxels - shared.voxels
    matches = []
    for threshold in TWENTIETHS:
        hits = int((shared.voxels * 20 > threshold * union).sum())
        either = predicted_count + true_count - hits
        matches.append(Match(threshold / 20, hits, hits / either if either else 1.0))
    mean = math.fsum(match.precision for match in matches) / len(matches)
    return ObjectScores(predicted_count, true_count, mean, tuple(matches))


def _numbers(plane: Ints, label: Ints) -> NDArray[np.intp]:
    """Return a number for each pair, equal where the pairs are equal, from 0."""
    order = np.lexsort((label, plane))
    begins = group_starts((plane[order], label[order]))
    marks = np.zeros(len(order), np.intp)
    marks[begins] = 1
    numbers = np.empty(len(order), np.intp)
    numbers[order] = np.cumsum(marks) - 1
    return numbers
