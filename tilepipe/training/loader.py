"""Batches made by threads ahead of the loop that learns from them, always in the same order."""

from __future__ import annotations

import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from tilepipe.training.patches import Patches, Sample
    from tilepipe.training.ranks import Team

    PatchBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Image ``(B, C, *S)``, truth ``(B, *S')`` or ``(B, K, *S')``, weights ``(B, *S')``."""

AHEAD = 2
"""Batches that lie ready, besides those that are being made."""


class Loader:
    """Threads that make samples ahead: NumPy, SciPy and the codecs let other threads run.

    Each process of a team gets its share of the samples.
    """

    def __init__(self, patches: Patches, team: Team, *, batch: int, workers: int) -> None:
        self._patches, self._batch = patches, batch
        self._workers, self._team = workers, team
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="patches")
        self.waited = 0.0
        """Seconds that the loop waited for a batch."""

    def batches(self, first: int) -> Iterator[PatchBatch]:
        """Yield the batches from number ``first`` on, for ever."""
        numbers = self._numbers(first)
        queue: deque[Future[Sample]] = deque()
        while True:
            while len(queue) < self._batch * (1 + AHEAD) + self._workers:
                queue.append(self._pool.submit(self._patches.__getitem__, next(numbers)))
            begun = time.perf_counter()
            samples = [queue.popleft().result() for _ in range(self._batch)]
            self.waited += time.perf_counter() - begun
            yield _stacked(samples)

    def batch(self, number: int) -> PatchBatch:
        """Return one batch, made now."""
        numbers = itertools.islice(self._numbers(number), self._batch)
        return _stacked(list(self._pool.map(self._patches.__getitem__, numbers)))

    def _numbers(self, first: int) -> Iterator[int]:
        step = first
        while True:
            begin = (step * self._team.ranks + self._team.rank) * self._batch
            yield from range(begin, begin + self._batch)
            step += 1

    def close(self) -> None:
        """End the threads; what they have not begun is not made."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _stacked(samples: list[Sample]) -> PatchBatch:
    return (
        torch.from_numpy(np.stack([sample.image for sample in samples])),
        torch.from_numpy(np.stack([sample.truth for sample in samples])),
        torch.from_numpy(np.stack([sample.weights for sample in samples])),
    )
