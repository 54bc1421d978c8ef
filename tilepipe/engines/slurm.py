"""Tiles on SLURM: jobs of one worker each, submitted by dask-jobqueue and kept up by us.

Dask alone does not: `scale` never replaces a job that was cancelled, and `adapt` cancels jobs whose
worker is late. So a thread looks at the queue now and then and submits what is missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, cast

import dask
from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed import Client, SchedulerPlugin
from distributed.core import Status
from distributed.security import Security
from distributed.utils import get_ip_interface

from tilepipe.engines import Lost
from tilepipe.engines import dask as workers
from tilepipe.engines.dask import EXTENSIONS, SETTINGS
from tilepipe.engines.jobworker import address_towards
from tilepipe.engines.squeue import (
    ANSWER,
    cancel_named,
    check_accepted,
    fate,
    in_queue,
    node_addresses,
    words,
)
from tilepipe.errors import BadRequest, TileError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from distributed import Scheduler

    from tilepipe.engines import Job, TileFailure, TileResult
    from tilepipe.engines.jobs import Jobs
    from tilepipe.engines.squeue import Queued

log = logging.getLogger(__name__)

CORES, MEMORY = 4, 8_000_000_000
"""What a job has where nothing is said."""
CREDENTIALS = ".tls-"
"""How the folder of a run's credentials begins; nobody else can look into it."""
BURST = 16
"""Jobs that are submitted at once."""
AGAIN = 60.0
"""Seconds after which a job is submitted again that SLURM refused, others having been accepted."""
FRUITLESS = 3
"""Jobs that may fail before a tile is done; of many jobs at once, twice as many as there are."""
KEPT = {**SETTINGS, "distributed.deploy.lost-worker-timeout": "1000 days"}
"""Dask would cancel a job that it has heard nothing of for a while; we ask SLURM instead."""
BLAMED = {"RUNNING", "SUSPENDED", "FAILED", "UNKNOWN"}
"""States of a job whose worker is gone by a fault of its own; else somebody took the job away."""
FAILED = {"FAILED", "OUT_OF_MEMORY", "BOOT_FAIL"}
"""Ends of a job by a fault of its own; also COMPLETED, if its worker was never heard of."""


class _Submitted(SLURMJob):
    """A job that keeps SLURM's words where it is refused."""

    refused = ""

    async def start(self) -> None:
        """Submit it."""
        try:
            await super().start()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self.refused = words(str(error))

    async def close(self) -> None:
        """Cancel it."""
        await super().close()  # type: ignore[no-untyped-call]
        self.status = Status.closed


