"""The jobs of a run on SLURM: submitted, looked after, replaced when they are gone.

Dask alone does not do this: `scale` never replaces a job that was cancelled, and `adapt` cancels
jobs whose worker is late. So a thread looks at the queue now and then and submits what is missing.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import count
from typing import TYPE_CHECKING, cast

from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed import Client, SchedulerPlugin
from distributed.core import Status

from tilepipe.engines import Lost
from tilepipe.engines.squeue import ANSWER, fate, in_queue, words
from tilepipe.errors import BadRequest, TileError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from distributed import Scheduler

    from tilepipe.engines.jobs import Jobs
    from tilepipe.engines.squeue import Queued

log = logging.getLogger(__name__)

BURST = 16
"""Jobs that are submitted at once."""
AGAIN = 60.0
"""Seconds after which a job is submitted again that SLURM refused, others having been accepted."""
FRUITLESS = 3
"""Jobs that may fail before a tile is done; of many jobs at once, twice as many as there are."""
BLAMED = {"RUNNING", "SUSPENDED", "FAILED", "UNKNOWN"}
"""States of a job whose worker is gone by a fault of its own; else somebody took the job away."""
FAILED = {"FAILED", "OUT_OF_MEMORY", "BOOT_FAIL"}
"""Ends of a job by a fault of its own; also COMPLETED, if its worker was never heard of."""


class SubmittedJob(SLURMJob):
    """A job that keeps SLURM's words where SLURM refuses it."""

    refused = ""
    """What SLURM said; empty where the job was not refused."""

    async def start(self) -> None:
        """Submit the job."""
        try:
            await super().start()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self.refused = words(str(error))

    async def close(self) -> None:
        """Cancel the job."""
        await super().close()  # type: ignore[no-untyped-call]
        self.status = Status.closed


