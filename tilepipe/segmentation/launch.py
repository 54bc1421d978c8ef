"""Which engine runs the tiles, on how many workers."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from tilepipe.engines import TileFailure, TileResult, serial
from tilepipe.errors import BadRequest
from tilepipe.options import ENGINES, Options
from tilepipe.segmentation import slurm as cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from tilepipe.engines.jobs import Jobs
    from tilepipe.segmentation.report import Report
    from tilepipe.segmentation.worker import SegmentJob


def choose_workers(
    engine: str,
    scheduler: str | None,
    workers: int | None,
    options: Options,
    jobs: Jobs | None = None,
) -> int:
    """Return how many worker processes share a machine; 0 for this process alone."""
    if engine not in ENGINES:
        raise BadRequest(f"engine (={engine}) must be one of {', '.join(ENGINES)}")
    if workers is not None and workers <= 0:
        raise BadRequest(f"workers (={workers}) must be positive")
    if engine == "serial" and (scheduler or (workers or 1) > 1):
        raise BadRequest("engine (=serial) has one worker; leave out --workers and --scheduler")
    if (engine == "slurm") != (jobs is not None):
        raise BadRequest(
            f"engine (={engine}) must be slurm where jobs are asked for, and only there"
        )
    if engine == "local-cuda":
        return _gpu_workers(scheduler, workers, options)
    if engine == "slurm":
        if scheduler or workers:
            raise BadRequest(
                "engine (=slurm) starts its own workers, one a job; leave out --workers and"
                " --scheduler, and say how many with --jobs"
            )
        return 1
    if scheduler is not None:
        return workers or 1
    if engine == "serial":
        return 0
    return workers or _useful_workers(options) or (1 if engine == "dask" else 0)


def _gpu_workers(scheduler: str | None, workers: int | None, options: Options) -> int:
    """Return one worker for each GPU of this machine, or as many as were asked for."""
    import torch

    if scheduler is not None:
        raise BadRequest("engine (=local-cuda) starts its own workers; leave out --scheduler")
    if options.device not in ("auto", "cuda"):
        raise BadRequest(
            f"engine (=local-cuda) takes every GPU; leave out --device (={options.device})"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise BadRequest(
            "engine (=local-cuda) needs a CUDA device; torch finds none here: use --engine dask"
        )
    if (workers or 1) > count:
        raise BadRequest(f"workers (={workers}) must be at most one for each of {count} GPUs")
    return workers or count


def _useful_workers(options: Options) -> int:
    """Return the number of worker processes that pays: one for each of several GPUs, else none.

    On a CPU one process takes all cores: it needs less memory than several and starts at once.
    """
    import torch

    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
    return 0


@contextmanager
def connected(scheduler: str | None) -> Iterator[Client | None]:
    """Connect to the scheduler that was asked for, if one was."""
    if scheduler is None:
        yield None
        return
    from tilepipe.engines import dask

    with dask.existing_client(scheduler) as client:
        yield client


def _gpus(count: int) -> list[str]:
    """Return the names of the first GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range(count)]
    if len(names) < count:
        raise BadRequest(f"workers (={count}) must be at most one for each of {len(names)} GPUs")
    return names[:count]


@contextmanager
def outcomes_of(
    job: SegmentJob,
    tiles: Iterator[int],
    report: Report,
    *,
    count: int,
    client: Client | None,
    jobs: Jobs | None,
) -> Iterator[Iterator[TileResult | TileFailure]]:
    """Start the engine and give what becomes of the tiles.

    The engine ends before its client does, also where what is done with an outcome fails.
    """
    if count == 0:
        with closing(serial.run(job, tiles)) as outcomes:
            yield outcomes
    elif jobs is not None:
        from tilepipe.engines import dask, slurm

        left = report.left
        with cluster.started(report.plan.target, jobs, slots=job.slots, left=left) as fleet:
            report.dashboard = dask.dashboard_address(fleet.client)
            with closing(slurm.run(job, tiles, fleet=fleet)) as outcomes:
                yield outcomes
            report.job_seconds = fleet.seconds
    else:
        from tilepipe.engines import dask

        gpus = _gpus(count) if report.plan.sizes.device == "cuda" else []
        local = dask.local_client(count, threads=job.slots, gpus=gpus)
        with nullcontext(client) if client is not None else local as used:
            report.dashboard = dask.dashboard_address(used)
            with closing(dask.run(job, tiles, client=used)) as outcomes:
                yield outcomes
