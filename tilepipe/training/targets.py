"""From labels to what a network learns: a class for each voxel, and a weight for it.

Labels are integers of shape S, ``y x`` or ``z y x``. Everything here is local: what is computed
on a crop equals the crop of what is computed on the whole, if the crop is grown first by
``MARGIN``, or by ``weights_margin``, wherever the whole goes on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

IGNORE = 255
"""The class of voxels that nobody labelled; no loss sees them."""
MARGIN = 1
"""Voxels on each side of a crop that ``class_map`` needs, or its border is not the whole's."""
REACH = 4
"""Where d1 + d2 is more than so many sigma, the weight of a border is 0; it would be w0 e^-8."""
NAMES = {
    "mask": ["background", "object"],
    "foreground": ["background", "foreground"],
    "membrane": ["inside", "membrane"],
    "border": ["background", "inside", "border"],
}


def class_map(
    labels: NDArray[np.integer], target: str, *, ignore: int | None = None, in_plane: bool = False
) -> NDArray[np.uint8]:
    """Return the class of each voxel; where ``labels`` is ``ignore``, IGNORE.

    ``classes`` takes the labels as they are: they must lie in 0..254 (or be 255, which is IGNORE).
    ``mask`` and ``foreground`` are 1 where the label is not 0. ``membrane``, for instances that
    touch, is 1 where the label is 0 or a face neighbour (of 4, in 3D of 6) has another id.
    ``border`` is 0 in the background, and in objects 2 where a face neighbour has another id,
    another object's or the background's, and 1 inside. A neighbour that is ``ignore``, or that
    the array does not hold, has no other id. With ``in_plane`` neighbours along z do not count.

    Law: of a crop with MARGIN voxels more on each side it is the crop of the whole's.

    >>> class_map(np.array([[0, 0, 4, 4, 4, 7, 7]]), "membrane").tolist()
    [[1, 1, 1, 0, 1, 1, 0]]
    >>> class_map(np.array([[0, 0, 4, 4, 4, 7, 7]]), "border").tolist()
    [[0, 0, 2, 1, 2, 2, 1]]
    >>> class_map(np.array([[0, 0, 4, 4, 4, 7, 7]]), "mask", ignore=7).tolist()
    [[0, 0, 1, 1, 1, 255, 255]]
    """
    if target == "classes":
        classes = labels.astype(np.uint8)
    elif target in ("mask", "foreground"):
        classes = (labels != 0).astype(np.uint8)
    elif target == "membrane":
        classes = ((labels == 0) | _edges(labels, ignore, in_plane)).astype(np.uint8)
    elif target == "border":
        classes = np.where(_edges(labels, ignore, in_plane), np.uint8(2), np.uint8(1))
        classes[labels == 0] = 0
    else:
        raise ValueError(f"target (={target!r}) has no classes; those that have: {list(NAMES)}")
    if ignore is not None:
        classes[labels == ignore] = IGNORE
    return classes


def class_count(target: str) -> int | None:
    """Return how many classes a target has; None where the labels, or the user, say it.

    >>> class_count("border"), class_count("classes"), class_count("values")
    (3, None, None)
    """
    return len(NAMES[target]) if target in NAMES else None


def class_names(target: str, classes: int) -> list[str]:
    """Return what a network's output channels are called; ``classes`` is their number.

    >>> class_names("border", 3), class_names("classes", 2), class_names("membrane", 1)
    (['background', 'inside', 'border'], ['class 0', 'class 1'], ['membrane'])
    """
    if target not in NAMES:
        noun = "value" if target == "values" else "class"
        return [f"{noun} {index}" for index in range(classes)]
    if classes == 1 and len(NAMES[target]) == 2:
        return NAMES[target][1:]  # one logit says which of the two
    return list(NAMES[target])


