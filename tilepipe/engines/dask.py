"""Tiles on a Dask cluster: coordinates travel, arrays and models do not."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING
from uuid import uuid4

import dask
from dask.utils import key_split
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
"""Seconds in which a scheduler must answer, and after which missing workers are spoken of."""
POLL = 0.0005, 0.05
"""Seconds between two looks at what has ended: just after a tile did, and at most."""
GONE = "the scheduler is gone; start one and run again to go on"
SETTINGS = {
    # Long calls into the network may hold the interpreter: a silent worker is not a dead one.
    "distributed.scheduler.worker-ttl": None,
    # Tiles are tried again by us: a bad one would kill this many workers more at each attempt.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.admin.tick.limit": "1h",
    # Of messages, of which each stream to a worker keeps so many: memory is flat sooner.
    "distributed.admin.low-level-log-length": 100,
    "distributed.worker.multiprocessing-method": "spawn",  # never fork after Zarr was used
}


@dataclass(frozen=True, slots=True)
class _Failed:
    """What went wrong in a worker, in words, since not every exception can travel."""

    cause: str
    opening: bool
    """Whether the job could not be opened there, so that no tile can be done."""
    lost: bool = False
    """Whether its worker died; of the tiles that it held nobody knows which is to blame."""


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


class _Tiles:
    """The tiles not in flight: fresh ones, those that failed, and those whose worker died.

    A tile that kills its worker takes down what runs beside it. So of those whose worker died no
    more are in flight than there are workers, and one that was hit twice is so alone.
    """

    def __init__(self, tiles: Iterable[int], retries: int) -> None:
        self._fresh, self._retries = iter(tiles), retries
        self._failed, self._suspects = deque[int](), deque[int]()
        self._on_trial: set[int] = set()
        self._attempts: dict[int, int] = {}

    def take(self, workers: int) -> int | None:
        """Return the tile to begin next, None where there is none now."""
        index: int | None
        if self._suspects and len(self._on_trial) < self._most_on_trial(workers):
            index = self._suspects.popleft()
            self._on_trial.add(index)
        elif self._failed:
            index = self._failed.popleft()
        else:
            index = next(self._fresh, None)
        if index is not None:
            self._attempts[index] = self._attempts.get(index, 0) + 1
        return index

    def _most_on_trial(self, workers: int) -> int:
        hits = self._attempts  # of those on trial, one more: that in which they are now
        alone = hits[self._suspects[0]] > 1 or any(hits[index] > 2 for index in self._on_trial)
        return 1 if alone else max(1, workers)

    def end(self, index: int, outcome: TileResult | _Failed) -> TileResult | TileFailure | None:
        """Return what became of a tile, None where it is to be tried again."""
        self._on_trial.discard(index)
        if isinstance(outcome, TileResult):
            return replace(outcome, attempts=self._attempts.pop(index))
        if self._attempts[index] > self._retries:
            return TileFailure(index, outcome.cause, self._attempts.pop(index))
        (self._suspects if outcome.lost else self._failed).append(index)
        return None


def run(
    job: Job, tiles: Iterable[int], *, client: Client, retries: int = RETRIES
) -> Iterator[TileResult | TileFailure]:
    """Process tiles on the workers of a cluster, as they come and go.

    The scheduler never holds more than two tiles for each thread of its workers. A tile that was
    lost with its worker counts as one attempt. Raises `BadRequest` where workers cannot take the
    job, `TileError` where they cannot open it or the scheduler goes.
    """
    plugin, name = _Jobs(job), f"tilepipe-{uuid4().hex[:8]}"
    todo, window = _Tiles(tiles, retries), _Window(client)
    indices: dict[Future[TileResult | _Failed], int] = {}
    finished, pause = as_completed(loop=client.loop), POLL[0]
    try:
        _send(client, plugin)
        while True:
            room, taken = window.size() - len(indices), list[int]()
            while len(taken) < room and (index := todo.take(window.workers)) is not None:
                taken.append(index)
            if taken:  # in one message: each costs the scheduler as much as a tile
                keys = [(name, index, uuid4().hex[:8]) for index in taken]
                futures = client.map(partial(process_tile, job.key), taken, key=keys, pure=False)
                indices.update(zip(futures, taken, strict=True))
                finished.update(futures)
            if not indices:
                return
            if not finished.has_ready():
                time.sleep(pause)
                pause = min(1.5 * pause, POLL[1])
                continue
            pause = POLL[0]
            for future, outcome in _outcomes(client, finished.next_batch(block=False)):
                index = indices.pop(future)
                future.release()
                if isinstance(outcome, _Failed) and client.status != "running":
                    raise TileError(GONE)
                if isinstance(outcome, _Failed) and outcome.opening:
                    raise TileError(f"a worker cannot begin: {outcome.cause}")
                ended = todo.end(index, outcome)
                if ended is not None:
                    yield ended
    finally:
        _stop(client, list(indices), plugin.name)


def _send(client: Client, plugin: _Jobs) -> None:
    """Give the job to the workers there are, and by the scheduler to those that will come."""
    try:
        client.register_plugin(plugin)
    except OSError as error:
        raise TileError(GONE) from error
    except Exception as error:  # of a worker, as text if it is of no class known here
        raise BadRequest(
            "scheduler must have workers with the same tilepipe as here; a worker cannot take the"
            f" job: {one_line(error)}"
        ) from error


def _outcomes(
    client: Client, ended: list[Future[TileResult | _Failed]]
) -> list[tuple[Future[TileResult | _Failed], TileResult | _Failed]]:
    """Return what became of tiles; results are fetched together, which saves most of the time."""
    found = [future for future in ended if future.status == "finished"]
    fetched: dict[Future[TileResult | _Failed], TileResult | _Failed] = {}
    try:
        fetched = dict(zip(found, client.gather(found), strict=True))
    except Exception:  # of one of them; each is asked
        log.info("results cannot be fetched together", exc_info=True)
    return [
        (future, fetched[future] if future in fetched else _outcome(future)) for future in ended
    ]


def _outcome(future: Future[TileResult | _Failed]) -> TileResult | _Failed:
    """Return what became of a tile, be it that its worker died."""
    try:
        outcome = future.result()
    except KilledWorker:
        cause = "each worker process that took it died, perhaps for want of memory"
        return _Failed(f"{cause}: give less with --memory", opening=False, lost=True)
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


class _Window:
    """How many tiles the scheduler may hold; asked again every second."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.workers, self._threads = 0, 0
        self._asked, self._seen, self._warned = -1.0, time.monotonic(), False

    def size(self) -> int:
        """Return two tiles for each thread of the workers there are, four at least.

        Says so where there have been no workers for a while; tiles wait for them.
        """
        now = time.monotonic()
        if now - self._asked > 1:
            try:
                threads = self._client.nthreads()
            except OSError as error:
                raise TileError(GONE) from error
            self.workers, self._threads = len(threads), sum(threads.values())
            self._asked = now
            if threads:
                self._seen, self._warned = now, False
            elif now - self._seen > TIMEOUT and not self._warned:
                log.warning("waiting for workers: the scheduler has none")
                self._warned = True
            _restart_lost(self._client)
            key_split.cache_clear()  # Dask's, of up to 100,000 keys of tiles that are done
        return max(4, 2 * self._threads)


