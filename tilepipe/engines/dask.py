"""Tiles on a Dask cluster: coordinates travel, arrays and models do not."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import dask
from distributed import (
    Client,
    KilledWorker,
    Nanny,
    Scheduler,
    SpecCluster,
    WorkerPlugin,
    as_completed,
)
from distributed.comm.core import connect
from distributed.security import Security
from distributed.utils import silence_logging_cmgr

from tilepipe.engines import RETRIES, Job, TileFailure, TileResult, one_line
from tilepipe.errors import BadRequest, TileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from distributed import Future, Worker

log = logging.getLogger(__name__)

TIMEOUT = 10
"""Seconds in which a scheduler must answer."""
SETTINGS = {
    # Long calls into the network may hold the interpreter: a silent worker is not a dead one.
    "distributed.scheduler.worker-ttl": None,
    # A tile is retried by us; one worker that dies must not spoil all that it held.
    "distributed.scheduler.allowed-failures": 10,
    "distributed.admin.tick.limit": "1h",
    "distributed.worker.multiprocessing-method": "spawn",  # never fork after Zarr was used
}


@dataclass(frozen=True, slots=True)
class _Failed:
    """What went wrong in a worker, in words, since not every exception can travel."""

    cause: str
    opening: bool
    """Whether the job could not be opened there, so that no tile can be done."""


class _Jobs(WorkerPlugin):
    """Gives each worker process the job, once, under its key."""

    def __init__(self, job: Job) -> None:
        self.name = f"tilepipe-{job.key}"
        self.job = job

    def setup(self, worker: Worker) -> None:
        """Keep the job; it is opened by the first tile."""
        _here.setdefault(self.job.key, _Here(self.job))

    def teardown(self, worker: Worker) -> None:
        """Let the model and the open files go."""
        _here.pop(self.job.key, None)


class _Here:
    """A job in this process: opened once, never more tiles at once than it has slots."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(job.slots)
        self._process: Callable[[int], TileResult] | None = None

    def __call__(self, index: int) -> TileResult | _Failed:
        try:
            with self._lock:
                if self._process is None:
                    self._process = self._job.open()
        except Exception as error:  # whatever it is, the driver reports it
            log.info("the job cannot be opened", exc_info=True)
            return _Failed(one_line(error), opening=True)
        try:
            with self._slots:
                return self._process(index)
        except Exception as error:  # the tile is retried or set aside, the rest goes on
            log.info("tile %d failed", index, exc_info=True)
            return _Failed(one_line(error), opening=False)


_here: dict[str, _Here] = {}


def process_tile(key: str, index: int) -> TileResult | _Failed:
    """Process one tile in a worker: the task that the scheduler sees."""
    return _here[key](index)


def run(
    job: Job, tiles: Iterable[int], *, client: Client, retries: int = RETRIES
) -> Iterator[TileResult | TileFailure]:
    """Process tiles on the workers of a cluster, as they come and go.

    The scheduler never holds more than two tiles for each thread of its workers. A tile that was
    lost with its worker counts as one attempt.
    """
    plugin = _Jobs(job)
    client.register_plugin(plugin)
    source, again, attempts = iter(tiles), deque[int](), dict[int, int]()
    indices: dict[Future[TileResult | _Failed], int] = {}
    finished = as_completed(loop=client.loop)
    window = _Window(client)
    try:
        _await_workers(client)
        while True:
            while len(indices) < window.size():
                index = again.popleft() if again else next(source, None)
                if index is None:
                    break
                attempts[index] = attempts.get(index, 0) + 1
                name = f"tilepipe-{job.key[:8]}-{index}-{attempts[index]}"
                future = client.submit(process_tile, job.key, index, key=name, pure=False)
                indices[future] = index
                finished.add(future)
            if not indices:
                return
            future = next(finished)
            index = indices.pop(future)
            outcome = _outcome(future)
            future.release()
            if isinstance(outcome, TileResult):
                del attempts[index]
                yield outcome
            elif client.status != "running":
                raise TileError("the scheduler is gone; start one and run again to go on")
            elif outcome.opening:
                raise TileError(f"a worker cannot begin: {outcome.cause}")
            elif attempts[index] > retries:
                yield TileFailure(index, outcome.cause, attempts.pop(index))
            else:
                again.append(index)
    finally:
        _stop(client, list(indices), plugin.name)


