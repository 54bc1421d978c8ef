"""A worker whose time is limited takes no tile that it cannot finish, and leaves in good order."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from distributed.core import Status

if TYPE_CHECKING:
    from distributed import Worker

log = logging.getLogger(__name__)

SPAN = "TILEPIPE_JOB_SPAN"
"""The variable that tells a worker ``BEGIN:END`` of its job, in seconds of the epoch."""
SPARE = 5.0
"""Seconds that are left over at the end."""
LONGER = 1.2
"""How much longer than the longest of the last ones a tile may take."""
FETCH = 30.0
"""Seconds in which results must have been fetched from a worker that leaves."""


class Deadline:
    """What is left of a worker's time, against what a tile takes in it."""

    def __init__(self) -> None:
        span = os.environ.get(SPAN)
        self._begin, self._end = map(float, span.split(":")) if span else (0.0, math.inf)
        self._took = deque[float](maxlen=20)

    @property
    def unknown(self) -> bool:
        """Whether time is limited, and no tile has ended here that tells how long one takes."""
        return self._end < math.inf and not self._took

    def took(self, seconds: float) -> None:
        """Note how long a tile took here, from its first to its last moment."""
        self._took.append(seconds)

    def suffices(self, expected: float) -> bool:
        """Whether a tile can be finished, ``expected`` seconds being what others take.

        In the first half of its job a worker tries all the same as long as it has finished none:
        here it might take less.
        """
        now = time.time()
        if self.unknown and now < (self._begin + self._end) / 2:
            return True
        return self._end - now > LONGER * max(self._took, default=expected) + SPARE


async def leave(worker: Worker) -> None:
    """Take no more tasks, and go when those that run have ended and have been fetched."""
    if worker.status != Status.running:
        return
    log.info("what is left of the walltime is too short for a tile: leaving")
    worker.status = Status.paused
    since = time.monotonic()
    while worker.state.executing_count or (worker.data and time.monotonic() - since < FETCH):
        if worker.state.executing_count:
            since = time.monotonic()
        await asyncio.sleep(0.1)
    await worker.close_gracefully(reason="tilepipe-walltime")
