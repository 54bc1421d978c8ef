"""The story of ``tilepipe segment``: plan, create the output, run the tiles, keep the ledger."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from tilepipe import cluster
from tilepipe.engines import TileFailure, TileResult, serial
from tilepipe.errors import BadRequest
from tilepipe.ledger import Ledger, check_idle, fingerprint
from tilepipe.normalize import Normalization, parse, resolve
from tilepipe.options import ENGINES, Options
from tilepipe.plan import Plan, default_target, plan
from tilepipe.target import (
    check_free,
    check_target,
    create_target,
    open_target,
    read_attributes,
    update_attributes,
)
from tilepipe.volume import open_volume
from tilepipe.worker import SegmentJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from distributed import Client

    from tilepipe.engines.jobs import Jobs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Report:
    """How a segmentation goes, and went."""

    plan: Plan
    tiles: int
    """Tiles of the whole volume."""
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
    failures: list[TileFailure] = field(default_factory=list)
    job_seconds: float = 0.0
    """For how long jobs of SLURM have run, all together."""
    dashboard: str | None = None
    """Address of the Dask dashboard, where there is one."""

    @property
    def left(self) -> int:
        """Tiles neither finished nor set aside."""
        return self.tiles - self.before - self.done - len(self.failures)


def segment(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    engine: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
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
    are retried, then set aside in ``Report.failures`` while the rest goes on. ``jobs`` are those
    of engine ``slurm``.

    Raises `BadRequest`, before anything is written, for what cannot work.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    made, earlier = _plan(source, model, output, options, count, overwrite=overwrite, jobs=jobs)
    if short := made.short_of_disk():
        raise BadRequest(short)
    if jobs is not None:
        cluster.check(made.target, jobs)
    with _connected(scheduler) as client:  # before anything is written
        if planned is not None:
            planned(made)
        made = _normalized(made, earlier, scanned)
        with _ledger(made, earlier, overwrite=overwrite) as ledger:
            report = Report(made, ledger.tiles, ledger.done)
            _run(report, ledger, count=count, client=client, jobs=jobs, progress=progress)
            if ledger.done == ledger.tiles:
                update_attributes(made.target, {"state": "done", "nonfinite": report.nonfinite})
    return report


def plan_segment(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    engine: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    jobs: Jobs | None = None,
) -> Plan:
    """Return the plan that `segment` would make, with all its refusals; touches nothing.

    A disk that is too small is a notice here: a plan may be made elsewhere than it is run.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    made = _plan(source, model, output, options, count, overwrite=False, jobs=jobs)[0]
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
) -> tuple[Plan, dict[str, object] | None]:
    """Make the plan, and return what the ledger of an earlier run keeps, if there was one."""
    if not str(source):
        raise BadRequest("source is empty; name a Zarr, an OME-Zarr or a TIFF")
    target = str(output) if output is not None else default_target(source)
    check_target(target, source)
    if overwrite:
        check_free(target, overwrite=True)
    earlier = None if overwrite else _earlier(target)
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
    _check_same(target, kept, made.identity())
    if earlier is not None:
        _check_intact(made)
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


def _useful_workers(options: Options) -> int:
    """Return the number of worker processes that pays: one for each of several GPUs, else none.

    On a CPU one process takes all cores: it needs less memory than several and starts at once.
    """
    import torch

    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
    return 0


def _earlier(target: str) -> dict[str, object] | None:
    """Return the plan of a run that wrote to this target before, None where there was none."""
    if not Path(target).exists():
        return None
    ledger = Ledger.open(target, write=False)
    if ledger is not None:
        with ledger:
            if "identity" in ledger.plan:
                return ledger.plan
        raise BadRequest(
            f"output (={target}) has a ledger without its plan; replace it with --overwrite"
        )
    begun = _begun(target)
    check_free(target, overwrite=True)  # says what else lies there
    if not begun and any(Path(target).iterdir()):
        raise BadRequest(
            f"output (={target}) exists without the ledger of its run; name another, or replace"
            " it with --overwrite"
        )
    return None


def _check_same(target: str, kept: Mapping[str, object], asked: Mapping[str, object]) -> None:
    if not kept:
        return
    changed = [name for name in asked if kept.get(name) != asked[name]]
    if "sizes" in changed:
        old, new = (cast("Mapping[str, object]", d.get("sizes") or {}) for d in (kept, asked))
        changed.remove("sizes")
        changed += [name for name in new if old.get(name) != new[name]]
    if changed:
        raise BadRequest(
            f"output (={target}) was begun with another plan (other {', '.join(changed)}); go on"
            " with the same options, name another output, or replace it with --overwrite"
        )


def _check_intact(made: Plan) -> None:
    """Refuse an earlier output whose array is not the one that its run created."""
    damage = ""
    try:
        found = open_target(made.target)
        stored = found.shape, found.chunks, found.shards, str(found.dtype)
        if stored != (made.source.shape, made.sizes.chunks, made.sizes.shards, made.answer.dtype):
            damage = "its array 0 is another than was created"
    except BadRequest as error:
        damage = str(error)
    if damage:
        raise BadRequest(
            f"output (={made.target}) is damaged ({damage}); replace it with --overwrite"
        )


