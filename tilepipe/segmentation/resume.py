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
    claimed,
    claimed_first,
    folder_of,
    is_begun,
    is_claimed,
    lay_plan,
)
from tilepipe.storage.location import locate
from tilepipe.storage.location import replace as write_whole
from tilepipe.volumes.normalize import parse, resolve, restore
from tilepipe.volumes.output import (
    check_free,
    create_target,
    is_empty,
    open_target,
    read_attributes,
    update_attributes,
)
from tilepipe.volumes.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tilepipe.planning.plan import Plan
    from tilepipe.runs.array import ArrayTask
    from tilepipe.runs.lease import Claim


log = logging.getLogger(__name__)


def find_earlier(target: str) -> dict[str, object] | None:
    """Return the plan of a run that wrote to this target before, and how many tiles are finished.

    None where there was none.
    """
    place = locate(target, "output")
    if not place.exists():
        return None
    ledger = Ledger.open(target, write=False)
    if ledger is not None:
        with ledger:
            check_version(target, ledger.plan)
            return {**ledger.plan, "finished": ledger.done}
    begun = _begun(target)
    check_free(target, overwrite=True)  # says what else lies there
    if not begun and not is_empty(place):
        raise BadRequest(
            f"output (={target}) exists without the ledger of its run; name another, or replace"
            " it with --overwrite"
        )
    return None


def check_intact(made: Plan, *, finished: bool) -> None:
    """Refuse an earlier output whose array is not the one that its run created.

    Metadata that a crash has spoiled can be made anew, see `restore_metadata`; that of an
    array is not looked for where it is gone with ``finished`` tiles, since its voxels may be, too.
    """
    if _spoiled(made, finished=finished):
        return
    damage = ""
    try:
        found = open_target(made.target)
        stored = found.shape, found.channels, found.chunks, found.shards, str(found.dtype)
        channels = made.answer.channels if made.answer.stacked else None
        sizes = made.sizes
        wanted = made.source.shape, channels, sizes.chunks, sizes.shards, made.answer.dtype
        if stored != wanted:
            damage = "its array 0 is another than was created"
    except BadRequest as error:
        damage = str(error)
    if damage:
        raise BadRequest(
            f"output (={made.target}) is damaged ({damage}); replace it with --overwrite"
        )


def restore_metadata(made: Plan, ledger: Ledger) -> None:
    """Make metadata anew that a crash of the machine has emptied or cut off: as the plan has it."""
    place = locate(made.target, "output")
    spoiled = _spoiled(made, finished=ledger.done > 0)
    if not spoiled:
        return
    kept = {"versions": ledger.plan.get("versions"), "plan": ledger.plan["plan"]}
    with TemporaryDirectory(prefix="tilepipe-") as folder:
        fresh = Path(folder) / place.name
        _create(made, str(fresh), {"state": "started", **kept}, overwrite=False)
        for name in spoiled:
            log.warning("%s was spoiled, and is made anew from the plan", place / name)
            (place / name).parent.mkdir(exist_ok=True)
            write_whole(place / name, (fresh / name).read_bytes())
    check_intact(made, finished=ledger.done > 0)


