"""Pairs of labels counted: the table that every score is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """How many voxels bear each pair of labels: a sparse contingency table, rows in order.

    Labels are compared within one plane only; a volume that is scored as a whole is plane 0.
    """

    plane: Ints
    predicted: Ints
    true: Ints
    voxels: Ints
    """Voxels with this pair of labels, 1 at least."""
    unsigned: tuple[bool, bool] = (False, False)
    """Whether the predicted and the true labels are of 64 bits without a sign; the columns hold
    the bits of such labels, so that those past 2**63 - 1 look negative there."""

    def __len__(self) -> int:
        return len(self.voxels)

    @property
    def total(self) -> int:
        """Voxels counted."""
        return int(self.voxels.sum())

    def where(self, rows: NDArray[np.bool_]) -> Table:
        """Return the table of some of the rows."""
        columns = (self.plane[rows], self.predicted[rows], self.true[rows], self.voxels[rows])
        return Table(*columns, self.unsigned)

    @property
    def labels(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """The predicted and the true labels as they are, of those without a sign too."""
        predicted, true = self.unsigned
        return in_own_type(self.predicted, predicted), in_own_type(self.true, true)

    @property
    def equal(self) -> NDArray[np.bool_]:
        """Whether the predicted label is the true one, row by row."""
        equal: NDArray[np.bool_] = self.predicted == self.true
        if self.unsigned[0] != self.unsigned[1]:
            equal &= self.true >= 0  # the bits of -1 are those of 2**64 - 1, which is another label
        return equal


def tabulate(
    predicted: NDArray[np.generic],
    true: NDArray[np.generic],
    *,
    plane: NDArray[np.generic] | None = None,
) -> Table:
    """Count the pairs of labels of two integer arrays of one shape.

    ``plane`` numbers each voxel's plane and broadcasts to that shape; without it all is plane 0.

    >>> table = tabulate(np.array([[1, 1], [0, 2]]), np.array([[5, 5], [5, 7]]))
    >>> table.predicted.tolist(), table.true.tolist(), table.voxels.tolist()
    ([0, 1, 2], [5, 5, 7], [1, 2, 1])
    """
    if predicted.shape != true.shape:
        raise ValueError(f"shapes {predicted.shape} and {true.shape} must be equal")
    rows, columns = np.ravel(predicted), np.ravel(true)
    if rows.size == 0:
        nothing = np.zeros(0, np.int64)
        return Table(nothing, nothing, nothing, nothing)
    begins = np.ones(rows.size, bool)
    begins[1:] = rows[1:] != rows[:-1]
    begins[1:] |= columns[1:] != columns[:-1]
    planes = None if plane is None else np.ravel(np.broadcast_to(plane, predicted.shape))
    if planes is not None:
        begins[1:] |= planes[1:] != planes[:-1]
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=rows.size)
    zeros = np.zeros(first.size, np.int64)
    where = zeros if planes is None else planes[first].astype(np.int64)
    labels = rows[first].astype(np.int64), columns[first].astype(np.int64)
    unsigned = predicted.dtype == np.uint64, true.dtype == np.uint64
    return _group(where, *labels, lengths, unsigned)


def add(tables: Sequence[Table]) -> Table:
    """Return the table of all voxels of several tables; of none, the empty one.

    Law: the tables of blocks add up to the table of the whole, in any order.

    >>> part = tabulate(np.array([1, 2]), np.array([1, 1]))
    >>> add([part, part]).voxels.tolist()
    [2, 2]
    """
    columns = [
        np.concatenate([np.zeros(0, np.int64), *(getattr(table, name) for table in tables)])
        for name in ("plane", "predicted", "true", "voxels")
    ]
    unsigned = {table.unsigned for table in tables if len(table)}
    if len(unsigned) > 1:
        raise ValueError("tables of labels with and without a sign do not add up")
    plane, predicted, true, voxels = columns
    return _group(plane, predicted, true, voxels, *unsigned)


def _group(
    plane: Ints,
    predicted: Ints,
    true: Ints,
    voxels: Ints,
    unsigned: tuple[bool, bool] = (False, False),
) -> Table:
    """Return the table of rows in any order, in which a pair of labels may stand several times."""
    order = np.lexsort((true, predicted, plane))
    columns = plane[order], predicted[order], true[order]
    begins = group_starts(columns)
    counts = np.add.reduceat(voxels[order], begins) if begins.size else voxels
    plane, predicted, true = (column[begins] for column in columns)
    return Table(plane, predicted, true, counts, unsigned)


def group_starts(columns: Iterable[Ints]) -> NDArray[np.intp]:
    """Return where the rows of sorted columns change."""
    first, *rest = columns
    changes = np.ones(len(first), bool)
    changes[1:] = first[1:] != first[:-1]
    for column in rest:
        changes[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changes)


def in_own_type(labels: Ints, unsigned: bool) -> NDArray[np.integer]:
    """Return labels of a table in the type that they were counted in."""
    return labels.view(np.uint64) if unsigned else labels
