"""One task of an array: which tiles are its own."""

from __future__ import annotations

from dataclasses import dataclass

from tilepipe.errors import BadRequest


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """One task of an array, each of which computes its share of the tiles.

    Law: the shares of all tasks are every tile once, neighbours together.

    >>> str(ArrayTask(2, 3)), [ArrayTask(n, 3).share(10) for n in (1, 2, 3)]
    ('2/3', [range(0, 3), range(3, 6), range(6, 10)])
    """

    number: int
    """Counted from 1, as ``SLURM_ARRAY_TASK_ID`` of ``--array=1-N`` is."""
    count: int
    """How many tasks the array has."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise BadRequest(
                f"task (={self}) must be I/N with I from 1 to N; submit the array as"
                f" 1-{max(self.count, 1)}"
            )

    def share(self, tiles: int) -> range:
        """Return the tiles of this task, of so many."""
        first, last = (tiles * n // self.count for n in (self.number - 1, self.number))
        return range(first, last)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
