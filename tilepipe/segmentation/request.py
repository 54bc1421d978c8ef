"""What is asked of one segmentation, and what may be asked together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.options import ENGINES
from tilepipe.planning.plan import default_target
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.engines.jobs import Jobs
    from tilepipe.options import Options
    from tilepipe.runs.array import ArrayTask


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one segmentation, as `tilepipe.segment` describes it."""

    source: str | Path
    model: str | Path
    output: Output
    options: Options
    engine: str = "auto"
    scheduler: str | None = None
    workers: int | None = None
    task: ArrayTask | None = None
    jobs: Jobs | None = None
    overwrite: bool = False


def find_output(source: str | Path, output: str | Path | None) -> Output:
    """Return the output that was named, or else the one beside the source."""
    if not str(source):
        raise BadRequest("source is empty; name a Zarr, an OME-Zarr or a TIFF")
    return Output.at(default_target(source) if output is None else output)


def check(request: Request) -> None:
    """Raise BadRequest where the parts of a request do not go with one another."""
    choose_workers(request)
    _check_task(request)


def choose_workers(request: Request) -> int:
    """Return how many worker processes share a machine; 0 where this process computes alone.

    Raises BadRequest for an engine that does not go with what else is asked.
    """
    engine, scheduler, workers = request.engine, request.scheduler, request.workers
    if engine not in ENGINES:
        raise BadRequest(f"engine (={engine}) must be one of {', '.join(ENGINES)}")
    if workers is not None and workers <= 0:
        raise BadRequest(f"workers (={workers}) must be positive")
    if engine == "serial" and (scheduler or (workers or 1) > 1):
        raise BadRequest("engine (=serial) has one worker; leave out --workers and --scheduler")
    if (engine == "slurm") != (request.jobs is not None):
        raise BadRequest(
            f"engine (={engine}) must be slurm where jobs are asked for, and only there"
        )
    if engine == "local-cuda":
        return _gpu_workers(request)
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
    return workers or _useful_workers(request.options) or (1 if engine == "dask" else 0)


def _check_task(request: Request) -> None:
    """Raise BadRequest for a task of an array that does not go with what else is asked."""
    task = request.task
    if task is None:
        return
    if request.overwrite:
        raise BadRequest(
            f"task (={task}) must not be with --overwrite, or each task would undo the others'"
            " work; remove the output before the array begins"
        )
    own = ("auto", "serial", "dask", "local-cuda")
    if request.scheduler is not None or request.engine not in own:
        raise BadRequest(
            f"task (={task}) is for arrays of processes without a scheduler; leave out"
            " --task, or --scheduler and --engine"
        )


def _gpu_workers(request: Request) -> int:
    """Return one worker for each GPU of this machine, or as many as were asked for."""
    import torch

    device, workers = request.options.device, request.workers
    if request.scheduler is not None:
        raise BadRequest("engine (=local-cuda) starts its own workers; leave out --scheduler")
    if device not in ("auto", "cuda"):
        raise BadRequest(f"engine (=local-cuda) takes every GPU; leave out --device (={device})")
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