def _spoiled(made: Plan, *, finished: bool) -> list[str]:
    """Return which files of metadata are no JSON, as after a crash, or are not there."""
    place = locate(made.target, "output")
    arrays = ("0/zarr.json", "0/.zarray")
    names: tuple[str, ...] = ("zarr.json", "0/zarr.json")
    if made.options.ome_version == "0.4":
        names = (".zgroup", ".zattrs", "0/.zarray", "0/.zattrs")
    found = []
    for name in names:
        try:
            json.loads((place / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if not (finished and name in arrays):
                found.append(name)
        except (ValueError, RecursionError):
            found.append(name)
    lost = finished and any(not (place / name).exists() for name in names if name in arrays)
    return [] if lost else found


def normalized(
    made: Plan,
    earlier: Mapping[str, object] | None,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan with its normalization known, from the earlier run or from the volume."""
    if made.normalization is not None:
        return made
    known = cast("Mapping[str, list[float]] | None", (earlier or {}).get("normalization"))
    if known:
        found = restore(known)
    else:
        volume = open_source(made.source.path, made.options)
        try:
            found = resolve(parse(made.normalize), volume, scanned)
        except OSError as error:
            raise BadRequest(
                f"normalize (={made.normalize}) needs every voxel of the source, and {error}; mend"
                " the source, or give known values with scale:A,B"
            ) from error
    return replace(made, normalization=found)


def open_ledger(
    made: Plan, earlier: Mapping[str, object] | None, *, task: ArrayTask | None, overwrite: bool
) -> Ledger:
    """Open the ledger of the earlier run, or create the target and a new one."""
    there = earlier is not None or task is not None
    opened = Ledger.open(made.target, task=task) if there else None
    if opened is not None:
        try:
            restore_metadata(made, opened)
        except BaseException:
            opened.close()
            raise
        return opened
    claim = claimed(made.target)
    content = _begin(made, claim, overwrite=overwrite)
    return Ledger(folder_of(made.target), content, tiles=len(made.grid), claim=claim)


def agree(
    target: str,
    make: Callable[[], tuple[Plan, dict[str, object] | None]],
    *,
    task: ArrayTask,
    scanned: Callable[[int, int], None] | None,
) -> Plan:
    """Return the plan of an array's tasks: the first creates the target, the others wait for it.

    ``make`` plans, and returns what the ledger keeps of an earlier run, if there was one.
    """
    while True:
        await_first(target)
        known = is_begun(target)
        try:
            made, earlier = make()
        except BadRequest:
            if is_begun(target) == known and not is_claimed(target):
                raise
            continue  # another task was just creating it
        if earlier is not None:
            return normalized(made, earlier, scanned)
        if short := made.short_of_disk():
            raise BadRequest(short)
        claim = claimed_first(target, task)
        if claim is not None:
            with closing(claim):
                _begin(made, claim, overwrite=False, scanned=scanned)


def _begin(
    made: Plan,
    claim: Claim,
    *,
    overwrite: bool,
    scanned: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """Create the target that was claimed and return its plan; nothing is left where that fails."""
    try:
        made = normalized(made, None, scanned)
        begun = _begun(made.target)
        if claim.after_dead or _state(made.target) == "started":
            time.sleep(SETTLE)
        attributes = {"state": "created", **made.provenance()}
        _create(made, made.target, attributes, overwrite=overwrite or begun)
        assert made.normalization is not None
        content: dict[str, object] = {
            "identity": made.identity(),
            "normalization": asdict(made.normalization),
            **made.provenance(),
        }
        content = lay_plan(made.target, content, tiles=len(made.grid))
        update_attributes(made.target, {"state": "started"})
    except BaseException:
        claim.close()
        with suppress(OSError):  # it holds more
            folder_of(made.target).rmdir()
            folder_of(made.target).parent.rmdir()
        raise
    return content


def _create(made: Plan, target: str, attributes: Mapping[str, object], *, overwrite: bool) -> None:
    many = made.answer.stacked
    create_target(
        target,
        axes="c" * many + made.source.axes,
        shape=(made.answer.channels,) * many + made.source.shape,
        dtype=made.answer.dtype,
        chunks=made.sizes.chunks,
        shards=made.sizes.shards,
        scale=made.source.scale,
        units=made.source.units,
        translation=made.source.translation,
        attributes=attributes,
        ome_version=cast("Literal['0.4', '0.5']", made.options.ome_version),
        overwrite=overwrite,
    )


def _begun(target: str) -> bool:
    """Whether a run was stopped here before it had a ledger, and so before any tile."""
    return _state(target) == "created"


def _state(target: str) -> object:
    """Return how far an output is: ``created``, ``started``, ``done``, or None for no output."""
    try:
        return read_attributes(target).get("state")
    except BadRequest:
        return None