def balance_weights(counts: Sequence[int]) -> list[float]:
    """Return a weight for each class, inverse to its voxels; the paper's w_c (section 3).

    Law: over the voxels counted the mean weight is 1, and each class that occurs weighs the same
    in sum. A class without voxels gets 0, as there is nothing that it could weigh.

    >>> balance_weights([75, 25, 0])
    [0.6666666666666666, 2.0, 0.0]
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def weights_margin(sigma: float) -> int:
    """Return the voxels on each side of a crop that ``border_weights`` needs, along each axis.

    >>> weights_margin(5.0), weights_margin(1.2)
    (20, 5)
    """
    return math.ceil(REACH * sigma)


def border_weights(
    objects: NDArray[np.integer],
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    at: NDArray[np.bool_] | None = None,
    ignore: int | None = None,
    in_plane: bool = False,
) -> NDArray[np.float32]:
    """Return ``w0 exp(-(d1 + d2)^2 / (2 sigma^2))``, large where two objects are close.

    d1 and d2 are the distances to the nearest and to the second nearest object, centre to centre,
    in voxels (arXiv:1505.04597, equation 2), as is ``sigma``. ``objects`` are ids, 0 is background,
    and voxels that are ``ignore`` are neither: no object, and of weight 0. An object in several
    parts is one object. Where there are not two, and past REACH sigma, the weight is 0.

    The weight is given where ``at`` holds, and is 0 elsewhere. By default that is the background:
    the map is there to learn what separates objects, and the authors and everyone since put 0
    inside them. Instances that touch have no background between them: their border or membrane
    voxels are given as ``at``. There d1 is 0, as the voxel is its own object's, and d2 is the
    distance to the nearest other one, which is what the authors' later code does (Falk et al.
    2019, doi:10.1038/s41592-018-0261-2). With ``in_plane`` each plane along z is on its own.

    Law: of a crop with ``weights_margin`` voxels more on each side it is the crop of the whole's.

    >>> border_weights(np.array([[1, 0, 0, 2]]), w0=1, sigma=3).round(3).tolist()
    [[0.0, 0.6069999933242798, 0.6069999933242798, 0.0]]
    """
    if at is None:
        at = objects == 0
    if ignore is not None:
        at = at & (objects != ignore)
        objects = np.where(objects == ignore, 0, objects)
    weights = np.full(objects.shape, np.inf)
    if in_plane and objects.ndim == 3:
        for plane, (ids, where) in enumerate(zip(objects, at, strict=True)):
            weights[plane][where] = _two_distances(ids, where, REACH * sigma)
    else:
        weights[at] = _two_distances(objects, at, REACH * sigma)
    near = np.isfinite(weights)
    weights[near] = w0 * np.exp(weights[near] ** 2 / (-2 * sigma**2))
    weights[~near] = 0
    return weights.astype(np.float32)


def _edges(labels: NDArray[np.integer], ignore: int | None, in_plane: bool) -> NDArray[np.bool_]:
    """Return whether a face neighbour has another id, ``ignore`` not counted."""
    edges = np.zeros(labels.shape, bool)
    known = None if ignore is None else labels != ignore
    for axis in range(labels.ndim - 2 if in_plane else 0, labels.ndim):
        before, after = (
            (slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None))
        )
        differ = labels[before] != labels[after]
        if known is not None:
            differ &= known[before] & known[after]
        edges[before] |= differ
        edges[after] |= differ
    return edges


def _two_distances(
    objects: NDArray[np.integer], at: NDArray[np.bool_], reach: float
) -> NDArray[np.float64]:
    """Return d1 + d2 at each voxel of ``at``; infinite past ``reach``, or without two objects.

    Another object's number differs from the nearest one's in at least one bit. So the second
    nearest is the nearest, over the bits, of those that differ in this bit: two distance maps for
    each bit, however many objects there are.
    """
    solid = objects != 0
    ids = np.unique(objects[solid])
    total = np.full(int(at.sum()), np.inf)
    if len(ids) < 2 or not total.size:
        return total
    number = np.searchsorted(ids, objects)
    places = np.nonzero(at)
    first, where = _nearest(solid, places)
    close = np.nonzero(2 * first <= reach)[0]  # d2 is not less than d1
    places, first, nearest = tuple(p[close] for p in places), first[close], number[where][close]
    second = np.full(first.shape, np.inf)
    for bit in range((len(ids) - 1).bit_length()):
        high = (number >> bit) & 1 == 1
        for others, own in ((solid & high, 0), (solid & ~high, 1)):
            voxels = np.nonzero((nearest >> bit) & 1 == own)[0]
            if voxels.size and others.any():
                distance, _ = _nearest(others, tuple(p[voxels] for p in places))
                second[voxels] = np.minimum(second[voxels], distance)
    both = first + second
    total[close] = np.where(both <= reach, both, np.inf)
    return total


def _nearest(
    solid: NDArray[np.bool_], places: tuple[NDArray[np.intp], ...]
) -> tuple[NDArray[np.float64], tuple[NDArray[np.int32], ...]]:
    """Return the distance from ``places`` to the nearest solid voxel, and which one that is."""
    indices = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
    where = tuple(along[places] for along in indices)
    square = np.zeros(places[0].shape)
    for place, nearest in zip(places, where, strict=True):
        square += (place - nearest) ** 2
    return np.sqrt(square), where
