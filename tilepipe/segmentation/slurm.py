"""What SLURM adds to a segmentation: options that its jobs decide, their script, what they cost."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilepipe.engines.jobs import Jobs, seconds
from tilepipe.errors import BadRequest
from tilepipe.planning.costs import SLOTS
from tilepipe.text import counted
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

    from tilepipe.engines.fleet import JobFleet
    from tilepipe.options import Options
    from tilepipe.planning.plan import Plan

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MEMORY = 0.9
"""Share of a job's memory that the worker may use; the rest is for the process that watches it."""


def engine() -> ModuleType:
    """Return the engine; raises `BadRequest` where it is not installed."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        from tilepipe.engines import slurm
    except ImportError as error:
        raise BadRequest(
            f"engine (=slurm) needs dask-jobqueue ({error}): pip install 'tilepipe[slurm]'"
        ) from error
    finally:  # importing dask-jobqueue makes Ctrl-C a silent success
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
    return slurm


def job_name(output: Output) -> str:
    """Return the name of the jobs of an output, the same for each run of it.

    >>> job_name(Output.at("/data/volume-segmented.zarr"))
    'tilepipe-9900584b'
    """
    path = output.name if "://" in output.name else os.path.abspath(output.name)
    return "tilepipe-" + hashlib.sha256(path.encode()).hexdigest()[:8]


def log_folder(output: Output) -> Path:
    """Return where the jobs of an output write their logs: in its ledger, if that is a folder.

    Those of an output in an object store are written in the folder where the run was begun.
    """
    jobs = output.ledger.jobs
    return jobs if isinstance(jobs, Path) else Path.cwd() / f"{job_name(output)}-{jobs.name}"


def fitted(options: Options, jobs: Jobs, sizes: Mapping[str, object]) -> Options:
    """Return the options with what the jobs decide, where neither the user nor an earlier run has.

    A worker computes on its job's GPU, or with as many threads as its job has cores, and on a CPU
    uses most of the job's memory. ``sizes`` are the `Sizes` of an earlier run's plan.
    """
    slurm = engine()
    device, threads, memory = options.device, options.threads, options.memory
    if device == "auto" and "device" not in sizes:
        device = "cuda" if jobs.gpus else "cpu"
    if threads is None and "threads" not in sizes:
        threads = slurm.cores(jobs)
    if memory is None and not jobs.gpus:
        memory = int(MEMORY * slurm.memory(jobs))
    return replace(options, device=device, threads=threads, memory=memory)


def check(output: Output, jobs: Jobs) -> None:
    """Refuse jobs that SLURM would refuse; nothing is written or submitted."""
    engine().check(jobs, name=job_name(output))


@contextmanager
def started(output: Output, jobs: Jobs, *, slots: int, left: int) -> Iterator[JobFleet]:
    """Submit the jobs of an output that has a ledger, and end them at the end."""
    folder = log_folder(output)
    folder.mkdir(exist_ok=True)
    with engine().fleet(
        jobs, name=job_name(output), folder=folder, slots=slots, left=left
    ) as fleet:
        yield fleet


def describe(plan: Plan, jobs: Jobs) -> dict[str, object]:
    """Return the script of the jobs and what all of them will take, as plain values."""
    output = Output.at(plan.target)
    folder = str(log_folder(output))
    slots = SLOTS if plan.sizes.sweep is None else 2
    script = engine().job_script(jobs, name=job_name(output), folder=folder, slots=slots)
    return {
        "jobs": list(jobs.jobs),
        "script": script,
        "worker_hours": worker_hours(plan.costs.multiply_adds, jobs),
    }


def describe_jobs(plan: Plan, jobs: Jobs) -> str:
    """Return the same for people."""
    facts = describe(plan, jobs)
    low, high = jobs.jobs
    number = f"{low} to {high}" if low != high else f"{high}"
    script = "\n".join(f"  {line}".rstrip() for line in str(facts["script"]).splitlines())
    tiles = plan.costs.tiles
    few = f"; only {tiles} have a tile to work on: give a smaller --tile" * (tiles < high)
    return (
        f"jobs          {number}, kept up while there are tiles{few}\n"
        f"expected      {expected(plan.costs.multiply_adds, jobs)}\n"
        f"job script\n{script}"
    )


def worker_hours(multiply_adds: int, jobs: Jobs) -> float | None:
    """Return how long one worker would compute; None where its rate is not known."""
    return None if jobs.rate is None else multiply_adds / jobs.rate / 3600


def expected(multiply_adds: int, jobs: Jobs) -> str:
    """Return what the work takes, in words.

    >>> expected(36 * 10**14, Jobs(jobs=(4, 4), gpus=1, rate=1e12, walltime="00:30:00"))
    '1 GPU hours at 1e+12 multiply-adds/s: 0.25 hours with 4 jobs, 2 walltimes in all'
    """
    hours = worker_hours(multiply_adds, jobs)
    unit = "GPU hours" if jobs.gpus else "worker hours"
    if hours is None:
        return (
            f"{unit} are not known: give rate, multiply-adds a second of one worker, in the"
            " --cluster file; the report of a run tells it"
        )
    most = jobs.jobs[1]
    text = f"{hours:.3g} {unit} at {jobs.rate:.3g} multiply-adds/s: {hours / most:.3g} hours with"
    text += f" {counted(most, 'job')}"
    if jobs.walltime is not None:
        times = -(-hours * 3600 // seconds(jobs.walltime))
        text += f", {counted(int(times), 'walltime')} in all"
    return text
