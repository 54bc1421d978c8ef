"""Starting the engine that runs the tiles, or joining one that runs already."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from tilepipe.engines import TileFailure, TileResult, serial
from tilepipe.errors import BadRequest
from tilepipe.segmentation import slurm as cluster
from tilepipe.segmentation.request import choose_workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from tilepipe.segmentation.report import Report
    from tilepipe.segmentation.request import Request
    from tilepipe.segmentation.worker import SegmentJob


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
    request: Request,
    *,
    client: Client | None,
) -> Iterator[Iterator[TileResult | TileFailure]]:
    """Start the engine, and give the outcome of each tile as it ends.

    The engine ends before its client does, also where what is done with an outcome fails.
    """
    count, jobs = choose_workers(request), request.jobs
    if count == 0:
        with closing(serial.run(job, tiles)) as outcomes:
            yield outcomes
    elif jobs is not None:
        from tilepipe.engines import dask, slurm

        left = report.left
        with cluster.started(request.output, jobs, slots=job.slots, left=left) as fleet:
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