class _Heard(SchedulerPlugin):
    """Remembers which workers have ever come."""

    def __init__(self) -> None:
        self.names = set[str]()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Note the name of one that has come."""
        self.names.add(str(scheduler.workers[worker].name))


class Fleet:
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
        self._heard, self._fruitless, self._left_before = _Heard(), 0, left
        self._accepted, self._silent, self._refusal, self._again = False, False, "", 0.0
        self._error: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tilepipe-jobs", daemon=True)
        self._scheduler = cast("Scheduler", cluster.scheduler)
        self._scheduler.add_plugin(self._heard)

    def __enter__(self) -> Fleet:
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
        """Look after them no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raise if it cannot be gone on with."""
        if self._error is not None:
            raise self._error

    def waiting(self) -> str:
        """Return what is waited for where there are no workers."""
        reasons = [job.reason for job in self._queue.values() if job.state == "PENDING"]
        told = [f"{reasons.count(why)} pending: {why}" for why in sorted(set(reasons))]
        begun = len(self._queue) - len(reasons)
        told += [f"{begun} started"] * bool(begun)
        told += [self._refusal] * bool(self._refusal) + ["squeue fails"] * self._silent
        return ", ".join(told) or "jobs are being submitted"

    def lost(self, worker: str) -> Lost | None:
        """Return why a worker is gone; None where its job lives on."""
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
        """Replace the jobs that are gone, submit those that are missing, let the idle ones go."""
        spec = self._cluster.worker_spec  # by name; what is dropped there is on its way out
        known = {name: job for name, job in dict(self._cluster.workers).items() if name in spec}
        self._ids |= {name: job.job_id for name, job in known.items() if job.job_id}
        found = in_queue([job.job_id for job in known.values() if job.job_id])
        self._silent = found is None
        if found is None:
            return
        now = time.monotonic()
        running = sum(job.state == "RUNNING" for job in found.values())
        self.seconds, self._looked = self.seconds + running * (now - self._looked), now
        self._queue = found
        gone = [name for name, job in known.items() if job.job_id and job.job_id not in found]
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
        here = [name for name in spec if name not in {*gone, *refused}]
        useful = min(high, self.left)
        missing = min(BURST, useful - len(here))
        if missing > 0 and time.monotonic() < self._again:
            missing = 0
        elif missing > 0:
            self._refusal = ""
        surplus = len(here) - max(low, useful)
        idle = self._idle(here, known, found)[:surplus] if surplus > 0 else []
        if gone or refused or idle or missing > 0:
            log.info("jobs: %d gone, %d let go, %d new", len(gone), len(idle), max(0, missing))
            self._cluster.sync(self._adjust, gone, [*refused, *idle], max(0, missing))

    def _judge(self, name: str) -> None:
        """Give up where jobs fail again and again and no tile is done meanwhile."""
        state = fate(self._ids[name])
        if self.left != self._left_before:
            self._left_before, self._fruitless = self.left, 0
        failed = state in FAILED or (state == "COMPLETED" and name not in self._heard.names)
        self._fruitless += failed
        if failed and self._fruitless >= max(FRUITLESS, 2 * self._jobs.jobs[1]):
            folder, number = self._folder, self._ids[name]
            path = next(folder.glob(f"*-{number}.out"), None)
            lines = path.read_text(errors="replace").strip().splitlines() if path else []
            told = [line for line in lines if "rror" in line] or lines or ["nothing"]
            self._error = TileError(
                f"jobs end before a tile is done (job {number}: {state}); its log,"
                f" {path or folder}, says: {told[-1].strip()}"
            )

    def _idle(
        self, names: Sequence[str], known: Mapping[str, _Submitted], found: Mapping[str, Queued]
    ) -> list[str]:
        """Return those that wait in the queue, then those whose worker has nothing to do."""
        waiting, nothing_to_do = [], []
        at_work = {str(ws.name): ws for ws in list(self._scheduler.workers.values())}
        for name in names:
            number = str(known[name].job_id) if name in known else ""
            if number in found and found[number].state == "PENDING":
                waiting.append(name)
            elif name in at_work and not (at_work[name].processing or at_work[name].has_what):
                nothing_to_do.append(name)
        return waiting + nothing_to_do

    async def _adjust(self, gone: Sequence[str], drop: Sequence[str], add: int) -> None:
        """Let the jobs that are gone, and others, be no more, and submit new ones.

        The worker of a job that is gone may hang with its node, or never have been told: its tiles
        would wait for it.
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


def run(
    job: Job, tiles: Iterable[int], *, fleet: Fleet
) -> Generator[TileResult | TileFailure, None, None]:
    """Process tiles on the workers of a fleet; see `tilepipe.engines.dask.run`."""
    for outcome in workers.run(job, tiles, client=fleet.client, fleet=fleet):
        fleet.left -= 1
        yield outcome


def job_script(jobs: Jobs, *, name: str, folder: str, slots: int) -> str:
    """Return the script of a job as it is submitted, but for the address of the scheduler."""
    arguments = _arguments(jobs, name=name, folder=".", slots=slots)  # makes no folder
    script = SLURMJob("tcp://SCHEDULER:PORT", name="job-N", **arguments).job_script()
    return str(script).replace("#SBATCH -o ./", f"#SBATCH -o {folder}/")


def check(jobs: Jobs, *, name: str) -> None:
    """Refuse what SLURM would refuse; submits nothing."""
    check_accepted(job_script(jobs, name=name, folder=".", slots=1))
    _address(jobs)