class _Joined(SchedulerPlugin):
    """Remembers which workers have ever joined the scheduler."""

    def __init__(self) -> None:
        self.names = set[str]()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Note the name of a worker that joins."""
        self.names.add(str(scheduler.workers[worker].name))


class JobFleet:
    """The jobs of a run, and the Dask cluster that their workers join."""

    def __init__(
        self, cluster: SLURMCluster, client: Client, jobs: Jobs, *, folder: Path, left: int
    ) -> None:
        self.client, self.left = client, left
        self.seconds = 0.0
        """For how long jobs have run, all together; as seen, so within a look at each end."""
        self._looked = time.monotonic()
        self._cluster, self._jobs, self._folder = cluster, jobs, folder
        self._numbers, self._ids = count(1), dict[str, str]()
        self._queue: Mapping[str, Queued] = {}
        self._joined, self._fruitless, self._left_before = _Joined(), 0, left
        self._accepted, self._silent, self._refusal, self._again = False, False, "", 0.0
        self._error: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tilepipe-jobs", daemon=True)
        self._scheduler = cast("Scheduler", cluster.scheduler)
        self._scheduler.add_plugin(self._joined)

    def __enter__(self) -> JobFleet:
        """Submit the first jobs; raises `BadRequest` where SLURM refuses them."""
        self._look()
        until = time.monotonic() + ANSWER
        while len(self._cluster.workers) < len(self._cluster.worker_spec):
            if time.monotonic() > until:
                raise TileError(f"SLURM has not taken the jobs in {ANSWER} s; run again")
            time.sleep(0.05)
        self._look()
        if self._error is not None:
            raise self._error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking after the jobs."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raise the error for which the run must end, if there is one."""
        if self._error is not None:
            raise self._error

    def waiting(self) -> str:
        """Return what the run waits for while it has no workers."""
        reasons = [job.reason for job in self._queue.values() if job.state == "PENDING"]
        states = [f"{reasons.count(why)} pending: {why}" for why in sorted(set(reasons))]
        begun = len(self._queue) - len(reasons)
        states += [f"{begun} started"] * bool(begun)
        states += [self._refusal] * bool(self._refusal) + ["squeue fails"] * self._silent
        return ", ".join(states) or "jobs are being submitted"

    def lost(self, worker: str) -> Lost | None:
        """Return why a worker is gone, or None while its job goes on."""
        job = self._cluster.workers.get(worker)
        number = job.job_id if job is not None else self._ids.get(worker)
        state = fate(number) if number else "GONE"
        if state == "TIMEOUT":
            remedy = "give more with --walltime, or smaller tiles with --tile"
            return Lost(f"each job that took it reached its walltime: {remedy}", blame=True)
        if state == "OUT_OF_MEMORY":
            remedy = "give more with --job-memory, or less with --memory"
            return Lost(f"each job that took it ran out of memory: {remedy}", blame=True)
        return None if state in BLAMED else Lost(f"job {number} is {state}", blame=False)

    def _keep(self) -> None:
        while not self._end.wait(self._jobs.poll) and self._error is None:
            try:
                self._look()
            except Exception as error:  # the driver raises it
                log.info("the jobs cannot be looked after", exc_info=True)
                self._error = error

    def _look(self) -> None:
        """Replace the jobs that are gone, submit those that are missing, and let idle ones go."""
        spec = self._cluster.worker_spec  # by name; names that are not there are on their way out
        known = {name: job for name, job in dict(self._cluster.workers).items() if name in spec}
        self._ids |= {name: job.job_id for name, job in known.items() if job.job_id}
        queue = in_queue([job.job_id for job in known.values() if job.job_id])
        self._silent = queue is None
        if queue is None:
            return
        now = time.monotonic()
        running = sum(job.state == "RUNNING" for job in queue.values())
        self.seconds, self._looked = self.seconds + running * (now - self._looked), now
        self._queue = queue
        gone = [name for name, job in known.items() if job.job_id and job.job_id not in queue]
        refused = [name for name, job in known.items() if job.refused]
        self._accepted |= any(job.job_id for job in known.values())
        for name in gone:
            self._judge(name)
        if refused:
            self._refusal = known[refused[0]].refused
            self._again = time.monotonic() + AGAIN
            if not self._accepted:
                self._error = BadRequest(f"SLURM refuses the job: {self._refusal}")
                return
            log.warning("%d jobs are refused for now: %s", len(refused), self._refusal)
        low, high = self._jobs.jobs
        living = [name for name in spec if name not in {*gone, *refused}]
        useful = min(high, self.left)
        missing = min(BURST, useful - len(living))
        if missing > 0 and time.monotonic() < self._again:
            missing = 0
        elif missing > 0:
            self._refusal = ""
        surplus = len(living) - max(low, useful)
        idle = self._idle(living, known, queue)[:surplus] if surplus > 0 else []
        if gone or refused or idle or missing > 0:
            log.info("jobs: %d gone, %d let go, %d new", len(gone), len(idle), max(0, missing))
            self._cluster.sync(self._adjust, gone, [*refused, *idle], max(0, missing))

    def _judge(self, name: str) -> None:
        """Give up when jobs fail again and again and no tile is finished meanwhile."""
        state = fate(self._ids[name])
        if self.left != self._left_before:
            self._left_before, self._fruitless = self.left, 0
        failed = state in FAILED or (state == "COMPLETED" and name not in self._joined.names)
        self._fruitless += failed
        if failed and self._fruitless >= max(FRUITLESS, 2 * self._jobs.jobs[1]):
            folder, number = self._folder, self._ids[name]
            path = next(folder.glob(f"*-{number}.out"), None)
            lines = path.read_text(errors="replace").strip().splitlines() if path else []
            errors = [line for line in lines if "rror" in line] or lines or ["nothing"]
            self._error = TileError(
                f"jobs end before a tile is done (job {number}: {state}); its log,"
                f" {path or folder}, says: {errors[-1].strip()}"
            )

    def _idle(
        self, names: Sequence[str], known: Mapping[str, SubmittedJob], queue: Mapping[str, Queued]
    ) -> list[str]:
        """Return the jobs that wait in the queue, then those whose worker has nothing to do."""
        waiting, nothing_to_do = [], []
        at_work = {str(ws.name): ws for ws in list(self._scheduler.workers.values())}
        for name in names:
            number = str(known[name].job_id) if name in known else ""
            if number in queue and queue[number].state == "PENDING":
                waiting.append(name)
            elif name in at_work and not (at_work[name].processing or at_work[name].has_what):
                nothing_to_do.append(name)
        return waiting + nothing_to_do

    async def _adjust(self, gone: Sequence[str], drop: Sequence[str], add: int) -> None:
        """Remove the jobs that are gone and those to be dropped, and submit new ones.

        The worker of a job that is gone may hang with its node, or may not know of its end, and its
        tiles would wait for it.
        """
        spec = self._cluster.worker_spec
        for name in (*gone, *drop):
            spec.pop(name, None)
        for address, state in list(self._scheduler.workers.items()):
            if str(state.name) in gone:
                await self._scheduler.remove_worker(address, stimulus_id="tilepipe-job-gone")
        for _ in range(add):
            spec[f"job-{next(self._numbers)}"] = self._cluster.new_spec
        self._cluster.scale(jobs=len(spec))
