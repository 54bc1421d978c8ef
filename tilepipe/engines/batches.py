"""Quick tiles travel together: what a task costs the scheduler is then paid once for several.

A task costs scheduler and driver some 1.6 ms, whatever is in it. So a batch is as many tiles as a
thread does in `SPAN`, one where they take long. How many that will be is only guessed: who
works on a batch begins no other tile when its time is over, and gives back the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tilepipe.engines import TileResult
from tilepipe.engines.attempts import Back, Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

SPAN = 0.2
"""Seconds of a thread that a batch takes, but for its last tile."""
RATE = 100
"""Tasks that the scheduler is given in a second at most: of many threads each takes longer."""
MOST = 16
"""Tiles of a batch at most."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles for one thread of a worker, one after the other."""

    tiles: tuple[int, ...]
    span: float
    """Seconds after which no other tile is begun."""
    expected: float
    """Seconds that a tile took elsewhere, 0 if that is not known."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a batch in its worker."""

    outcomes: tuple[TileResult | Failed | Back, ...]
    """What became of its first tiles, in their order; the others were not begun."""
    seconds: float
    """How long it took."""


class Pace:
    """How many tiles make a batch, from what the last one took."""

    def __init__(self, slots: int) -> None:
        self.expected = 0.0
        """Seconds of the longest tile, with what it waited for others in its worker."""
        self._slots = slots
        self._each, self._tried = math.inf, 0

    def note(self, ended: Ended) -> None:
        """Learn from a batch."""
        tried = [outcome for outcome in ended.outcomes if not isinstance(outcome, Back)]
        if tried:
            self._each, self._tried = ended.seconds / len(tried), len(tried)
        for done in tried:
            if isinstance(done, TileResult):
                seconds = done.read_seconds + done.compute_seconds + done.write_seconds
                self.expected = max(self.expected, self._slots * seconds)

    def span(self, threads: int) -> float:
        """Return the seconds of a batch, where so many threads work.

        >>> Pace(slots=1).span(8), Pace(slots=1).span(400)
        (0.2, 4.0)
        """
        return max(SPAN, threads / RATE)

    def most(self, threads: int) -> int:
        """Return the tiles of a batch: one at first, then twice as many as the last at most.

        >>> pace = Pace(slots=1)
        >>> pace.most(8)
        1
        >>> pace.note(Ended((TileResult(0, 1, 0, 0.0, 0.05, 0.0, "host:1"),), 0.05))
        >>> pace.most(8)
        2
        """
        fitting = self.span(threads) / max(self._each, 1e-9)
        return max(1, int(min(fitting, MOST, 2 * self._tried)))


def of_each(
    tiles: tuple[int, ...], ended: Ended | Failed | Back
) -> Iterator[tuple[int, TileResult | Failed | Back]]:
    """Return what became of each tile of a batch, also where all of it is lost.

    Which of several was to blame nobody knows.

    >>> [*of_each((4, 7), Ended((Failed("bad", opening=False),), 0.1))]
    [(4, Failed(cause='bad', opening=False, lost=False, alone=True)), (7, Back())]
    """
    if isinstance(ended, Failed) and len(tiles) > 1:
        ended = replace(ended, lost=True, alone=False)
    known = ended.outcomes if isinstance(ended, Ended) else (ended,) * len(tiles)
    return zip(tiles, (*known, *[Back()] * (len(tiles) - len(known))), strict=True)
