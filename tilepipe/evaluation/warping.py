"""The warping error: which pixels no warping of the truth that keeps its topology explains.

V. Jain et al. 2010, Boundary Learning by Optimization with Topological Constraints, CVPR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

LARGEST_PLANE = 1 << 26
"""Pixels of a plane that is warped, at most: it is held in memory."""
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def warping_mismatches(predicted: Mask, true: Mask, *, fixed: Mask | None = None) -> Mask:
    """Return the pixels in which the prediction differs from the truth that was warped towards it.

    Masks are ``y x``; objects connect through edges, the background through corners too, and is
    all round the image. Pixels that differ are flipped in the truth wherever that changes no
    object's or hole's number, as long as there are any, those of even rows and columns first and
    so on. Which optimum is reached depends on the order: the error is an upper bound. Pixels that
    are ``fixed`` are neither flipped nor counted.

    Law: objects and holes of the warped truth are those of the truth, and no pixel is left that
    could be flipped.

    >>> true = np.array([[1, 1, 0, 1, 1]], bool)
    >>> warping_mismatches(np.array([[1, 0, 0, 1, 1]], bool), true).sum()
    np.int64(0)
    >>> warping_mismatches(np.array([[1, 1, 1, 1, 1]], bool), true).astype(int).tolist()
    [[0, 0, 1, 0, 0]]
    """
    rows, columns = true.shape
    warped = np.pad(true, 1)
    target = np.pad(predicted, 1)
    movable = np.pad(np.ones(true.shape, bool) if fixed is None else ~fixed, 1)
    weights = [(1 << place, dy, dx) for place, (dy, dx) in enumerate(_RING)]
    simple = _simple()
    changed = True
    while changed:
        changed = False
        # Pixels two apart are no neighbours, so those of one parity are flipped together.
        for first in range(4):
            y, x = np.nonzero((warped != target) & movable)
            here = (y % 2 == first // 2) & (x % 2 == first % 2)
            y, x = y[here], x[here]
            around = np.zeros(len(y), np.intp)
            for weight, dy, dx in weights:
                around += weight * warped[y + dy, x + dx]
            flip = simple[around]
            warped[y[flip], x[flip]] ^= True
            changed |= bool(flip.any())
    left: Mask = (warped != target) & movable
    return left[1 : rows + 1, 1 : columns + 1]


def _simple() -> Mask:
    """Return, for each of the 256 rings of neighbours, whether the pixel inside is simple.

    It is where, round it, there is one piece of object that touches it by an edge, and one of
    background that touches it at all (G. Bertrand, G. Malandain 1994).
    """
    table = np.zeros(256, bool)
    for code in range(256):
        patch = np.zeros((3, 3), bool)
        for place, (dy, dx) in enumerate(_RING):
            patch[1 + dy, 1 + dx] = code >> place & 1
        pieces, _ = label(patch)
        touching = {int(pieces[1 + dy, 1 + dx]) for dy, dx in _RING if not dy or not dx} - {0}
        patch[1, 1] = True
        _, gaps = label(~patch, np.ones((3, 3)))
        table[code] = len(touching) == 1 and gaps == 1
    return table
