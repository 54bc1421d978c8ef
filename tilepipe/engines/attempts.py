"""Which tile to try next on workers that come and go, and who is to blame where one fails."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from tilepipe.engines import TileFailure, TileResult

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Failed:
    """What went wrong in a worker, in words, since not every exception can travel."""

    cause: str
    opening: bool
    """Whether the job could not be opened there, so that no tile can be done."""
    lost: bool = False
    """Whether its worker died; of the tiles that it held nobody knows which is to blame."""
    alone: bool = True
    """Whether it was the only tile of its task: if not, this is no attempt of its own."""


@dataclass(frozen=True, slots=True)
class Back:
    """A tile that nobody has tried, or that nobody is to blame for."""


class Tiles:
    """The tiles not in flight: fresh ones, those that failed, and those whose worker died.

    A tile that kills its worker takes down what runs beside it. So of those whose worker died no
    more are in flight than there are workers, each in a task of its own, and one that was hit twice
    is so alone.
    """

    def __init__(self, tiles: Iterable[int], retries: int) -> None:
        self._fresh, self._retries = iter(tiles), retries
        self._failed, self._suspects = deque[int](), deque[int]()
        self._on_trial: set[int] = set()
        self._attempts: dict[int, int] = {}

    def take(self, workers: int, most: int = 1) -> tuple[int, ...]:
        """Return the tiles of the next task, so many at most; none where there are none now.

        One whose worker died goes alone.
        """
        if self._suspects and len(self._on_trial) < self._most_on_trial(workers):
            taken = [self._suspects.popleft()]
            self._on_trial.update(taken)
        else:
            taken = [self._failed.popleft() for _ in range(min(most, len(self._failed)))]
            taken += islice(self._fresh, most - len(taken))
        for index in taken:
            self._attempts[index] = self._attempts.get(index, 0) + 1
        return tuple(taken)

    def _most_on_trial(self, workers: int) -> int:
        hits = self._attempts  # of those on trial, one more: that in which they are now
        alone = hits[self._suspects[0]] > 1 or any(hits[index] > 2 for index in self._on_trial)
        return 1 if alone else max(1, workers)

    def end(
        self, index: int, outcome: TileResult | Failed | Back
    ) -> TileResult | TileFailure | None:
        """Return what became of a tile, None where it is to be tried again."""
        self._on_trial.discard(index)
        if isinstance(outcome, TileResult):
            return replace(outcome, attempts=self._attempts.pop(index))
        if isinstance(outcome, Back):
            self._attempts[index] -= 1
            self._failed.append(index)
            return None
        if not outcome.alone:
            self._attempts[index] -= 1
        elif self._attempts[index] > self._retries:
            return TileFailure(index, outcome.cause, self._attempts.pop(index))
        (self._suspects if outcome.lost else self._failed).append(index)
        return None
