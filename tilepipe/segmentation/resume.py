"""How an output begins, and how a run finds what an earlier one has left."""

from __future__ import annotations

import json
import logging
import time
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, cast

from tilepipe.errors import BadRequest
from tilepipe.planning.identity import check_version
from tilepipe.runs.fence import SETTLE
from tilepipe.runs.ledger import (
    Ledger,
    await_first,
    is_begun,
    is_leased,
    lay_plan,
    take_first_lease,
    take_lease,
)
from tilepipe.storage.contents import look
from tilepipe.storage.location import replace as write_whole
from tilepipe.volumes.normalize import parse, resolve, restore
from tilepipe.volumes.output import Output
from tilepipe.volumes.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tilepipe.planning.plan import Plan
    from tilepipe.runs.array import ArrayTask
    from tilepipe.runs.lease import Lease
    from tilepipe.segmentation.request import Request


log = logging.getLogger(__name__)


def find_earlier(output: Output) -> dict[str, object] | None:
    """Return the plan of a run that wrote to this output before, and how many tiles are finished.

    Returns None where there was none.
    """
    if look(output.place) in ("nothing", "leases"):
        return None
    ledger = Ledger.open(output, write=False)
    if ledger is not None:
        with ledger:
            check_version(output.name, ledger.plan)
            return {**ledger.plan, "finished": ledger.done}
    state = _state(output)
    output.check_free(overwrite=True)  # says what else lies there
    if state != "created" and look(output.place) == "more":
        raise BadRequest(
            f"output (={output}) exists without the ledger of its run; name another, or replace"
            " it with --overwrite"
        )
    return None


def check_intact(output: Output, plan: Plan, *, finished: bool) -> None:
    """Refuse an earlier output whose array is not the one that its run created.

    Metadata that a crash has spoiled can be made anew, see `restore_metadata`; that of an
    array is not looked for where it is gone with ``finished`` tiles, since its voxels may be, too.
    """
    if _spoiled(output, plan, finished=finished):
        return
    damage = ""
    try:
        array = output.open()
        stored = array.shape, array.channels, array.chunks, array.shards, str(array.dtype)
        channels = plan.answer.channels if plan.answer.stacked else None
        sizes = plan.sizes
        planned = plan.source.shape, channels, sizes.chunks, sizes.shards, plan.answer.dtype
        if stored != planned:
            damage = "its array 0 is another than was created"
    except BadRequest as error:
        damage = str(error)
    if damage:
        raise BadRequest(f"output (={output}) is damaged ({damage}); replace it with --overwrite")


def restore_metadata(output: Output, plan: Plan, ledger: Ledger) -> None:
    """Make metadata anew that a crash of the machine has emptied or cut off: as the plan has it."""
    spoiled = _spoiled(output, plan, finished=ledger.done > 0)
    if not spoiled:
        return
    place = output.place
    provenance = {"versions": ledger.plan.get("versions"), "plan": ledger.plan["plan"]}
    with TemporaryDirectory(prefix="tilepipe-") as folder:
        fresh = Path(folder) / place.name
        create_output(Output.at(fresh), plan, {"state": "started", **provenance}, overwrite=False)
        for name in spoiled:
            log.warning("%s was spoiled, and is made anew from the plan", place / name)
            (place / name).parent.mkdir(exist_ok=True)
            write_whole(place / name, (fresh / name).read_bytes())
    check_intact(output, plan, finished=ledger.done > 0)


