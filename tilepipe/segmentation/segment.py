"""The story of ``tilepipe segment``: plan, create the output, run the tiles, keep the ledger."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from tilepipe.engines import TileResult
from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed
from tilepipe.options import Options
from tilepipe.planning.identity import check_same
from tilepipe.planning.plan import Plan, default_target, plan
from tilepipe.runs.array import ArrayTask
from tilepipe.segmentation import slurm as cluster
from tilepipe.segmentation.launch import choose_workers, connected, outcomes_of
from tilepipe.segmentation.report import Report
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
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from distributed import Client

    from tilepipe.engines.jobs import Jobs
    from tilepipe.runs.ledger import Ledger

log = logging.getLogger(__name__)


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
    task: ArrayTask | None = None,
    jobs: Jobs | None = None,
    overwrite: bool = False,
    planned: Callable[[Plan], None] | None = None,
    scanned: Callable[[int, int], None] | None = None,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Segment a volume into an OME-Zarr: the answer of one pass over the whole mirrored image.

    A run that was stopped goes on where an earlier run of the same plan ended. Tiles that fail are
    tried again, then set aside in ``Report.failures`` while the rest goes on.

    Args:
        source: The volume: a Zarr array, an OME-Zarr image, a TIFF or an SVS, by path or by address
            (``s3://...``). Its axes are ``(t) (c) z y x`` or ``(t) (c) y x``, in any order that the
            file or ``options.axes`` says.
        model: The model file; see `load_model`.
        output: Where the OME-Zarr is written; by default ``SOURCE-segmented.zarr`` beside the
            source.
        options: What is asked for. Sizes are voxels along the volume's axes without channels, and
            memory is bytes for each worker.
        engine: What runs the tiles: ``auto``, ``serial``, ``dask``, ``local-cuda`` or ``slurm``.
        scheduler: The address of a Dask scheduler that runs already, such as ``tcp://host:8786``.
        workers: How many processes compute; by default as many as the engine finds room for.
        task: This process's task of an array, which does its share of the tiles, and then what
            tasks that died have left. The task that does the last tile ends the whole run.
        jobs: The jobs of SLURM, for the engine ``slurm`` only.
        overwrite: Whether an earlier output of tilepipe at ``output`` is removed first.
        planned: Is called with the plan before anything is written.
        scanned: Is called with the number of blocks read and of all blocks, where the normalization
            needs every voxel to be read once first.
        progress: Is called with the report after every tile.

    Returns:
        What was done: tiles, voxels, seconds, and the tiles that were set aside. The output's
        array ``0`` holds labels ``axes`` (unsigned integers), or with ``options.write`` of
        ``probabilities``, ``logits`` or ``values`` floats ``(classes, *axes)``.

    Raises:
        BadRequest: What is asked for cannot work. Nothing has been written then.
        TileError: The run cannot go on: no worker can begin, or another run owns the output now.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    _check_task(task, engine, scheduler, overwrite=overwrite)
    made, earlier = (
        _plan(source, model, output, options, count, overwrite=overwrite, jobs=jobs)
        if task is None
        else (_agreed(source, model, output, options, count, task, scanned), None)
    )
    if task is None and (short := made.short_of_disk()):
        raise BadRequest(short)
    if jobs is not None:
        cluster.check(made.target, jobs)
    with connected(scheduler) as client:  # before anything is written
        if planned is not None:
            planned(made)
        if task is None:
            made = normalized(made, earlier, scanned)
        with open_ledger(made, earlier, task=task, overwrite=overwrite) as ledger:
            tiles = range(ledger.tiles) if task is None else task.share(ledger.tiles)
            report = Report(made, len(tiles), ledger.finished(tiles), task=task)
            _run(report, ledger, tiles, count=count, client=client, jobs=jobs, progress=progress)
            if task is not None:
                _adopt(report, ledger, task, count=count, progress=progress)
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
    task: ArrayTask | None = None,
    jobs: Jobs | None = None,
) -> Plan:
    """Return the plan that `segment` would make, with all its refusals; touches nothing.

    A disk that is too small is a notice here: a plan may be made elsewhere than it is run.
    """
    options = options or Options()
    count = choose_workers(engine, scheduler, workers, options, jobs)
    _check_task(task, engine, scheduler, overwrite=False)
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


def _check_task(
    task: ArrayTask | None, engine: str, scheduler: str | None, *, overwrite: bool
) -> None:
    if task is None:
        return
    if overwrite:
        raise BadRequest(
            f"task (={task}) must not be with --overwrite, or each task would undo the others'"
            " work; remove the output before the array begins"
        )
    if scheduler is not None or engine not in ("auto", "serial", "dask", "local-cuda"):
        raise BadRequest(
            f"task (={task}) is for arrays of processes without a scheduler; leave out"
            " --task, or --scheduler and --engine"
        )


def _agreed(
    source: str | Path,
    model: str | Path,
    output: str | Path | None,
    options: Options,
    count: int,
    task: ArrayTask,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan of all tasks of an array; the target is there when this returns."""
    target = str(output) if output is not None else default_target(source)
    check_target(target, source)

    def make() -> tuple[Plan, dict[str, object] | None]:
        return _plan(source, model, output, options, count, overwrite=False, jobs=None)

    return agree(target, make, task=task, scanned=scanned)


def _adopt(
    report: Report,
    ledger: Ledger,
    task: ArrayTask,
    *,
    count: int,
    progress: Callable[[Report], None] | None,
) -> None:
    """Do what other tasks of the array have left that died."""
    while True:
        ledger.refresh()
        taken = ledger.adopt(task)
        if not taken:
            return
        try:
            ledger.refresh()
            for number in sorted(taken):
                log.warning("task %d/%d died: its tiles are done here", number, task.count)
                share = ArrayTask(number, task.count).share(ledger.tiles)
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
    with outcomes_of(job, left, report, count=count, client=client, jobs=jobs) as outcomes:
        for outcome in outcomes:
            report.retries += outcome.attempts - 1
            if isinstance(outcome, TileResult):
                ledger.mark(outcome.index, outcome)
                report.enter(outcome)
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
