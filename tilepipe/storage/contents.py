"""What an output holds: all names that we give, so that nothing else is ever written to or removed.

Law: what lies outside an output's own folder, or in it and is not of ours, is the same after any
run. Links are never ours, whatever their name, nor is what is mounted there.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tilepipe.errors import BadRequest
from tilepipe.storage.location import find, sync_file
from tilepipe.storage.objects import remove_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tilepipe.storage.location import Place

LEDGER = ".tilepipe"
"""The folder of the ledger inside an output; with its plan it marks an output as ours."""
MARKS = (".zgroup", ".zattrs", "zarr.json")
"""The group's metadata, in the order in which they are removed: the last holds our attributes."""
_ID = "[0-9a-f]{32}"
FILES = re.compile(
    rf"""
    (0/)? (zarr\.json | \.zgroup | \.zarray | \.zattrs)
    | (0/)? (zarr (\.json)? | \.zgroup | \.zarray | \.zattrs) \.{_ID}\.partial
    | 0/ (c/)? \d+ (/\d+){{0,5}} (\.{_ID}\.partial)?
    | \.tilepipe/ (done | log | lock) (-\d+)? (\.\d{{6}} | \.{_ID})?
    | \.tilepipe/ (plan | failed (-\d+)?) \.json (\.new | \.{_ID}\.partial)?
    | \.tilepipe/jobs/ [^/]+ \.(out | err)
    | \.tilepipe/jobs/ \.tls-[^/]+ / (ca_file | cert | key)
    """,
    re.VERBOSE,
)
"""Every file that we, zarr or SLURM's jobs write there; killed, zarr leaves ``partial``."""
FOLDERS = re.compile(
    r"0 | 0/c | 0/ (c/)? \d+ (/\d+){0,4} | \.tilepipe (/jobs (/\.tls-[^/]+)?)?", re.VERBOSE
)
"""Every folder that they make there."""


def check_ways(target: Place) -> None:
    """Raise BadRequest where what we write first leads out of the output: a look at a few names."""
    if isinstance(target, Path) and target.is_dir():
        _check_mounts(target)
        names = [target / name for name in (*MARKS, "0", "0/c", "0/zarr.json", LEDGER)]
        for path in names:
            _check_link(target, path)
        for entry in find(target / LEDGER, ""):
            _check_link(target, target / LEDGER / entry.name)
        for name in (*MARKS, "0/zarr.json", "0/.zarray", "0/.zattrs"):
            _check_file(target, name)
        for name in ("plan.json", "done", "log"):
            _check_file(target, f"{LEDGER}/{name}")


def _check_file(target: Path, name: str) -> None:
    if (target / name).is_dir():
        raise BadRequest(
            f"output (={target}) is damaged: {name} is a folder where a file should be; move it"
            " away or name another path"
        )


def check_ours(target: Place) -> None:
    """Raise BadRequest where an output holds anything that we did not write; looks at all of it."""
    if isinstance(target, Path):
        _check_mounts(target)
    for _ in _walk(target, ""):
        pass


def clear(target: Place) -> None:
    """Remove what an output holds, but for claims on it; raises BadRequest as `check_ours` does.

    Law: stopped at any moment, it leaves an output that is known as ours, and in which no tile is
    taken for finished whose voxels are gone. What finished tiles say goes first, the plan last.
    """
    ledger = target / LEDGER
    _drop(path for path, name in _walk(target, LEDGER) if not _stays(name) and not _is_plan(name))
    if isinstance(ledger, Path) and ledger.is_dir():
        sync_file(ledger)  # before any voxel goes
    _drop(path for path, _ in _walk(target, "0"))
    if not isinstance(target, Path):
        (target / "0").unlink()  # some stores show what is empty now
    rest = {name: path for path, name in _walk(target, "") if not name.startswith(LEDGER)}
    order = ["", *MARKS]  # what is no mark first
    _drop(rest[n] for n in sorted(rest, key=lambda n: order.index(n if n in MARKS else "")))
    _drop(path for path, name in _walk(target, LEDGER) if _is_plan(name))


def remove(target: Place) -> None:
    """Remove an output and its folder; raises BadRequest as `check_ours` does."""
    check_ours(target)
    clear(target)
    if isinstance(target, Path):
        with suppress(FileNotFoundError):
            (target / LEDGER).rmdir()
        target.rmdir()


def _stays(name: str) -> bool:
    """Whether it is the ledger's folder, or a claim: of who is about to write, which is us."""
    return name == LEDGER or name.startswith(f"{LEDGER}/lock")


def _is_plan(name: str) -> bool:
    return name.startswith(f"{LEDGER}/plan.json")


def _walk(target: Place, inner: str) -> Iterator[tuple[Place, str]]:
    """Yield what lies in a part of an output and then the part, each with its name in the output.

    Nothing where there is no such part. Raises BadRequest where something is not ours.
    """
    if not isinstance(target, Path):
        for key, size in (target / inner if inner else target).objects():
            name = key.path.removeprefix(target.path).strip("/")
            if not size and (not name or FOLDERS.fullmatch(name)):
                continue  # by which some show folders
            if not FILES.fullmatch(name):
                raise _foreign(target, name)
            yield key, name
        return
    try:
        entries = sorted(os.scandir(target / inner), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{inner}/{entry.name}" if inner else entry.name
        if entry.is_symlink():
            raise _link(target, name)
        if entry.is_dir(follow_symlinks=False):
            if not FOLDERS.fullmatch(name):
                raise _foreign(target, name)
            yield from _walk(target, name)
        elif FILES.fullmatch(name) and entry.is_file(follow_symlinks=False):
            yield target / name, name
        else:
            raise _foreign(target, name)
    if inner:
        yield target / inner, inner


def _drop(places: Iterable[Place]) -> None:
    keys = []
    for place in places:
        if isinstance(place, Path):
            place.rmdir() if place.is_dir() else place.unlink()
        else:
            keys.append(place)
            if len(keys) == 1000:
                remove_keys(keys)
                keys = []
    remove_keys(keys)


def _check_mounts(target: Path) -> None:
    for mount in psutil.disk_partitions(all=True):
        place = Path(mount.mountpoint)
        if target in place.parents:
            raise BadRequest(
                f"output (={target}) holds {place.relative_to(target)}, where another file system"
                " is mounted; unmount it or name another path"
            )


def _check_link(target: Path, path: Path) -> None:
    if path.is_symlink():
        raise _link(target, str(path.relative_to(target)))


def _link(target: Place, name: str) -> BadRequest:
    return BadRequest(
        f"output (={target}) holds {name}, a link, through which tilepipe never writes or removes;"
        " put what it leads to in its place, or name another path"
    )


def _foreign(target: Place, name: str) -> BadRequest:
    return BadRequest(
        f"output (={target}) holds {name}, which tilepipe did not write and never removes; move it"
        " away or name another path"
    )