def _restart_lost(client: Client) -> None:
    """Start again the workers that their nanny has given up, if the cluster is our own.

    A nanny does so where its worker process dies before it has said that it is there.
    """
    cluster = client.cluster
    if isinstance(cluster, SpecCluster) and len(cluster.workers) < len(cluster.worker_spec):
        cluster.scale(len(cluster.worker_spec))


@contextmanager
def local_client(
    workers: int, *, threads: int, gpus: Sequence[str] = (), dashboard: bool = True
) -> Iterator[Client]:
    """Start worker processes on this machine, reachable from it alone, and end them.

    ``threads`` are tiles in flight in each. With ``gpus`` each worker sees one of them only, from
    before torch is imported.
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
        _kept_environment(),
        _main_left_alone(),
        SpecCluster(
            workers=specs,
            scheduler={"cls": Scheduler, "options": scheduler},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Take back what Dask puts into this process's environment for its workers to inherit."""
    names = (*dask.config.get("distributed.nanny.pre-spawn-environ"), "PYTHONHASHSEED")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Keep the program's main module out of the processes that are spawned meanwhile.

    They would import it anew, which for a script without ``if __name__ == "__main__"`` is to run
    it once more. They are told that it is a module of ours that does nothing when imported.
    """
    main = sys.modules["__main__"]
    before, main.__spec__ = main.__spec__, find_spec("tilepipe.errors")
    try:
        yield
    finally:
        main.__spec__ = before


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
    cluster = client.cluster
    if isinstance(cluster, SpecCluster) and not cluster.scheduler_spec["options"].get("dashboard"):
        return None
    services = client.scheduler_info()["services"]
    return str(client.dashboard_link) if "dashboard" in services else None