def _spoiled(output: Output, plan: Plan, *, finished: bool) -> list[str]:
    """Return which files of metadata are no JSON, as after a crash, or are not there."""
    arrays = ("0/zarr.json", "0/.zarray")
    names: tuple[str, ...] = ("zarr.json", "0/zarr.json")
    if plan.options.ome_version == "0.4":
        names = (".zgroup", ".zattrs", "0/.zarray", "0/.zattrs")
    spoiled, lost = [], False
    for name in names:
        try:
            json.loads((output.place / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if finished and name in arrays:
                lost = True
            else:
                spoiled.append(name)
        except (ValueError, RecursionError):
            spoiled.append(name)
    return [] if lost else spoiled


def normalized(
    plan: Plan,
    earlier: Mapping[str, object] | None,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan with its normalization known, from the earlier run or from the volume."""
    if plan.normalization is not None:
        return plan
    numbers = cast("Mapping[str, list[float]] | None", (earlier or {}).get("normalization"))
    if numbers:
        return replace(plan, normalization=restore(numbers))
    volume = open_source(plan.source.path, plan.options)
    try:
        return replace(plan, normalization=resolve(parse(plan.normalize), volume, scanned))
    except OSError as error:
        raise BadRequest(
            f"normalize (={plan.normalize}) needs every voxel of the source, and {error}; mend"
            " the source, or give known values with scale:A,B"
        ) from error


def open_ledger(request: Request, plan: Plan, earlier: Mapping[str, object] | None) -> Ledger:
    """Open the ledger of the earlier run, or create the output and a new ledger."""
    output, task = request.output, request.task
    may_exist = earlier is not None or task is not None
    ledger = Ledger.open(output, task=task) if may_exist else None
    if ledger is not None:
        try:
            restore_metadata(output, plan, ledger)
        except BaseException:
            ledger.close()
            raise
        return ledger
    lease = take_lease(output)
    content = _begin(output, plan, lease, overwrite=request.overwrite)
    return Ledger(output, content, tiles=len(plan.grid), lease=lease)


def agree(
    output: Output,
    make: Callable[[], tuple[Plan, dict[str, object] | None]],
    *,
    task: ArrayTask,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan of an array's tasks: the first creates the output, the others wait for it.

    ``make`` plans, and returns what the ledger keeps of an earlier run, if there was one.
    """
    while True:
        await_first(output)
        was_begun = is_begun(output)
        try:
            plan, earlier = make()
        except BadRequest:
            if is_begun(output) == was_begun and not is_leased(output):
                raise
            continue  # another task was just creating it
        if earlier is not None:
            return normalized(plan, earlier, scanned)
        if short := plan.short_of_disk():
            raise BadRequest(short)
        lease = take_first_lease(output, task)
        if lease is not None:
            with closing(lease):
                _begin(output, plan, lease, overwrite=False, scanned=scanned)


def _begin(
    output: Output,
    plan: Plan,
    lease: Lease,
    *,
    overwrite: bool,
    scanned: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """Create the output, on which we hold the lease, and its ledger; return the ledger's plan.

    Nothing is left where that fails.
    """
    try:
        plan = normalized(plan, None, scanned)
        state = _state(output)
        if lease.after_dead or state == "started":
            time.sleep(SETTLE)
        attributes = {"state": "created", **plan.provenance()}
        # Stopped before it had a ledger, and so before any tile, an output may be begun anew.
        create_output(output, plan, attributes, overwrite=overwrite or state == "created")
        assert plan.normalization is not None
        content: dict[str, object] = {
            "identity": plan.identity(),
            "normalization": asdict(plan.normalization),
            **plan.provenance(),
        }
        content = lay_plan(output, content, tiles=len(plan.grid))
        output.update_attributes({"state": "started"})
    except BaseException:
        lease.close()
        with suppress(OSError):  # it holds more
            output.ledger.folder.rmdir()
            output.place.rmdir()
        raise
    return content


def create_output(
    output: Output, plan: Plan, attributes: Mapping[str, object], *, overwrite: bool
) -> None:
    """Create the output of a plan, all zeros, without a ledger."""
    stacked = plan.answer.stacked
    output.create(
        axes="c" * stacked + plan.source.axes,
        shape=(plan.answer.channels,) * stacked + plan.source.shape,
        dtype=plan.answer.dtype,
        chunks=plan.sizes.chunks,
        shards=plan.sizes.shards,
        scale=plan.source.scale,
        units=plan.source.units,
        translation=plan.source.translation,
        attributes=attributes,
        ome_version=cast("Literal['0.4', '0.5']", plan.options.ome_version),
        overwrite=overwrite,
    )


def _state(output: Output) -> object:
    """Return how far an output is: ``created``, ``started``, ``done``, or None for no output."""
    try:
        return output.read_attributes().get("state")
    except BadRequest:
        return None
