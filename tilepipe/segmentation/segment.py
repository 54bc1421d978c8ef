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
from tilepipe.planning.plan import plan as make_plan
from tilepipe.runs.array import ArrayTask
from tilepipe.segmentation import slurm as cluster
from tilepipe.segmentation.launch import connected, outcomes_of
from tilepipe.segmentation.report import Report
from tilepipe.segmentation.request import Request, check, choose_workers, find_output
from tilepipe.segmentation.resume import (
    agree,
    check_intact,
    find_earlier,
    normalized,
    open_ledger,
)
from tilepipe.segmentation.worker import SegmentJob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from distributed import Client

    from tilepipe.engines.jobs import Jobs
    from tilepipe.planning.plan import Plan
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
            (``s3://...``). Its spatial axes are ``z y x`` or ``y x``, in that order; axes ``t`` and
            ``c`` lie where the file or ``options.axes`` says.
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
    request = Request(
        source, model, find_output(source, output), options or Options(),
        engine, scheduler, workers, task, jobs, overwrite,
    )  # fmt: skip
    check(request)
    plan, earlier = _plan_or_agree(request, scanned)
    if jobs is not None:
        cluster.check(request.output, jobs)
    with connected(scheduler) as client:  # before anything is written
        if planned is not None:
            planned(plan)
        plan = normalized(plan, earlier, scanned)
        with open_ledger(request, plan, earlier) as ledger:
            tiles = range(ledger.tiles) if task is None else task.share(ledger.tiles)
            report = Report(plan, len(tiles), ledger.finished(tiles), task=task)
            _run(request, report, ledger, tiles, client=client, progress=progress)
            if task is not None:
                _adopt(request, report, ledger, task, progress=progress)
            report.unfinished = ledger.tiles - ledger.done
            if not report.unfinished:
                ledger.check()
                ending = {"state": "done", "nonfinite": ledger.nonfinite()}
                request.output.update_attributes(ending, guard=ledger.fence)
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
    """Return the plan that `segment` would make, with all its refusals; nothing is written.

    A disk that is too small is a notice here: a plan may be made elsewhere than it is run.
    """
    request = Request(
        source, model, find_output(source, output), options or Options(),
        engine, scheduler, workers, task, jobs,
    )  # fmt: skip
    check(request)
    plan, _ = _plan(request, touch=False)
    short = plan.short_of_disk()
    return replace(plan, notices=(*plan.notices, short)) if short else plan


def _plan_or_agree(
    request: Request, scanned: Callable[[int, int], None] | None
) -> tuple[Plan, dict[str, object] | None]:
    """Return the plan, and what the ledger of an earlier run keeps, if there was one.

    The tasks of an array agree on one plan; the output is there when this returns.
    """
    if request.task is not None:
        request.output.check_apart(request.source)
        plan = agree(request.output, lambda: _plan(request), task=request.task, scanned=scanned)
        return plan, None
    plan, earlier = _plan(request)
    if short := plan.short_of_disk():
        raise BadRequest(short)
    return plan, earlier


def _plan(request: Request, *, touch: bool = True) -> tuple[Plan, dict[str, object] | None]:
    """Make the plan, and return what the ledger of an earlier run keeps, if there was one."""
    output, options, jobs = request.output, request.options, request.jobs
    output.check_apart(request.source, touch=touch)
    if request.overwrite:
        output.check_free(overwrite=True)
    earlier = None if request.overwrite else find_earlier(output)
    identity = cast("Mapping[str, object]", (earlier or {}).get("identity") or {})
    if jobs is not None:
        sizes = cast("Mapping[str, object]", identity.get("sizes") or {})
        options = cluster.fitted(options, jobs, sizes)
    plan = make_plan(
        request.source,
        model=request.model,
        output=output.name,
        options=options,
        workers=choose_workers(request) or 1,
        earlier=identity,
        elsewhere=jobs is not None,
    )
    check_same(output.name, identity, plan.identity())
    if earlier is not None:
        check_intact(output, plan, finished=bool(earlier["finished"]))
    return plan, earlier


def _run(
    request: Request,
    report: Report,
    ledger: Ledger,
    tiles: range,
    *,
    client: Client | None,
    progress: Callable[[Report], None] | None,
) -> None:
    """Run the tiles that are left through the engine and enter them in the ledger."""
    began = time.perf_counter() - report.seconds
    if next(ledger.remaining(tiles), None) is None:
        return
    job = SegmentJob(report.plan, ledger.right)
    left = ledger.remaining(tiles)
    with outcomes_of(job, left, report, request, client=client) as outcomes:
        for outcome in outcomes:
            report.retries += outcome.attempts - 1
            if isinstance(outcome, TileResult):
                ledger.mark(outcome.index, outcome)
                report.enter(outcome)
            else:
                ledger.check()  # or each of what may be a million tiles would fail in turn
                write = report.plan.grid[outcome.index].write
                failure = replace(outcome, cause=f"voxels {write}: {outcome.cause}")
                report.failures.append(failure)
                log.info("tile %d set aside: %s", failure.index, failure.cause)
            report.seconds = time.perf_counter() - began
            if progress is not None:
                progress(report)
    report.failures.sort(key=lambda failure: failure.index)
    ledger.set_aside(report.failures)


def _adopt(
    request: Request,
    report: Report,
    ledger: Ledger,
    task: ArrayTask,
    *,
    progress: Callable[[Report], None] | None,
) -> None:
    """Do what other tasks of the array have left that died."""
    while True:
        ledger.refresh()
        leases = ledger.adopt(task)
        if not leases:
            return
        try:
            ledger.refresh()
            for number in sorted(leases):
                log.warning("task %d/%d died: its tiles are done here", number, task.count)
                share = ArrayTask(number, task.count).share(ledger.tiles)
                report.adopted.append(number)
                report.tiles += len(share)
                report.before += ledger.finished(share)
                _run(request, report, ledger, share, client=None, progress=progress)
        finally:
            for lease in leases.values():
                lease.close()