def _normalized(
    made: Plan,
    earlier: Mapping[str, object] | None,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan with its normalization known, from the earlier run or from the volume."""
    if made.normalization is not None:
        return made
    known = cast("Mapping[str, list[float]] | None", (earlier or {}).get("normalization"))
    if known:
        found = Normalization(tuple(known["center"]), tuple(known["scale"]))
    else:
        volume = open_volume(made.source.path, axes=made.options.axes, level=made.options.level)
        try:
            found = resolve(parse(made.normalize), volume, scanned)
        except OSError as error:
            raise BadRequest(
                f"normalize (={made.normalize}) needs every voxel of the source, and {error}; mend"
                " the source, or give known values with scale:A,B"
            ) from error
    return replace(made, normalization=found)


@contextmanager
def _ledger(
    made: Plan, earlier: Mapping[str, object] | None, *, overwrite: bool
) -> Iterator[Ledger]:
    """Open the ledger of the earlier run, or create the target and a new one."""
    opened = Ledger.open(made.target) if earlier is not None else None
    if opened is None:
        check_idle(made.target)
        _create(made, overwrite=overwrite)
        assert made.normalization is not None
        content = {
            "identity": made.identity(),
            "normalization": asdict(made.normalization),
            "plan": made.asdict(),
        }
        opened = Ledger.create(made.target, content, tiles=len(made.grid))
        update_attributes(made.target, {"state": "started"})
    with opened:
        yield opened


def _create(made: Plan, *, overwrite: bool) -> None:
    many = made.options.write != "labels"
    begun = Path(made.target).is_dir() and _begun(made.target)
    create_target(
        made.target,
        axes="c" * many + made.source.axes,
        shape=(made.answer.channels,) * many + made.source.shape,
        dtype=made.answer.dtype,
        chunks=made.sizes.chunks,
        shards=made.sizes.shards,
        scale=made.source.scale,
        units=made.source.units,
        attributes={"state": "created", **made.provenance()},
        ome_version=cast("Literal['0.4', '0.5']", made.options.ome_version),
        overwrite=overwrite or begun,
    )


def _begun(target: str) -> bool:
    """Whether a run was stopped here before it had a ledger, and so before any tile."""
    try:
        return read_attributes(target).get("state") == "created"
    except BadRequest:
        return False


def _run(
    report: Report,
    ledger: Ledger,
    *,
    count: int,
    client: Client | None,
    jobs: Jobs | None,
    progress: Callable[[Report], None] | None,
) -> None:
    """Run the tiles that are left through the engine and enter them in the ledger."""
    began = time.perf_counter()
    job = SegmentJob(report.plan, fingerprint(report.plan.identity()))
    with _outcomes(job, ledger, report, count=count, client=client, jobs=jobs) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, TileResult):
                ledger.mark(outcome.index)
                report.done += 1
                report.voxels += outcome.voxels
                report.nonfinite += outcome.nonfinite
                report.read_seconds += outcome.read_seconds
                report.compute_seconds += outcome.compute_seconds
                report.write_seconds += outcome.write_seconds
                report.narrowed += outcome.narrowed > 0
            else:
                write = report.plan.grid[outcome.index].write
                named = replace(outcome, cause=f"voxels {write}: {outcome.cause}")
                report.failures.append(named)
                log.info("tile %d set aside: %s", outcome.index, named.cause)
            report.seconds = time.perf_counter() - began
            if progress is not None:
                progress(report)
    report.failures.sort(key=lambda failure: failure.index)
    ledger.set_aside(report.failures)


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
    ledger: Ledger,
    report: Report,
    *,
    count: int,
    client: Client | None,
    jobs: Jobs | None,
) -> Iterator[Iterator[TileResult | TileFailure]]:
    """Start the engine and give what becomes of the tiles."""
    if ledger.done == ledger.tiles:
        yield iter(())
    elif count == 0:
        yield serial.run(job, ledger.remaining())
    elif jobs is not None:
        from tilepipe.engines import dask, slurm

        left = ledger.tiles - ledger.done
        with cluster.started(report.plan.target, jobs, slots=job.slots, left=left) as fleet:
            report.dashboard = dask.dashboard_address(fleet.client)
            yield slurm.run(job, ledger.remaining(), fleet=fleet)
            report.job_seconds = fleet.seconds
    else:
        from tilepipe.engines import dask

        gpus = _gpus(count) if report.plan.sizes.device == "cuda" else []
        local = dask.local_client(count, threads=job.slots, gpus=gpus)
        with nullcontext(client) if client is not None else local as used:
            report.dashboard = dask.dashboard_address(used)
            yield dask.run(job, ledger.remaining(), client=used)
