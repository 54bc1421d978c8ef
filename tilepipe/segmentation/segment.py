"""The story of ``tilepipe segment``: plan, create the output, run the tiles, keep the ledger."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from tilepipe.engines import TileFailure, TileResult, serial
from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed
from tilepipe.options import ENGINES, Options, Shard
from tilepipe.planning.identity import check_same
from tilepipe.planning.plan import Plan, default_target, plan
from tilepipe.runs.log import Share
from tilepipe.segmentation import slurm as cluster
from tilepipe.segmentation.resume import (
    agree,
    check_intact,
    find_earlier,
    normalized,
    open_ledger,
)
from tilepipe.segmentation.worker import SegmentJob
from tilepipe.volumes.output import check_free, check_target, update_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from distributed import Client

    from tilepipe.engines.jobs import Jobs
    from tilepipe.runs.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Report:
    """How a segmentation goes, and went."""

    plan: Plan
    tiles: int
    """Tiles that were asked for: of the whole volume, or of a shard's share."""
    before: int
    """Tiles that an earlier run had finished."""
    done: int = 0
    """Tiles finished by this run."""
    voxels: int = 0
    """Voxels of those."""
    nonfinite: int = 0
    """Values that were NaN or infinite in the source, and taken as 0 after normalization."""
    seconds: float = 0.0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    narrowed: int = 0
    """Tiles that were computed in smaller parts than planned, since memory was short."""
    starved_seconds: float = 0.0
    """How long devices waited for data."""
    retries: int = 0
    """Attempts after the first, of the tiles that came to an end."""
    workers: dict[str, Share] = field(default_factory=dict)
    """What each worker has done."""
    shard: Shard | None = None
    adopted: list[int] = field(default_factory=list)
    """Numbers of the array's tasks that died, whose tiles were done here."""
    unfinished: int = 0
    """Tiles of the whole volume that nobody had finished at the end."""
    failures: list[TileFailure] = field(default_factory=list)
    job_seconds: float = 0.0
    """For how long jobs of SLURM have run, all together."""
    dashboard: str | None = None
    """Address of the Dask dashboard, where there is one."""

    @property
    def left(self) -> int:
        """Tiles neither finished nor set aside."""
        return self.tiles - self.before - self.done - len(self.failures)

    @property
    def device_seconds(self) -> float:
        """For how long devices were held: of each worker, from its first tile to its last."""
        return sum(share.seconds for share in self.workers.values())


