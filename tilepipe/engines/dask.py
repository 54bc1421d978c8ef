"""Tiles on a Dask cluster: coordinates travel, arrays and models do not."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import count
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
    as_completed,
)
from distributed.comm.core import connect
from distributed.scheduler import DEFAULT_EXTENSIONS
from distributed.security import Security
from distributed.spans import SpansSchedulerExtension
from distributed.utils import silence_logging_cmgr

from tilepipe.engines import RETRIES, Fleet, Job, Lost, TileFailure, TileResult, one_line
from tilepipe.engines.attempts import Back, Failed, Tiles
from tilepipe.engines.batches import Batch, Ended, Pace, of_each
from tilepipe.engines.plugin import JobPlugin, process_batch
from tilepipe.errors import BadRequest, TileError

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence

    from dask.typing import Key
    from distributed import Future, Worker
    from distributed.scheduler import TaskState, WorkerState
    from distributed.spans import SpanMetadata

log = logging.getLogger(__name__)

TIMEOUT = 10
"""Seconds in which a scheduler must answer, and after which missing workers are spoken of."""
POLL = 0.0005, 0.05
"""Seconds between two looks at what has ended: just after a tile did, and at most."""
LET_GO = 70.0
"""Seconds in which workers must let a job go; one that hangs would be waited for for ever.

