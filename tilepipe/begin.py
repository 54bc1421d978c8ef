"""How an output begins, and how a run finds what an earlier one has left."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal, cast

from tilepipe.errors import BadRequest
from tilepipe.ledger import (
    Ledger,
    await_first,
    claimed,
    claimed_first,
    folder_of,
    is_begun,
    is_claimed,
    lay_plan,
)
from tilepipe.normalize import Normalization, parse, resolve
from tilepipe.place import locate
from tilepipe.target import (
    check_free,
    create_target,
    is_empty,
    open_target,
    read_attributes,
    update_attributes,
)
from tilepipe.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tilepipe.claim import Claim
    from tilepipe.options import Shard
    from tilepipe.plan import Plan


def find_earlier(target: str) -> dict[str, object] | None:
    """Return the plan of a run that wrote to this target before, None where there was none."""
    place = locate(target, "output")
    if not place.exists():
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
    if not begun and not is_empty(place):
        raise BadRequest(
            f"output (={target}) exists without the ledger of its run; name another, or replace"
            " it with --overwrite"
        )
    return None


def check_same(target: str, kept: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Refuse what is asked where it would give other bytes than what was begun."""
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


def check_intact(made: Plan) -> None:
    """Refuse an earlier output whose array is not the one that its run created."""
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


def open_ledger(
    made: Plan, earlier: Mapping[str, object] | None, *, shard: Shard | None, overwrite: bool
) -> Ledger:
    """Open the ledger of the earlier run, or create the target and a new one."""
    there = earlier is not None or shard is not None
    opened = Ledger.open(made.target, shard=shard) if there else None
    if opened is not None:
        return opened
    claim = claimed(made.target)
    content = _begin(made, claim, overwrite=overwrite)
    return Ledger(folder_of(made.target), content, tiles=len(made.grid), claim=claim)


def agree(
    target: str,
    make: Callable[[], tuple[Plan, dict[str, object] | None]],
    *,
    shard: Shard,
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
        claim = claimed_first(target, shard)
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
        _create(made, overwrite=overwrite)
        assert made.normalization is not None
        content: dict[str, object] = {
            "identity": made.identity(),
            "normalization": asdict(made.normalization),
            "plan": made.asdict(),
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


def _create(made: Plan, *, overwrite: bool) -> None:
    many = made.answer.stacked
    begun = _begun(made.target)
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