@borrowed()
def segment(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    engine: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    shard: Shard | None = None,
    jobs: Jobs | None = None,
    overwrite: bool = False,
    planned: Callable[[Plan], None] | None = None,
    scanned: Callable[[int, int], None] | None = None,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Segment a volume into an OME-Zarr: the answer of one pass over the whole mirrored image.

    Runs again where an earlier run of the same plan was stopped. ``planned`` is told the plan
    before anything is written, ``scanned`` the blocks read and their number where the whole volume
    is read once for its normalization, ``progress`` the report after every tile. Tiles that fail
    are retried, then set aside in ``Report.failures`` while the rest goes on. With ``shard`` just
    that share of the tiles is done, at the same time as others by other processes, and what those
    that died have left; who does the last tile ends the whole. ``jobs`` are those of engine
    ``slurm``.

    Raises `BadRequest`, before anything is written, for what cannot work.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    _check_shard(shard, engine, scheduler, overwrite=overwrite)
    made, earlier = (
        _plan(source, model, output, options, count, overwrite=overwrite, jobs=jobs)
        if shard is None
        else (_agreed(source, model, output, options, count, shard, scanned), None)
    )
    if shard is None and (short := made.short_of_disk()):
        raise BadRequest(short)
    if jobs is not None:
        cluster.check(made.target, jobs)
    with _connected(scheduler) as client:  # before anything is written
        if planned is not None:
            planned(made)
        if shard is None:
            made = normalized(made, earlier, scanned)
        with open_ledger(made, earlier, shard=shard, overwrite=overwrite) as ledger:
            tiles = range(ledger.tiles) if shard is None else shard.share(ledger.tiles)
            report = Report(made, len(tiles), ledger.finished(tiles), shard=shard)
            _run(report, ledger, tiles, count=count, client=client, jobs=jobs, progress=progress)
            if shard is not None:
                _adopt(report, ledger, shard, count=count, progress=progress)
            report.unfinished = ledger.tiles - ledger.done
            if not report.unfinished:
                ledger.check()
                ending = {"state": "done", "nonfinite": ledger.nonfinite()}
                update_attributes(made.target, ending, leave=ledger.fence)
    return report


@borrowed()
def plan_segment(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    engine: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    shard: Shard | None = None,
    jobs: Jobs | None = None,
) -> Plan:
    """Return the plan that `segment` would make, with all its refusals; touches nothing.

    A disk that is too small is a notice here: a plan may be made elsewhere than it is run.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    _check_shard(shard, engine, scheduler, overwrite=False)
    made = _plan(source, model, output, options, count, overwrite=False, jobs=jobs, touch=False)[0]
    short = made.short_of_disk()
    return replace(made, notices=(*made.notices, short)) if short else made


def _plan(
    source: str | Path,
    model: str | Path,
    output: str | Path | None,
    options: Options,
    count: int,
    *,
    overwrite: bool,
    jobs: Jobs | None,
    touch: bool = True,
) -> tuple[Plan, dict[str, object] | None]:
    """Make the plan, and return what the ledger of an earlier run keeps, if there was one."""
    if not str(source):
        raise BadRequest("source is empty; name a Zarr, an OME-Zarr or a TIFF")
    target = str(output) if output is not None else default_target(source)
    check_target(target, source, touch=touch)
    if overwrite:
        check_free(target, overwrite=True)
    earlier = None if overwrite else find_earlier(target)
    kept = cast("Mapping[str, object]", (earlier or {}).get("identity") or {})
    if jobs is not None:
        sizes = cast("Mapping[str, object]", kept.get("sizes") or {})
        options = cluster.fitted(options, jobs, sizes)
    made = plan(
        source,
        model=model,
        output=target,
        options=options,
        workers=count or 1,
        earlier=kept,
        elsewhere=jobs is not None,
    )
    check_same(target, kept, made.identity())
    if earlier is not None:
        check_intact(made, finished=bool(earlier["finished"]))
    return made, earlier


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


def _check_shard(
    shard: Shard | None, engine: str, scheduler: str | None, *, overwrite: bool
) -> None:
    if shard is None:
        return
    if overwrite:
        raise BadRequest(
            f"shard (={shard}) must not be with --overwrite, or each task would undo the others'"
            " work; remove the output before the array begins"
        )
    if scheduler is not None or engine not in ("auto", "serial", "dask", "local-cuda"):
        raise BadRequest(
            f"shard (={shard}) is for arrays of processes without a scheduler; leave out"
            " --shard, or --scheduler and --engine"
        )


def _agreed(
    source: str | Path,
    model: str | Path,
    output: str | Path | None,
    options: Options,
    count: int,
    shard: Shard,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan of all tasks of an array; the target is there when this returns."""
    target = str(output) if output is not None else default_target(source)
    check_target(target, source)

    def make() -> tuple[Plan, dict[str, object] | None]:
        return _plan(source, model, output, options, count, overwrite=False, jobs=None)

    return agree(target, make, shard=shard, scanned=scanned)


def _adopt(
    report: Report,
    ledger: Ledger,
    shard: Shard,
    *,
    count: int,
    progress: Callable[[Report], None] | None,
) -> None:
    """Do what other tasks of the array have left that died."""
    while True:
        ledger.refresh()
        taken = ledger.adopt(shard)
        if not taken:
            return
        try:
            ledger.refresh()
            for number in sorted(taken):
                log.warning("shard %d/%d died: its tiles are done here", number, shard.count)
                share = Shard(number, shard.count).share(ledger.tiles)
                report.adopted.append(number)
                report.tiles += len(share)
                report.before += ledger.finished(share)
                _run(report, ledger, share, count=count, client=None, jobs=None, progress=progress)
        finally:
            for claim in taken.values():
                claim.close()


def _run(
    report: Report,
    ledger: Ledger,
    tiles: range,
    *,
    count: int,
    client: Client | None,
    jobs: Jobs | None,
    progress: Callable[[Report], None] | None,
) -> None:
    """Run the tiles that are left through the engine and enter them in the ledger."""
    began = time.perf_counter() - report.seconds
    job = SegmentJob(report.plan, ledger.right)
    left = ledger.remaining(tiles)
    if next(ledger.remaining(tiles), None) is None:
        return
    with _outcomes(job, left, report, count=count, client=client, jobs=jobs) as outcomes:
        for outcome in outcomes:
            report.retries += outcome.attempts - 1
            if isinstance(outcome, TileResult):
                ledger.mark(outcome.index, outcome)
                _enter(report, outcome)
            else:
                ledger.check()  # or each of what may be a million tiles would fail in turn
                write = report.plan.grid[outcome.index].write
                named = replace(outcome, cause=f"voxels {write}: {outcome.cause}")
                report.failures.append(named)
                log.info("tile %d set aside: %s", outcome.index, named.cause)
            report.seconds = time.perf_counter() - began
            if progress is not None:
                progress(report)
    report.failures.sort(key=lambda failure: failure.index)
    ledger.set_aside(report.failures)


def _enter(report: Report, result: TileResult) -> None:
    report.done += 1
    report.voxels += result.voxels
    report.nonfinite += result.nonfinite
    report.read_seconds += result.read_seconds
    report.compute_seconds += result.compute_seconds
    report.write_seconds += result.write_seconds
    report.starved_seconds += result.starved_seconds
    report.narrowed += result.narrowed > 0
    report.workers.setdefault(result.worker, Share()).add(
        time.time(),
        read=result.read_seconds,
        compute=result.compute_seconds,
        write=result.write_seconds,
        starved=result.starved_seconds,
    )


@contextmanager
def _connected(scheduler: str | None) -> Iterator[Client | None]:
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
def _outcomes(
    job: SegmentJob,
    tiles: Iterator[int],
    report: Report,
    *,
    count: int,
    client: Client | None,
    jobs: Jobs | None,
) -> Iterator[Iterator[TileResult | TileFailure]]:
    """Start the engine and give what becomes of the tiles."""
    if count == 0:
        yield serial.run(job, tiles)
    elif jobs is not None:
        from tilepipe.engines import dask, slurm

        left = report.left
        with cluster.started(report.plan.target, jobs, slots=job.slots, left=left) as fleet:
            report.dashboard = dask.dashboard_address(fleet.client)
            yield slurm.run(job, tiles, fleet=fleet)
            report.job_seconds = fleet.seconds
    else:
        from tilepipe.engines import dask

        gpus = _gpus(count) if report.plan.sizes.device == "cuda" else []
        local = dask.local_client(count, threads=job.slots, gpus=gpus)
        with nullcontext(client) if client is not None else local as used:
            report.dashboard = dask.dashboard_address(used)
            yield dask.run(job, tiles, client=used)