def _outcome(future: Future[TileResult | _Failed]) -> TileResult | _Failed:
    """Return what became of a tile, be it that its worker died."""
    try:
        outcome = future.result()
    except KilledWorker:
        cause = "each worker process that took it died, perhaps for want of memory"
        return _Failed(f"{cause}: give less with --memory", opening=False)
    except Exception as error:  # CancelledError, what cannot be unpickled
        return _Failed(one_line(error), opening=False)
    assert isinstance(outcome, TileResult | _Failed)
    return outcome


def _stop(client: Client, futures: list[Future[TileResult | _Failed]], plugin: str) -> None:
    """Take back what has not begun and let the workers forget the job."""
    if client.status != "running":
        return
    try:
        client.cancel(futures, force=True)
        client.unregister_worker_plugin(plugin)
    except Exception:  # of a worker that goes at this moment, and takes the job with it
        log.info("not every worker has let the job go", exc_info=True)


def _await_workers(client: Client) -> None:
    """Say that there are no workers, where there are none; tiles wait for them."""
    try:
        client.wait_for_workers(1, timeout=TIMEOUT)
    except TimeoutError:
        log.warning("waiting for workers: the scheduler has none")


class _Window:
    """How many tiles the scheduler may hold; asked again every second."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked, self._threads = -1.0, 0

    def size(self) -> int:
        """Return two tiles for each thread of the workers there are, four at least."""
        now = time.monotonic()
        if now - self._asked > 1:
            self._threads = sum(self._client.nthreads().values())
            self._asked = now
        return max(4, 2 * self._threads)


@contextmanager
def local_client(
    workers: int, *, threads: int, gpus: Sequence[str] = (), dashboard: bool = True
) -> Iterator[Client]:
    """Start worker processes on this machine, reachable from it alone, and end them.

    ``threads`` are tiles in flight in each. With ``gpus`` each worker sees one of them only, from
    before torch is imported. The workers import the program's main module: a script that calls
    this needs ``if __name__ == "__main__"``.
    """
    shown = dashboard and find_spec("bokeh") is not None
    local = "127.0.0.1:0"
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard": shown, "dashboard_address": local}
    specs = {}
    for place in range(len(gpus) or workers):
        env = {"CUDA_VISIBLE_DEVICES": gpus[place]} if gpus else {}
        options = {
            "nthreads": threads,
            "memory_limit": 0,
            "host": "127.0.0.1",
            "dashboard_address": local,
            "preload": [__name__],  # calls dask_setup
            "env": env,
            "silence_logs": logging.CRITICAL,
        }
        specs[place] = {"cls": Nanny, "options": options}
    with (
        dask.config.set(SETTINGS),
        SpecCluster(
            workers=specs,
            scheduler={"cls": Scheduler, "options": scheduler},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def dask_setup(worker: Worker) -> None:
    """Leave an interrupt from the terminal, which goes to workers too, to the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def existing_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that already runs; it and its workers are left as they are.

    Raises `BadRequest` where none answers.
    """
    with silence_logging_cmgr(logging.CRITICAL):
        try:
            with ThreadPoolExecutor(1) as pool:  # a notebook has an event loop in this thread
                pool.submit(lambda: asyncio.run(_greet(address))).result()
            client = Client(address, timeout=TIMEOUT, set_as_default=False)
        except Exception as error:  # whatever the peer, if any, made of it
            raise BadRequest(
                f"scheduler (={address}) must be a Dask scheduler that answers within {TIMEOUT} s:"
                f" {one_line(error)}"
            ) from error
        with client:
            yield client


async def _greet(address: str) -> None:
    """Shake hands with a scheduler in time; a `Client` waits for ever for what does not answer."""
    arguments = Security().get_connection_args("client")
    async with asyncio.timeout(TIMEOUT):
        comm = await connect(address, timeout=TIMEOUT, **arguments)
        await comm.close()


def dashboard_address(client: Client) -> str | None:
    """Return the address of the dashboard, None where there is none (it needs bokeh)."""
    services = client.scheduler_info()["services"]
    return str(client.dashboard_link) if "dashboard" in services else None
