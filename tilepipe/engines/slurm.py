"""Tiles on SLURM: a scheduler here, and jobs of one worker each that dask-jobqueue submits.

`tilepipe.engines.fleet` looks after the jobs.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import dask
from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed import Client
from distributed.security import Security
from distributed.utils import get_ip_interface

from tilepipe.engines import dask as workers
from tilepipe.engines.dask import EXTENSIONS, SETTINGS
from tilepipe.engines.fleet import JobFleet, SubmittedJob
from tilepipe.engines.jobworker import address_towards
from tilepipe.engines.squeue import (
    cancel_named,
    check_accepted,
    node_addresses,
)
from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from types import FrameType

    from tilepipe.engines import Job, TileFailure, TileResult
    from tilepipe.engines.jobs import Jobs

log = logging.getLogger(__name__)

CORES, MEMORY = 4, 8_000_000_000
"""Cores and bytes of a job where neither the user nor ``jobqueue.yaml`` says them."""
CREDENTIALS = ".tls-"
"""How the folder of a run's credentials begins; nobody else can look into it."""
KEPT = {**SETTINGS, "distributed.deploy.lost-worker-timeout": "1000 days"}
"""Dask would cancel a job that it has heard nothing of for a while; we ask SLURM instead."""


def run(
    job: Job, tiles: Iterable[int], *, fleet: JobFleet
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
def fleet(jobs: Jobs, *, name: str, folder: Path, slots: int, left: int) -> Iterator[JobFleet]:
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
            job_cls=SubmittedJob,  # type: ignore[arg-type]  # the class itself is meant
            security=security,
            scheduler_options=options,
            silence_logs=logging.CRITICAL,
            **_arguments(jobs, name=name, folder=str(folder), slots=slots),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        JobFleet(cluster, client, jobs, folder=folder, left=left) as fleet,
    ):
        yield fleet


@contextmanager
def _security(folder: Path) -> Iterator[Security]:
    """Make credentials for this run, in files that jobs of the same user can read, and no other."""
    try:
        credentials = Security.temporary()
    except ImportError as error:
        raise BadRequest("tls needs cryptography: pip install 'tilepipe[slurm]'") from error
    with tempfile.TemporaryDirectory(prefix=CREDENTIALS, dir=folder) as place:  # of mode 0700
        paths = {}
        for kind, text in credentials.get_tls_config_for_role("worker").items():
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
    """Return the arguments of dask-jobqueue; None leaves one to ``jobqueue.yaml``.

    Dask's cores are the worker's threads: tiles in flight, which mostly wait for one another.
    """

    def configured(key: str) -> object:
        return dask.config.get(f"jobqueue.slurm.{key}")

    def lines(key: str) -> list[str]:
        value = configured(key)
        return list(value) if isinstance(value, list | tuple) else []

    is_default = jobs.memory is None and configured("job-mem")
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
        "job_mem": None if is_default else mebibytes(memory(jobs)),
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
    configured = dask.config.get("jobqueue.slurm.job-cpu")
    configured = configured or dask.config.get("jobqueue.slurm.cores")
    return int(jobs.cores or configured or CORES)


def memory(jobs: Jobs) -> int:
    """Return the bytes of a job."""
    configured = dask.config.get("jobqueue.slurm.memory")
    return jobs.memory or (dask.utils.parse_bytes(configured) if configured else MEMORY)


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
