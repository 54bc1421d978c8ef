"""A job in a worker of a Dask cluster: sent once, opened by its first tile, closed at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from distributed import WorkerPlugin, get_worker

from tilepipe.engines import Job, Opened, TileResult, one_line
from tilepipe.engines.attempts import Back, Failed
from tilepipe.engines.batches import Batch, Ended
from tilepipe.engines.walltime import Deadline, leave
from tilepipe.errors import TileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Worker

log = logging.getLogger(__name__)


class JobPlugin(WorkerPlugin):
    """Gives each worker the job, once, under its key; there may be several workers in a process."""

    def __init__(self, job: Job) -> None:
        self.name = plugin_name(job.key)
        self.job = job
        self.here: JobHere | None = None

    def setup(self, worker: Worker) -> None:
        """Keep the job; it is opened by the first tile."""
        self.here = JobHere(self.job, worker)

    async def teardown(self, worker: Worker) -> None:
        """End all writing, and let go of the model and the open files."""
        here, self.here = self.here, None
        if here is not None:
            await asyncio.to_thread(here.close)


def plugin_name(key: str) -> str:
    """Return the name under which workers have a job."""
    return f"tilepipe-{key}"


class JobHere:
    """A job in a worker: opened once, never more tiles at once than it has slots."""

    def __init__(self, job: Job, worker: Worker) -> None:
        self._job, self._worker, self._deadline = job, worker, Deadline()
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._slots = threading.BoundedSemaphore(job.slots)
        self._opened: Opened | None = None
        self._closed = False

    def __call__(self, batch: Batch) -> Ended:
        """Process one tile after the other, until time is over or the job is let go."""
        began, outcomes = time.monotonic(), list[TileResult | Failed | Back]()
        for index in batch.tiles:
            outcomes.append(self._process(index, batch.expected))
            over = time.monotonic() - began > batch.span
            if over or self._closed or isinstance(outcomes[-1], Back):
                break
        return Ended(tuple(outcomes), time.monotonic() - began)

    def _process(self, index: int, expected: float) -> TileResult | Failed | Back:
        try:
            with self._lock:
                if self._opened is None:
                    self._opened = self._job.open()
                    if self._closed:
                        self._opened.close()
        except Exception as error:  # whatever it is, the driver reports it
            log.info("the job cannot be opened", exc_info=True)
            return Failed(one_line(error), opening=True)
        try:
            with self._slots, self._alone_at_first():
                if not self._deadline.suffices(expected):
                    self._worker.loop.add_callback(leave, self._worker)
                    return Back()
                began = time.monotonic()
                result = self._opened(index)
                self._deadline.took(time.monotonic() - began)
                return result
        except Exception as error:  # the tile is retried or set aside, the rest goes on
            log.info("tile %d failed", index, exc_info=True)
            return Failed(one_line(error), opening=False)

    def close(self) -> None:
        """End all writing; what is being written has ended when this returns."""
        self._closed = True
        if (opened := self._opened) is not None:
            opened.close()

    @contextmanager
    def _alone_at_first(self) -> Iterator[None]:
        """Let others wait for the tile that tells whether the time suffices for them."""
        with self._first if self._deadline.unknown else nullcontext():
            yield


def process_batch(key: str, batch: Batch) -> Ended:
    """Process tiles in a worker: the task that the scheduler sees."""
    plugin = get_worker().plugins.get(plugin_name(key))
    if not isinstance(plugin, JobPlugin) or plugin.here is None:
        raise TileError("this worker has let the job go")
    return plugin.here(batch)