@contextmanager
def fleet(jobs: Jobs, *, name: str, folder: Path, slots: int, left: int) -> Iterator[Fleet]:
    """Start a scheduler here and submit jobs whose workers join it; end them all at the end.

    ``name`` is that of the jobs, and of no others of this user: those that an earlier driver left
    are cancelled. ``folder``, on a file system that all nodes share, gets their logs. Raises
    `BadRequest` where SLURM refuses them.
    """
    if left_over := cancel_named(name):
        log.warning("jobs that an earlier run has left are cancelled: %s", ", ".join(left_over))
    for stale in folder.glob(f"{CREDENTIALS}*"):  # of a driver that was killed
        shutil.rmtree(stale)
    address = _address(jobs)
    options = {
        "host": address,
        "port": 0,
        "dashboard": find_spec("bokeh") is not None,
        "dashboard_address": f"{address}:0",
        "extensions": EXTENSIONS,
        **dask.config.get("jobqueue.slurm.scheduler-options", {}),
    }
    with (
        dask.config.set(KEPT),
        _terminable(),
        _security(folder) if jobs.tls else nullcontext() as security,
        SLURMCluster(
            job_cls=_Submitted,  # type: ignore[arg-type]  # the class itself is meant
            security=security,
            scheduler_options=options,
            silence_logs=logging.CRITICAL,
            **_arguments(jobs, name=name, folder=str(folder), slots=slots),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        Fleet(cluster, client, jobs, folder=folder, left=left) as found,
    ):
        yield found


@contextmanager
def _security(folder: Path) -> Iterator[Security]:
    """Make credentials for this run, in files that jobs of the same user can read, and no other."""
    try:
        made = Security.temporary()
    except ImportError as error:
        raise BadRequest("tls needs cryptography: pip install 'tilepipe[slurm]'") from error
    with tempfile.TemporaryDirectory(prefix=CREDENTIALS, dir=folder) as place:  # of mode 0700
        paths = {}
        for kind, text in made.get_tls_config_for_role("worker").items():
            if text is not None and "-----BEGIN" in str(text):
                paths[kind] = os.path.join(place, kind)
                Path(paths[kind]).write_text(str(text))
        roles = ("client", "scheduler", "worker")
        yield Security(
            require_encryption=True,
            tls_ca_file=paths["ca_file"],
            **{f"tls_{role}_{kind}": paths[kind] for role in roles for kind in ("cert", "key")},
        )


def _arguments(jobs: Jobs, *, name: str, folder: str, slots: int) -> dict[str, object]:
    """Return what dask-jobqueue is told; None leaves it to ``jobqueue.yaml``.

    Dask's cores are the worker's threads: tiles in flight, which mostly wait for one another.
    """

    def said(key: str) -> object:
        return dask.config.get(f"jobqueue.slurm.{key}")

    def lines(key: str) -> list[str]:
        found = said(key)
        return list(found) if isinstance(found, list | tuple) else []

    directives = [*lines("job-extra-directives"), *jobs.directives]
    if jobs.gpus and not any("--gpu" in line or "--gres" in line for line in directives):
        directives.append(f"--gres=gpu:{jobs.gpus}")
    if not any("requeue" in line for line in directives):  # we replace them, and at once
        directives.append("--no-requeue")
    return {
        "queue": jobs.partition,
        "account": jobs.account,
        "walltime": jobs.walltime,
        "cores": slots,
        "processes": 1,
        "job_cpu": cores(jobs),
        "memory": str(memory(jobs)),
        "job_mem": None if jobs.memory is None and said("job-mem") else mebibytes(memory(jobs)),
        "interface": jobs.interface,
        "python": jobs.python,
        "job_name": name,
        "log_directory": folder,
        "job_extra_directives": directives,
        "job_directives_skip": [*lines("job-directives-skip"), "#SBATCH -e"],  # into the same log
        "job_script_prologue": [*lines("job-script-prologue"), *jobs.prologue],
        "worker_command": "tilepipe.engines.jobworker",
        "worker_extra_args": [*lines("worker-extra-args"), "--memory-limit", "0"],
    }


def cores(jobs: Jobs) -> int:
    """Return the cores of a job."""
    said = dask.config.get("jobqueue.slurm.job-cpu") or dask.config.get("jobqueue.slurm.cores")
    return int(jobs.cores or said or CORES)


def memory(jobs: Jobs) -> int:
    """Return the bytes of a job."""
    said = dask.config.get("jobqueue.slurm.memory")
    return jobs.memory or (dask.utils.parse_bytes(said) if said else MEMORY)


def mebibytes(memory: int) -> str:
    """Return an amount of memory as SLURM is told it; Dask would ask for whole gibibytes.

    >>> mebibytes(8_000_000_000)
    '7630M'
    """
    return f"{-(-memory // 2**20)}M"


def _address(jobs: Jobs) -> str:
    """Return the address on which scheduler and dashboard listen.

    That of the interface that was asked for, else the one on the way to the nodes.
    """
    name = jobs.interface or dask.config.get("jobqueue.slurm.interface")
    if name is not None:
        try:
            return str(get_ip_interface(name))
        except ValueError as error:
            raise BadRequest(f"interface (={name}) must be one of this machine: {error}") from error
    for node in node_addresses(jobs.partition):
        try:
            return address_towards(f"tcp://{node}:0")
        except OSError:
            continue
    raise BadRequest(
        "interface (=None) must be named, since SLURM tells no address of a node: give --interface"
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM, with which SLURM ends a driver that is a job, as an interrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