It is more than a worker waits for the writes that it has begun.
"""
GONE = "the scheduler is gone; start one and run again to go on"
SETTINGS = {
    # Long calls into the network may hold the interpreter: a silent worker is not a dead one.
    "distributed.scheduler.worker-ttl": None,
    # Tiles are tried again by us: a bad one would kill this many workers more at each attempt.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.admin.tick.limit": "1h",
    # Every process looked fifty times a second whether its loop is late: four fifths of its CPU.
    "distributed.admin.tick.interval": "1s",
    # Of messages, of which each stream to a worker keeps so many: memory is flat sooner.
    "distributed.admin.low-level-log-length": 100,
    # Of Python's stack, a hundred times a second in each process: a twentieth of quick tiles' time.
    "distributed.worker.profile.enabled": False,
    "distributed.worker.multiprocessing-method": "spawn",  # never fork after Zarr was used
}


class _NoSpans(SpansSchedulerExtension):
    """The scheduler's account of what was submitted, which grows with every message, kept empty.

    It cannot be left out, since workers report to it.
    """

    def observe_tasks(
        self, tss: Iterable[TaskState], code: object, span_metadata: SpanMetadata
    ) -> dict[Key, dict[str, object]]:
        """Note no new tasks, and annotate none."""
        return {}

    def heartbeat(self, ws: WorkerState, data: dict[tuple[Hashable, ...], float]) -> None:
        """Note nothing of what a worker did."""


EXTENSIONS = {**DEFAULT_EXTENSIONS, "spans": _NoSpans}
"""Of a scheduler of our own: its memory does not grow with the tiles that are done."""


def run(
    job: Job,
    tiles: Iterable[int],
    *,
    client: Client,
    retries: int = RETRIES,
    fleet: Fleet | None = None,
) -> Generator[TileResult | TileFailure, None, None]:
    """Process tiles on the workers of a cluster, as they come and go.

    The scheduler never holds more than two batches for each thread of its workers; tiles that take
    long are batches of one. A tile that was lost with its worker, alone in its batch, counts as one
    attempt, unless the fleet knows better. Raises `BadRequest` where workers cannot take the job,
    `TileError` where they cannot open it or the scheduler goes.
    """
    plugin, name, number = JobPlugin(job), f"tilepipe-{uuid4().hex[:8]}", count()
    todo, window, pace = Tiles(tiles, retries), _Window(client, fleet), Pace(job.slots)
    batches: dict[Future[Ended], Batch] = {}
    finished, pause = as_completed(loop=client.loop), POLL[0]
    try:
        _send(client, plugin)
        while True:
            room, taken = window.size() - len(batches), list[Batch]()
            span, most = pace.span(window.threads), pace.most(window.threads)
            while len(taken) < room and (batch := todo.take(window.workers, most)):
                taken.append(Batch(batch, span, pace.expected))
            if taken:  # in one message: each costs the scheduler as much as a task
                keys = [(name, next(number)) for _ in taken]
                process = partial(process_batch, job.key)
                futures = client.map(process, taken, key=keys, pure=False)
                batches.update(zip(futures, taken, strict=True))
                finished.update(futures)
            if not batches:
                return
            if not finished.has_ready():
                time.sleep(pause)
                pause = min(1.5 * pause, POLL[1])
                continue
            pause = POLL[0]
            for future, ended in _outcomes(client, finished.next_batch(block=False), fleet):
                batch = batches.pop(future).tiles
                future.release()
                if isinstance(ended, Failed) and client.status != "running":
                    raise TileError(GONE)
                if isinstance(ended, Ended):
                    pace.note(ended)
                for index, outcome in of_each(batch, ended):
                    if isinstance(outcome, Failed) and outcome.opening:
                        raise TileError(f"a worker cannot begin: {outcome.cause}")
                    if (settled := todo.end(index, outcome)) is not None:
                        yield settled
    finally:
        _stop(client, list(batches), plugin.name)


def _send(client: Client, plugin: JobPlugin) -> None:
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
    client: Client, ended: list[Future[Ended]], fleet: Fleet | None
) -> list[tuple[Future[Ended], Ended | Failed | Back]]:
    """Return what became of batches; results are fetched together, which saves most of the time."""
    finished = [future for future in ended if future.status == "finished"]
    fetched: dict[Future[Ended], Ended] = {}
    try:
        fetched = dict(zip(finished, client.gather(finished), strict=True))
    except Exception:  # of one of them; each is asked
        log.info("results cannot be fetched together", exc_info=True)
    return [
        (future, fetched[future] if future in fetched else _outcome(future, fleet))
        for future in ended
    ]


def _outcome(future: Future[Ended], fleet: Fleet | None) -> Ended | Failed | Back:
    """Return what became of a batch, be it that its worker died."""
    try:
        return future.result()
    except KilledWorker as error:
        cause = "each worker process that took it died, perhaps for want of memory"
        lost = Lost(f"{cause}: give less with --memory", blame=True)
        if fleet is not None:
            lost = fleet.lost(str(error.last_worker.name)) or lost
        log.info("tiles are lost with their worker: %s", lost.cause)
        return Failed(lost.cause, opening=False, lost=True) if lost.blame else Back()
    except Exception as error:  # CancelledError, what cannot be unpickled
        return Failed(one_line(error), opening=False)


def _stop(client: Client, futures: list[Future[Ended]], plugin: str) -> None:
    """Take back what has not begun and let the workers forget the job."""
    if client.status != "running":
        return

    async def forget() -> None:
        async with asyncio.timeout(LET_GO):
            await client.unregister_worker_plugin(plugin)

    try:
        client.cancel(futures, force=True)
        client.sync(forget)
    except Exception:  # of a worker that goes at this moment, with the job, or hangs
        log.info("not every worker has let the job go", exc_info=True)


class _Window:
    """How many batches the scheduler may hold; counted anew every second."""

    def __init__(self, client: Client, fleet: Fleet | None) -> None:
        self._client, self._fleet = client, fleet
        self.workers, self.threads = 0, 0
        self._looked, self._seen, self._announced = -1.0, time.monotonic(), ""

    def size(self) -> int:
        """Return two batches for each thread of the workers there are, four at least.

        Says so where there have been no workers for a while; tiles wait for them.
        """
        now = time.monotonic()
        if now - self._looked > 1:
            try:
                threads = self._client.nthreads()
            except OSError as error:
                raise TileError(GONE) from error
            self.workers, self.threads = len(threads), sum(threads.values())
            self._looked = now
            if self._fleet is not None:
                self._fleet.check()
            if threads:
                self._seen, self._announced = now, ""
            elif self._fleet is not None:
                self._announce(self._fleet.waiting())
            elif now - self._seen > TIMEOUT:
                self._announce("the scheduler has none")
            if self._fleet is None:
                _restart_lost(self._client)
            key_split.cache_clear()  # Dask's, of up to 100,000 keys of tiles that are done
        return max(4, 2 * self.threads)

    def _announce(self, why: str) -> None:
        """Log what the run waits for, whenever that changes."""
        if why != self._announced:
            log.warning("waiting for workers (%s)", why)
            self._announced = why


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
    scheduler = {
        "host": "127.0.0.1",
        "port": 0,
        "dashboard": shown,
        "dashboard_address": local,
        "extensions": EXTENSIONS,
    }
    specs = {}
    for place in range(len(gpus) or workers):
        env = {"CUDA_VISIBLE_DEVICES": gpus[place]} if gpus else {}
        options = {
            "nthreads": threads,
            "memory_limit": 0,
            "host": "127.0.0.1",
            "dashboard_address": local,
            "preload": [__name__, *["tilepipe.host.allocator"] * (not gpus)],  # calls dask_setup
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
    """Take back what Dask puts into this process's environment for its workers to inherit.

    And the way of starting processes: Dask asks for it, which decides it for good.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    names = (*dask.config.get("distributed.nanny.pre-spawn-environ"), "PYTHONHASHSEED")
    names += ("__DASK_PARENT_PID",)
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if method is None:
            multiprocessing.set_start_method(None, force=True)


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
